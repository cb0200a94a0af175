"""The variational distribution over the weights, in whitened coordinates, and the rules that move it.

With z = (mu - mu*) / sigma*, the KL to the posterior N(mu*, sigma*^2) is ||z||^2 / 2 when q keeps sigma*, the
gradient in z is sigma* times that in mu, and plain SGD on z is the natural-gradient step on mu with metric
1 / sigma*^2. One parametrisation therefore carries every optimizer:

    theta = mu* + sigma* z + sigma n,      n ~ N(0, 1) regenerated from (seed, draw), never stored

`VariationalWeights` is what the unlearner uses, over one flat vector; `VariationalOptimizer` is the same as a
torch.optim.Optimizer, over the parameters of any training loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from vdu_fast import ops
from vdu_fast.errors import InputError
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.reference import RULES, StepConstants

Family = Literal["mean_only", "mean_field"]
OptimizerName = Literal["natural", "natural_sign", "natural_adam", "adam"]


@dataclass
class UpdateRule:
    """How a gradient becomes a step.

    Args:
        name: "natural" z -= lr m(grad_z); "natural_sign" z -= lr sign(m(grad_z)); "natural_adam" Adam on z;
            "adam" Adam on mu itself, which ignores the posterior's metric.
        learning_rate: in units of sigma* for the natural rules, of the weights for "adam".
        momentum: of "natural" and "natural_sign"; 0 keeps no buffer.
        betas, eps: of the Adam rules.
    """

    name: OptimizerName = "natural_adam"
    learning_rate: float = 0.02
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-12

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the running averages that the rule keeps per weight."""
        if self.name in ("natural_adam", "adam"):
            return ("first", "second")
        return ("first",) if self.momentum > 0 else ()

    def constants(
        self,
        count: int,
        *,
        kl_weight: float,
        noise_scale: float = 0.0,
        std_learning_rate: float = 0.0,
        scale: float = 1.0,
        clip: float = 1.0,
    ) -> StepConstants:
        """The scalars of step number `count` = 1, 2, ..., at `scale` times the learning rates."""
        beta1, beta2 = self.betas
        return StepConstants(
            learning_rate=scale * self.learning_rate,
            std_learning_rate=scale * std_learning_rate,
            momentum=self.momentum,
            beta1=beta1,
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            eps=self.eps,
            bias_correction=math.sqrt(1 - beta2**count) / (1 - beta1**count),
            kl_weight=kl_weight,
            gradient_scale=1.0,
            clip=clip,
            noise_scale=noise_scale,
        )


