"""The forward process of a diffusion model: how x_t is made, what the network predicts, how its error is weighted."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vdu_fast import ops
from vdu_fast.errors import InputError

PredictionType = Literal["epsilon", "v_prediction", "sample", "velocity"]
TimestepWeighting = Literal["simple", "elbo"]


class NoiseSchedule:
    """x_t = signal[t] x_0 + noise[t] eps, for t = 0 .. T-1.

    For DDPM-like schedulers signal = sqrt(alphas_cumprod) and noise = sqrt(1 - alphas_cumprod); for flow matching
    signal = 1 - sigma and noise = sigma. Coefficients are kept in float64 and applied in the dtype of the images.

    Attributes:
        signal, noise: float64 [T].
        alphas_cumprod: float64 [T], or None for flow matching.
        prediction_type: what the network predicts: "epsilon" eps, "sample" x_0, "v_prediction" signal eps - noise x_0,
            "velocity" eps - x_0 (flow matching).
    """

    def __init__(
        self, signal: Tensor, noise: Tensor, prediction_type: PredictionType, alphas_cumprod: Tensor | None = None
    ) -> None:
        if prediction_type not in get_args(PredictionType):
            raise InputError(
                f"prediction_type {prediction_type!r} is unknown; accepted: {', '.join(get_args(PredictionType))}."
            )
        if prediction_type == "velocity" and alphas_cumprod is not None:
            raise InputError("prediction_type 'velocity' is flow matching, which has no alphas_cumprod; leave it out.")
        self.signal = signal.double().cpu()
        self.noise = noise.double().cpu()
        self.alphas_cumprod = alphas_cumprod
        self.prediction_type = prediction_type

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor, prediction_type: PredictionType = "epsilon") -> NoiseSchedule:
        """The schedule of a DDPM with the given alphas_cumprod [T]."""
        alphas_cumprod = alphas_cumprod.double().cpu()
        return cls(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), prediction_type, alphas_cumprod)

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """The training-time schedule of a diffusers scheduler.

        Raises:
            InputError: the scheduler has neither `alphas_cumprod` nor is it FlowMatchEulerDiscreteScheduler.
        """
        if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
            steps = scheduler.config.num_train_timesteps
            sigma = torch.arange(1, steps + 1, dtype=torch.float64) / steps
            return cls(1 - sigma, sigma, "velocity")
        if hasattr(scheduler, "alphas_cumprod"):
            return cls.from_alphas_cumprod(scheduler.alphas_cumprod, scheduler.config.prediction_type)
        raise InputError(
            f"scheduler {type(scheduler).__name__} is not supported: a scheduler with alphas_cumprod (DDPM, DDIM, DPM "
            "Solver, ...) or FlowMatchEulerDiscreteScheduler is needed."
        )

    def __len__(self) -> int:
        return len(self.signal)

    def _at(self, timesteps: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """signal[t] and noise[t], float64 [B]."""
        index = timesteps.cpu()
        return self.signal[index].to(device), self.noise[index].to(device)

    def coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """signal[t] and noise[t], shaped to broadcast over `like` [B, ...]."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        signal, noise = (c.to(like.dtype).reshape(shape) for c in self._at(timesteps, like.device))
        return signal, noise

    def add_noise(self, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """x_t [B, ...] from x_0 [B, ...], eps of the same shape and timesteps int64 [B]."""
        signal, noise = self.coefficients(timesteps, x0)
        return signal * x0 + noise * eps

    def mix_noise(self, x0: Tensor, timesteps: Tensor, seed: int, step: int) -> Tensor:
        """x_t [B, ...] with the noise that `ops.noise_prediction_loss` draws again from (seed, step)."""
        return ops.mix_noise(x0, *self._at(timesteps, x0.device), seed, step)

    def regenerated_target(self, x0: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        """`target` as the arguments of `ops.noise_prediction_loss`, which draws eps again instead of being given it."""
        if self.prediction_type == "epsilon":
            return {}
        if self.prediction_type == "sample":
            return {"target": x0}
        if self.prediction_type == "velocity":
            ones = torch.ones(len(x0), dtype=torch.float64, device=x0.device)
            return {"target": x0, "signal": -ones, "noise": ones}
        signal, noise = self._at(timesteps, x0.device)
        return {"target": x0, "signal": -noise, "noise": signal}

    def target(self, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict for (x_0, eps, timesteps)."""
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "sample":
            return x0
        if self.prediction_type == "velocity":
            return eps - x0
        signal, noise = self.coefficients(timesteps, x0)
        return signal * eps - noise * x0

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """What the network is called with for index `timesteps`: diffusers passes sigma * T under flow matching."""
        return timesteps + 1 if self.prediction_type == "velocity" else timesteps

    def timestep_weights(self, weighting: TimestepWeighting) -> Tensor:
        """C_t for the squared error of the network's own prediction type, float64 [T].

        "simple" is 1. "elbo" is the weight of the variational bound with sigma_t^2 = beta_t (Ho et al. 2020, eq. 12),

            C_t = (1 - alpha_t)^2 / (2 sigma_t^2 alpha_t (1 - alphas_cumprod_t)) = beta_t / (2 alpha_t (1 - abar_t)),

        for an error in eps, rescaled for the other prediction types, whose error is a multiple of that in eps.

        Raises:
            InputError: "elbo" with flow matching, which has no such bound, or where the bound is infinite.
        """
        if weighting == "simple":
            return torch.ones_like(self.signal)
        if weighting != "elbo":
            raise InputError(
                f"weighting {weighting!r} is not known; accepted: {', '.join(get_args(TimestepWeighting))}."
            )
        if self.alphas_cumprod is None:
            raise InputError("weighting 'elbo' is not defined for flow matching; use weighting 'simple'.")
        previous = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])
        alpha = self.alphas_cumprod / previous
        weights = (1 - alpha) / (2 * alpha * (1 - self.alphas_cumprod))
        if self.prediction_type == "sample":
            weights = weights * self.alphas_cumprod / (1 - self.alphas_cumprod)
        elif self.prediction_type == "v_prediction":
            weights = weights * self.alphas_cumprod
        if not weights.isfinite().all():
            worst = int((~weights.isfinite()).nonzero()[0])
            raise InputError(
                f"weighting 'elbo' is infinite at timestep {worst}, where this schedule has no signal left (zero "
                "terminal signal-to-noise) or no noise yet; use weighting 'simple'."
            )
        return weights
