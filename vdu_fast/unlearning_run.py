"""One unlearning run: its state, its step and its guards. `vdu_fast.unlearner` drives it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vdu_fast import ops
from vdu_fast.arena import Arena, select_parameters
from vdu_fast.checkpoint import uninterrupted
from vdu_fast.config import UnlearnConfig
from vdu_fast.errors import InputError
from vdu_fast.objective import ascent_loss, forget_scale, per_sample_error, regularizer_scale
from vdu_fast.optim import UpdateRule, VariationalWeights
from vdu_fast.phases import phase
from vdu_fast.pipelines import Denoiser
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.prefetch import Prefetcher
from vdu_fast.probe import NoisePredictionProbe, ReplayProbe, error_curve
from vdu_fast.replay import ReplayBank
from vdu_fast.rng import Stream, batch_indices, randint


def check_run(denoiser: Denoiser, posterior: GaussianPosterior, config: UnlearnConfig) -> None:
    """InputError when model, posterior and settings do not fit together; before any work is done."""
    posterior.check_fits(select_parameters(denoiser.module, config.trainable))
    if config.center == "posterior" and posterior.mean is None:
        raise InputError("center 'posterior' needs a posterior with a mean, this one has none; use center 'model'.")
    total = len(denoiser.schedule)
    if config.timestep_window is not None and config.timestep_window[1] > total:
        raise InputError(f"timestep_window {config.timestep_window} goes beyond the model's {total} timesteps.")
    denoiser.schedule.timestep_weights(config.weighting)


class UnlearningRun:
    """Minimises L = -(1 - gamma) A + gamma B + lambda B_f over q; everything random is a function of (seed, step).

    Args:
        denoiser: the model, run as its `execution` says; its trainable parameters move into an arena until `finish`.
        forget_images: float32 [N, C, H, W] in [-1, 1].
        posterior: over at least the trainable parameters.
        bank: the filtered replay bank, or None when replay_weight is 0.
        config: the settings.
        retained_images: measured at every check and used for nothing else.

    Attributes:
        images_seen: forget and replayed images of the steps since this object was made.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        forget_images: Tensor,
        posterior: GaussianPosterior,
        bank: ReplayBank | None,
        config: UnlearnConfig,
        *,
        retained_images: Tensor | None = None,
    ) -> None:
        self.denoiser, self.images, self.bank, self.config = denoiser, forget_images, bank, config
        total = len(denoiser.schedule)
        check_run(denoiser, posterior, config)
        self.window = config.timestep_window or (0, total)
        self.timestep_weights = denoiser.schedule.timestep_weights(config.weighting)
        # On the device, where looking one up does not wait for the host.
        self._step_weights = self.timestep_weights.to(denoiser.device, torch.float32)
        self.arena = Arena(denoiser.module, config.trainable)
        self._replay_batch: Prefetcher | None = None
        if bank is not None:
            self._replay_batch = Prefetcher(
                lambda draw: bank.batch(config.replay_batch_size, draw, config.seed, focus=config.replay_focus),
                denoiser.device,
                enabled=config.prefetch,
            )
        # Dropout would draw from a generator that no resumed run can restore.
        self._training = denoiser.module.training
        denoiser.module.eval()
        try:
            self._measure_start(posterior, retained_images)
        except BaseException:
            # Nobody gets this object then, so nobody else could give the module back.
            self.release()
            raise

    @phase("start")
    def _measure_start(self, posterior: GaussianPosterior, retained_images: Tensor | None) -> None:
        """Put q's mean into the network, and measure there what the run is later compared with."""
        config, denoiser = self.config, self.denoiser
        self.weights = self._variational_weights(posterior)
        self._in_network: int | str | None = None  # "mean", or the draw whose weights the network holds
        several = config.samples_per_step * config.accumulate > 1
        self._gradient_sum = torch.zeros_like(self.weights.z) if several else None
        self._noise_gradient_sum = torch.zeros_like(self.weights.z) if several and config.learn_std else None
        self._scales()
        probe: dict[str, Any] = {
            "size": config.check_size,
            "seed": config.seed,
            "weights": self.timestep_weights,
            "batch_size": config.inference_batch_size,
        }
        self.forget_probe = NoisePredictionProbe(denoiser, self.images, window=self.window, **probe)
        self.replay_probe = ReplayProbe(denoiser, self.bank, **probe) if self.bank is not None else None
        self.retained_probe = (
            NoisePredictionProbe(denoiser, retained_images, **probe) if retained_images is not None else None
        )
        self.write_mean()
        self._check_compiled()
        self.start_error = float(self.forget_probe.error().mean())
        self.start_curve = error_curve(denoiser, self.images, **(probe | {"size": 4 * config.check_size}))
        self.start_retained = float(self.retained_probe.error().mean()) if self.retained_probe else None
        self.step_number, self.images_seen = 0, 0
        self.history: list[dict[str, float]] = []
        self.best: tuple[float, int, Tensor] | None = None
        # The step of the last measurement and its z; none before the first, when z is 0.
        self._last_good: tuple[int, Tensor | None] = (0, None)

    def _check_compiled(self) -> None:
        """On a batch of the size that the steps have: another size is another compilation."""
        if self.denoiser.execution.compile == "off":
            return
        _, x_t, timesteps, _ = self._batch(0)
        self.denoiser.check_compiled(x_t, timesteps)

    def _variational_weights(self, posterior: GaussianPosterior) -> VariationalWeights:
        config = self.config
        std = self.arena.flatten(posterior.std)
        if config.sharpen != 1:
            rms = std.square().mean().sqrt()
            std = std * (std / rms) ** (config.sharpen - 1)
        center = self.arena.theta.to(self.arena.state_dtype, copy=True)
        if config.center == "posterior":
            assert posterior.mean is not None
            center = self.arena.flatten(posterior.mean)
        rule = UpdateRule(config.optimizer, config.learning_rate, config.momentum)
        return VariationalWeights(center, std, rule, family=config.family, learn_std=config.learn_std)

    def _scales(self) -> None:
        config = self.config
        elements = math.prod(self.denoiser.sample_shape)
        self.forget_scale = forget_scale(
            config.reduction, images=len(self.images), timesteps=self.window[1] - self.window[0], elements=elements
        )
        self.replay_scale = forget_scale(
            config.reduction, images=1, timesteps=len(self.denoiser.schedule), elements=elements
        )
        self.kl_weight = config.gamma * regularizer_scale(config.reduction, self.arena.numel)

    def step(self) -> dict[str, float]:
        """One optimizer step, which Ctrl-C cannot cut in two; returns what it measured.

        Raises:
            InputError: a loss, gradient or measurement is not finite; the last weights that were measured are kept.
        """
        with uninterrupted():
            return self._step()

    def _step(self) -> dict[str, float]:
        config, weights = self.config, self.weights
        kl_before = weights.kl
        trusted = config.trust_region is None or kl_before / self.arena.numel < config.trust_region
        forgetting = trusted and self.step_number < config.forget_steps
        totals: dict[str, float] = {}
        passes = config.samples_per_step * config.accumulate
        first_draw = self.step_number * passes
        for draw in range(first_draw, first_draw + passes):
            self._put(draw)
            losses = self._network_gradient(draw, forgetting=forgetting)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value / passes
            self._collect_gradient(draw, passes)
        totals["loss"] += self.kl_weight * kl_before
        self._check_finite("loss", totals["loss"])
        norm = self._move(draw, first_draw + passes)
        self._check_finite("gradient norm", norm)
        self.step_number += 1
        penalty = kl_before / self.arena.numel
        record = {"step": float(self.step_number), **totals, "penalty": penalty, "gradient_norm": norm}
        if self.step_number % config.check_every == 0 or self.step_number == config.steps:
            checked = self._check()
            for name, value in checked.items():
                self._check_finite(f"{name} on the fixed batch", value)
            with phase("check"):
                self._last_good = (self.step_number, weights.z.clone())
            record |= checked
        self.history.append(record)
        return record

    @phase("accumulate")
    def _collect_gradient(self, draw: int, passes: int) -> None:
        """Add the gradient in the arena to the average over the passes of a step, where there are several."""
        if self._gradient_sum is None:
            return
        if draw % passes == 0:
            self._gradient_sum.zero_()
        self._gradient_sum.add_(self.arena.grad, alpha=1 / passes)
        if self._noise_gradient_sum is not None:
            if draw % passes == 0:
                self._noise_gradient_sum.zero_()
            ops.add_noise_gradient_(self._noise_gradient_sum, self.arena.grad, self.config.seed, draw, scale=1 / passes)

    @phase("update")
    def _move(self, draw: int, next_draw: int) -> float:
        """One step of q, which leaves the weights of the next draw in the network; returns the gradient norm."""
        config, weights = self.config, self.weights
        grad = self.arena.grad if self._gradient_sum is None else self._gradient_sum
        clip = 1.0
        if config.max_gradient_norm is not None:
            norm = weights.gradient_norm(grad, self.kl_weight)
            self._check_finite("gradient norm", norm)
            clip = min(1.0, config.max_gradient_norm / max(norm, 1e-30))
        norm = weights.step_(
            self.arena.theta, grad, kl_weight=self.kl_weight, seed=config.seed, draw=draw, next_draw=next_draw,
            noise_grad=self._noise_gradient_sum, scale=self._annealing(), clip=clip,
        )  # fmt: skip
        self._in_network = "mean" if config.family == "mean_only" else next_draw
        return norm

    def _check_finite(self, what: str, value: float) -> None:
        """Go back to the last weights that were measured and found good, and say so, if `value` is not finite."""
        if math.isfinite(value):
            return
        self.step_number = len(self.history)
        # Not to the present ones: they are what the loss is no longer finite at.
        step, z = self._last_good
        self.weights.z.zero_() if z is None else self.weights.z.copy_(z)
        self._in_network = None
        self.write_mean()
        raise InputError(
            f"the {what} became {value} at step {self.step_number + 1}; the weights of step {step}, the last that were "
            "measured and finite, are kept. Lower learning_rate, or bound the forget term with saturation 'hinge'."
        )

    def _annealing(self) -> float:
        """Factor of the learning rate: 1, then falling linearly towards 0 over the last part of the steps."""
        falling = self.config.anneal * self.config.steps
        return min(1.0, (self.config.steps - self.step_number) / falling) if falling > 0 else 1.0

    @phase("loss")  # all of it that is in no other phase
    def _network_gradient(self, draw: int, *, forgetting: bool) -> dict[str, float]:
        """Losses of the terms that pass through the network at the weights in the arena, whose gradient they leave."""
        # Without a bank nothing else would pass through the network.
        ascending = forgetting or self.bank is None
        # A compiled network was checked at the size of both halves.
        whole = ascending or self.denoiser.execution.compile != "off"
        x0, x_t, timesteps, replay_target = self._batch(draw, forget=whole)
        forget = len(x0)
        with phase("data"):
            weight = self._step_weights[timesteps]
        batch = (x0, timesteps[:forget], weight[:forget])
        npo = self.config.saturation == "npo" and ascending
        reference = self._reference_error(draw, x_t[:forget], *batch) if npo else None
        with phase("forward"):
            prediction = self.denoiser.predict(x_t, timesteps, repeated=True)
        self.images_seen += len(x_t)
        terms, measured = [], {}
        if forget:
            error = self._forget_error(prediction[:forget], draw, *batch)
            measured["forget_loss"] = float(error.detach().mean())
            if ascending:
                terms.append(self._ascent(error, batch[1], reference) * (1.0 if forgetting else 0.0))
        if replay_target is not None:
            distance = per_sample_error(prediction[forget:], replay_target, weight[forget:]).mean()
            measured["replay_loss"] = float(distance.detach())
            terms.append(self.config.replay_weight * self.replay_scale * distance)
        loss = sum(terms[1:], terms[0])
        with phase("backward"):
            self.arena.zero_grad()
            loss.backward()
        return {"loss": float(loss.detach()), **measured}

    @phase("loss")
    def _ascent(self, error: Tensor, timesteps: Tensor, reference: Tensor | None) -> Tensor:
        """The term -(1 - gamma) A, from the errors of a forget batch, [B], at its timesteps."""
        config, before = self.config, self.start_curve[timesteps]
        ascent = ascent_loss(
            error,
            config.saturation,
            limit=config.hinge_ratio * before,
            beta=config.npo_beta / before,
            reference=reference,
        )
        return (1 - config.gamma) * self.forget_scale * ascent

    @phase("loss")
    def _forget_error(self, prediction: Tensor, draw: int, x0: Tensor, timesteps: Tensor, weight: Tensor) -> Tensor:
        mixed = self.denoiser.schedule.regenerated_target(x0, timesteps)
        return per_sample_error(
            prediction, mixed.pop("target", None), weight, seed=self.config.seed, draw=draw, **mixed
        )

    @phase("data")
    def _batch(self, draw: int, *, forget: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x_0 of the forget half, x_t and timesteps of both halves, and what the old model predicted of the other.

        Where not to `forget`, the forget half is empty.
        """
        x0, x_t, timesteps = self._forget_batch(draw) if forget else self._no_forget_batch()
        if self._replay_batch is None:
            return x0, x_t, timesteps, None
        # One network call for both halves: at these sizes a call costs more than its samples.
        replay_x_t, replay_timesteps, replay_target = self._replay_batch(draw)
        return x0, torch.cat((x_t, replay_x_t)), torch.cat((timesteps, replay_timesteps)), replay_target

    @phase("data")
    def _forget_batch(self, draw: int) -> tuple[Tensor, Tensor, Tensor]:
        """x_0, x_t and timesteps; the noise in x_t is that of (seed, draw), which the loss draws again."""
        config, device = self.config, self.denoiser.device
        rows = batch_indices(len(self.images), config.batch_size, draw, config.seed)
        x0 = self.images[rows].to(device)
        low, high = self.window
        timesteps = randint(high, len(x0), config.seed, draw, low=low, stream=Stream.TIMESTEPS).to(device)
        return x0, self.denoiser.schedule.mix_noise(x0, timesteps, config.seed, draw), timesteps

    def _no_forget_batch(self) -> tuple[Tensor, Tensor, Tensor]:
        none = self.images[:0].to(self.denoiser.device)
        return none, none, torch.empty(0, dtype=torch.int64, device=none.device)

    @phase("weights")
    def _reference_error(self, draw: int, x_t: Tensor, x0: Tensor, timesteps: Tensor, weight: Tensor) -> Tensor:
        """The errors of the model before unlearning, by putting mu* into the arena for one call."""
        self._in_network = None  # first: whatever fails below, the network no longer holds what it held
        with torch.no_grad():
            self.arena.theta.copy_(self.weights.center)
            with phase("forward"):
                prediction = self.denoiser.predict(x_t, timesteps)
            error = self._forget_error(prediction, draw, x0, timesteps, weight)
        self._put(draw)
        return error

    @phase("check")
    def _check(self) -> dict[str, float]:
        """Measure on the fixed batches and remember the best state."""
        config = self.config
        self.write_mean()
        error = self.forget_probe.error()
        checked = {"forget_ratio": float(error.mean()) / self.start_error}
        bounded = torch.minimum(error, config.hinge_ratio * self.start_curve[self.forget_probe.timesteps]).mean()
        objective = -(1 - config.gamma) * self.forget_scale * float(bounded) + self.kl_weight * self.weights.kl
        if self.replay_probe is not None:
            checked["replay_check"] = float(self.replay_probe.error().mean())
            objective += config.replay_weight * self.replay_scale * checked["replay_check"]
        if self.retained_probe is not None and self.start_retained:
            checked["retained_ratio"] = float(self.retained_probe.error().mean()) / self.start_retained
        checked["objective"] = objective
        if config.rollback and math.isfinite(objective) and (self.best is None or objective < self.best[0]):
            self.best = (objective, self.step_number, self.weights.z.clone())
        return checked

    def stop_reason(self) -> str | None:
        """Why the run is over after the latest step, or None."""
        config, record = self.config, self.history[-1]
        ratio = record.get("forget_ratio")
        if config.target_ratio is not None and ratio is not None and ratio >= config.target_ratio:
            return f"forget loss reached {ratio:.2f} x its start (target_ratio {config.target_ratio})"
        if self.step_number >= config.steps:
            return f"all {config.steps} steps done"
        return None

    @phase("weights")
    def _put(self, draw: int) -> None:
        """Put the weights of a draw into the network, unless they are there."""
        if self.config.family == "mean_only":
            self.write_mean()
        elif self._in_network != draw:
            self.weights.sample_(self.arena.theta, self.config.seed, draw)
            self._in_network = draw

    def write_mean(self) -> None:
        """Put the mean of q into the network, unless it is there."""
        if self._in_network != "mean":
            self.weights.mean_(self.arena.theta)
            self._in_network = "mean"

    def finish(self) -> int:
        """Leave the final (or, with rollback, the best) mean in the network; returns the step it is from."""
        step = self.step_number
        if self.config.rollback and self.best is not None:
            _, step, z = self.best
            self.weights.z.copy_(z)
            self._in_network = None
        self.write_mean()
        self.release()
        return step

    def release(self) -> None:
        """Give the parameters storage of their own again, and the module its mode."""
        self.arena.release()
        if self._replay_batch is not None:
            self._replay_batch.close()
        self.denoiser.module.train(self._training)

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors that restore the run exactly, given the same model, data, bank and config."""
        state = self.weights.state_dict()
        state["step"] = torch.tensor(self.step_number)
        state["history"] = torch.frombuffer(bytearray(json.dumps(self.history).encode()), dtype=torch.uint8)
        step, z = self._last_good
        state["last_good"] = torch.tensor(step)
        if z is not None:
            state["last_good_z"] = z
        if self.best is not None:
            state["best"] = torch.tensor(self.best[:2], dtype=torch.float64)
            state["best_z"] = self.best[2]
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self.weights.load_state_dict(state)
        self._in_network = None
        self.step_number = int(state["step"])
        z = state.get("last_good_z")
        self._last_good = (int(state["last_good"]), None if z is None else z.to(self.weights.z.device, copy=True))
        self.history = json.loads(bytes(state["history"].tolist()))
        if "best" in state:
            objective, step = state["best"].tolist()
            self.best = (objective, int(step), state["best_z"].clone())