class VariationalWeights:
    """q(theta) = N(mu* + sigma* z, sigma^2) over a flat vector of d weights.

    Args:
        center: mu*, float [d].
        prior_std: sigma*, float [d].
        rule: how z moves.
        family: "mean_only" evaluates the network at the mean (sigma plays no part); "mean_field" at a sample.
        learn_std: under "mean_field", whether log sigma moves too. It starts at log sigma*.
        std_learning_rate: of log sigma, which always moves by Adam.

    Attributes:
        state: what `step_` moves, float [d] each: z, and by rule and family first, second, log_std, std_first,
            std_second.
        count: steps taken.
        kl: KL(q || N(mu*, sigma*^2)) as it is now.
    """

    def __init__(
        self,
        center: Tensor,
        prior_std: Tensor,
        rule: UpdateRule,
        *,
        family: Family = "mean_only",
        learn_std: bool = False,
        std_learning_rate: float = 1e-3,
    ) -> None:
        if learn_std and family != "mean_field":
            raise InputError("learn_std needs family='mean_field': a mean-only q has a fixed standard deviation.")
        self.center, self.prior_std, self.rule, self.family = center, prior_std, rule, family
        self.std_learning_rate = std_learning_rate
        self.state = {name: torch.zeros_like(center) for name in ("z", *rule.moments)}
        if learn_std:
            self.state |= {"log_std": prior_std.log()}
            self.state |= {name: torch.zeros_like(center) for name in ("std_first", "std_second")}
        self.count = 0
        self.kl = 0.0

    @property
    def z(self) -> Tensor:
        return self.state["z"]

    @property
    def log_std(self) -> Tensor | None:
        """log sigma, float [d], where it is learned."""
        return self.state.get("log_std")

    @property
    def mean(self) -> Tensor:
        """mu, a new tensor [d]; `mean_` writes it where it is wanted."""
        out = torch.empty_like(self.center)
        self.mean_(out)
        return out

    @property
    def noise_scale(self) -> float:
        return 0.0 if self.family == "mean_only" else 1.0

    def mean_(self, out: Tensor) -> None:
        """Write mu into `out`, [d] of any float dtype."""
        ops.sample_whitened_weights_(out, self.center, self.prior_std, self.z, 0, noise_scale=0.0)

    def sample_(self, out: Tensor, seed: int, draw: int) -> None:
        """Write the weights that draw number `draw` evaluates the network at: mu, or a sample of q."""
        ops.sample_whitened_weights_(
            out, self.center, self.prior_std, self.z, seed, draw, log_std=self.log_std, noise_scale=self.noise_scale
        )

    def _constants(self, kl_weight: float, scale: float = 1.0, clip: float = 1.0) -> StepConstants:
        options = {"noise_scale": self.noise_scale, "std_learning_rate": self.std_learning_rate}
        return self.rule.constants(self.count + 1, kl_weight=kl_weight, scale=scale, clip=clip, **options)

    def gradient_norm(self, grad: Tensor, kl_weight: float) -> float:
        """Norm of the gradient in the coordinates that the rule moves: mu for "adam", z for the others."""
        constants = self._constants(kl_weight)
        squared = ops.variational_gradient_norm(grad, self.z, self.prior_std, constants, rule=self.rule.name)
        return math.sqrt(float(squared)) if squared.isfinite() else math.nan

    def step_(
        self,
        theta: Tensor,
        grad: Tensor,
        *,
        kl_weight: float,
        seed: int = 0,
        draw: int = 0,
        next_draw: int = 0,
        noise_grad: Tensor | None = None,
        scale: float = 1.0,
        clip: float = 1.0,
    ) -> float:
        """Move q by one step and write the weights of draw `next_draw` into theta, in one pass.

        Args:
            theta: written, [d] of any float dtype.
            grad: dL/dtheta at the weights of draw `draw`, [d] of any float dtype.
            kl_weight: multiplies the KL in the objective.
            noise_grad: see `ops.variational_step_`.
            scale: factor of the learning rates.
            clip: factor of the gradient of z.

        Returns:
            Norm of the gradient, as `gradient_norm` gives it.
        """
        moments: dict[str, Any] = {name: tensor for name, tensor in self.state.items() if name != "z"}
        sums = ops.variational_step_(
            theta, grad, self.center, self.prior_std, self.z, self._constants(kl_weight, scale, clip),
            seed, draw, next_draw, rule=self.rule.name, noise_grad=noise_grad,
            **moments,
        )  # fmt: skip
        self.count += 1
        self.kl, squared = sums.tolist()
        return math.sqrt(squared) if math.isfinite(squared) else math.nan

    def state_dict(self) -> dict[str, Tensor]:
        """What changes during unlearning, as flat tensors; mu* and sigma* come from model and posterior."""
        return {**self.state, "count": torch.tensor(self.count), "kl": torch.tensor(self.kl, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
        self.count, self.kl = int(state["count"]), float(state["kl"])


class VariationalOptimizer(torch.optim.Optimizer):
    """Variational learning in any training loop: q(theta) = N(mu, sigma^2) around weights whose posterior is known.

        optimizer = VariationalOptimizer(model.named_parameters(), posterior, lr=0.02, kl_weight=1e-6)
        for batch in data:
            with optimizer.sampled_weights():          # the network is evaluated at a draw of q
                loss(model, batch).backward()
            optimizer.step()                           # mu moves, and is what the parameters hold again
            optimizer.zero_grad()

    Where step() follows at once, `sampled_weights(restore=False)` leaves it to step() to write mu back: a pass less.

    The objective is the loss plus kl_weight KL(q || N(mu*, sigma*^2)), mu* being the weights at construction. No noise
    and no copy of the weights is stored; the same seed gives the same run, whatever the device.

    Args:
        params: as for any torch optimizer; named parameters where `posterior` is a GaussianPosterior.
        posterior: standard deviations by parameter name, or one number for all.
        lr: in units of sigma* for the natural rules, of the weights for "adam".
        rule: "natural", "natural_sign", "natural_adam" or "adam"; see `UpdateRule`.
        kl_weight: multiplies the KL: 1 / N for a loss that is the mean over N examples.
        noise_scale: sigma / sigma* at the start; 0 evaluates at the mean, and `sampled_weights` does nothing.
        learn_std: whether log sigma moves too, by Adam at `std_lr`.
        momentum, betas, eps: of the rule.
        seed: of the draws.

    All but `posterior` may differ between parameter groups. Closures, learning-rate schedulers and
    GradScaler work as with torch's own optimizers. Gradients of several draws may be collected before one `step`,
    unless `learn_std`.
    """

    _inside = False  # whether the parameters hold a draw, in a with block
    _draw_left = False  # and after one

    def __init__(
        self,
        params: Iterable[Any],
        posterior: GaussianPosterior | float,
        *,
        lr: float = 0.02,
        rule: OptimizerName = "natural_adam",
        kl_weight: float = 0.0,
        noise_scale: float = 1.0,
        learn_std: bool = False,
        std_lr: float = 1e-3,
        momentum: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-12,
        seed: int = 0,
    ) -> None:
        if isinstance(posterior, int | float) and not (math.isfinite(posterior) and posterior > 0):
            raise InputError(f"posterior must be a GaussianPosterior or a positive number, got {posterior}.")
        self.posterior = posterior
        defaults = {
            "lr": lr, "rule": rule, "kl_weight": kl_weight, "noise_scale": noise_scale, "learn_std": learn_std,
            "std_lr": std_lr, "momentum": momentum, "betas": betas, "eps": eps,
            "seed": seed, "steps": 0, "draws": 0, "pending": 0,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._begin_group(group)
        except InputError:
            self.param_groups.pop()
            for parameter in group["params"]:
                self.state.pop(parameter, None)
            raise

    def _begin_group(self, group: dict[str, Any]) -> None:
        _check_group(group)
        # Where the group's parameters lie in the numbering of the noise: after those of the earlier groups.
        group["offset"] = sum(p.numel() for g in self.param_groups[:-1] for p in g["params"])
        for number, parameter in enumerate(group["params"]):
            self.state[parameter] = self._initial_state(group, number, parameter)

    def _initial_state(self, group: dict[str, Any], number: int, parameter: Tensor) -> dict[str, Tensor]:
        if not parameter.is_contiguous():
            raise InputError("parameters must be contiguous; replace the data of this one by data.contiguous().")
        center = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
        state = {"center": center, "prior_std": self._prior_std(group, number, center), "z": torch.zeros_like(center)}
        state |= {name: torch.zeros_like(center) for name in self._rule(group).moments}
        if group["learn_std"]:
            state["log_std"] = (group["noise_scale"] * state["prior_std"]).log()
            state |= {name: torch.zeros_like(center) for name in ("std_first", "std_second")}
        return state

    def _prior_std(self, group: dict[str, Any], number: int, center: Tensor) -> Tensor:
        if not isinstance(self.posterior, GaussianPosterior):
            return torch.full_like(center, self.posterior)
        if "param_names" not in group:
            raise InputError(
                "params must be named for a GaussianPosterior: pass model.named_parameters(), or a number as posterior."
            )
        name = group["param_names"][number]
        self.posterior.check_fits({name: center})
        return self.posterior.std[name].to(center, copy=True).contiguous()

    @staticmethod
    def _rule(group: dict[str, Any]) -> UpdateRule:
        return UpdateRule(group["rule"], float(group["lr"]), group["momentum"], tuple(group["betas"]), group["eps"])

    @contextmanager
    def sampled_weights(self, *, restore: bool = True) -> Iterator[None]:
        """The parameters hold a draw of q inside, and its mean again after; gradients inside are those of `step`.

        Args:
            restore: False leaves the draw in the parameters for `step` to replace by the mean, which saves a pass over
                the weights. Whatever reads them before (an evaluation, a checkpoint) sees the draw. A step that was
                skipped ends with `zero_grad` or the next draw, an error inside with the mean as ever.

        Raises:
            InputError: a second draw before `step` under learn_std, whose gradient needs each draw's noise.
        """
        for group in self.param_groups:
            if group["learn_std"] and group["pending"]:
                raise InputError("under learn_std call step() after every sampled_weights(): one draw per step.")
        if self._inside:
            raise InputError(
                "sampled_weights() cannot be nested: the inner block would end with the mean in the model."
            )
        self._write(noisy=True)
        self._inside, self._draw_left = True, False
        leave = False
        try:
            yield
            leave = not restore
        finally:
            self._inside = False
            for group in self.param_groups:
                group["draws"] += 1
                group["pending"] += 1
            self._draw_left = leave
            if not leave:
                self._write(noisy=False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and the draws that they were taken at: a step that GradScaler skipped ends here."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            group["pending"] = 0
        if self._draw_left:
            self._write(noisy=False)
            self._draw_left = False

    def _write(self, *, noisy: bool) -> None:
        for group in self.param_groups:
            self._write_run(group, group["offset"], group["params"], noisy=noisy)

    def _write_run(self, group: dict[str, Any], offset: int, params: list[Tensor], *, noisy: bool) -> None:
        if group["noise_scale"] == 0:
            return  # the parameters hold the mean all the time
        states = [self.state[p] for p in params]
        ops.sample_whitened_weights_(
            params,
            _each(states, "center"),
            _each(states, "prior_std"),
            _each(states, "z"),
            group["seed"],
            group["draws"],
            log_std=_each(states, "log_std") if group["learn_std"] else None,
            noise_scale=group["noise_scale"] if noisy else 0.0,
            offset=offset,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move q along the gradients and write its mean into the parameters; those without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._inside:
            raise InputError("step() was called inside sampled_weights(); call it after the with block.")
        if any(group["learn_std"] and group["pending"] != 1 for group in self.param_groups):
            raise InputError("under learn_std take the gradient in sampled_weights(), one draw per step().")
        for group in self.param_groups:
            group["steps"] += 1
            group["pending"] = 0
            rule = self._rule(group)
            # Noise scale 0: what is written is the mean.
            constants = rule.constants(
                group["steps"], kl_weight=group["kl_weight"], std_learning_rate=group["std_lr"], noise_scale=0.0
            )
            for offset, params, moved in _runs(group):
                if moved:
                    self._step_run(group, constants, offset, params)
                elif self._draw_left:
                    self._write_run(group, offset, params, noisy=False)
        self._draw_left = False
        return loss

    def _step_run(self, group: dict[str, Any], constants: StepConstants, offset: int, params: list[Tensor]) -> None:
        states = [self.state[p] for p in params]
        moments: dict[str, Any] = {
            name: _each(states, name)
            for name in ("first", "second", "log_std", "std_first", "std_second")
            if name in states[0]
        }
        ops.variational_step_(
            params,
            [p.grad.contiguous() for p in params if p.grad is not None],
            _each(states, "center"),
            _each(states, "prior_std"),
            _each(states, "z"),
            constants,
            group["seed"],
            group["draws"] - 1,
            rule=group["rule"],
            offset=offset,
            **moments,
        )

    def kl(self) -> float:
        """KL(q || N(mu*, sigma*^2)) over all parameters; ||z||^2 / 2 where sigma = sigma*."""
        total = 0.0
        for group in self.param_groups:
            for parameter in group["params"]:
                s = self.state[parameter]
                if group["learn_std"]:
                    mean = s["center"] + s["prior_std"] * s["z"]
                    total += float(ops.gaussian_kl(mean, s["log_std"], s["center"], s["prior_std"]))
                else:
                    total += 0.5 * float(s["z"].double().square().sum())
        return total

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        # torch converts the state to the dtype of the parameter, which would round the float32 state of a bfloat16 one.
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        for key, parameter in zip(saved, mine, strict=True):
            for name, value in state_dict["state"][key].items():
                self.state[parameter][name] = value.to(parameter.device, copy=True)


def _check_group(group: dict[str, Any]) -> None:
    """InputError where a setting of a group or its parameters cannot work."""
    if group["rule"] not in RULES:
        raise InputError(f"rule must be one of {', '.join(RULES)}, got {group['rule']!r}.")
    for name in ("lr", "kl_weight", "noise_scale", "std_lr", "eps"):
        if not (math.isfinite(group[name]) and group[name] >= 0):
            raise InputError(f"{name} must be 0 or a positive number, got {group[name]}.")
    for name, value in (("momentum", group["momentum"]), *(("betas", beta) for beta in group["betas"])):
        if not 0 <= value < 1:
            raise InputError(f"{name} must be in [0, 1), got {value}.")
    if group["learn_std"] and group["noise_scale"] == 0:
        raise InputError("learn_std needs noise_scale above 0: at the mean, the loss says nothing about sigma.")
    kinds = {(str(p.device), str(p.dtype)) for p in group["params"]}
    if len(kinds) > 1:
        raise InputError(
            f"the parameters of a group must share one device and dtype, got {sorted(kinds)}; make groups."
        )


def _each(states: list[dict[str, Tensor]], name: str) -> list[Tensor]:
    return [state[name] for state in states]


def _runs(group: dict[str, Any]) -> Iterator[tuple[int, list[Tensor], bool]]:
    """Stretches of neighbours that all have a gradient, or all have none: place in the noise's numbering, which."""
    place = group["offset"]
    for moved, neighbours in groupby(group["params"], key=lambda parameter: parameter.grad is not None):
        run = list(neighbours)
        yield place, run, moved
        place += sum(parameter.numel() for parameter in run)
