"""The variational distribution over the weights, in whitened coordinates, and the rules that move it.

With z = (mu - mu*) / sigma*, the KL to the posterior N(mu*, sigma*^2) is ||z||^2 / 2 when q keeps sigma*, the
gradient in z is sigma* times that in mu, and plain SGD on z is the natural-gradient step on mu with metric
1 / sigma*^2. One parametrisation therefore carries every optimizer:

    theta = mu* + sigma* z + sigma n,      n ~ N(0, 1) regenerated from (seed, step), never stored
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vdu_fast import ops
from vdu_fast.errors import InputError
from vdu_fast.rng import Stream

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


class Moments:
    """The running averages of one update rule over one flat vector; created when first needed."""

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule
        self.count = 0
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def direction(self, grad: Tensor) -> Tensor:
        """The step for gradient `grad` at learning rate 1, before the sign."""
        rule = self.rule
        self.count += 1
        if rule.name in ("natural_adam", "adam"):
            return self._adam(grad)
        if rule.momentum > 0:
            self.first = torch.zeros_like(grad) if self.first is None else self.first
            grad = self.first.mul_(rule.momentum).add_(grad)
        return grad.sign() if rule.name == "natural_sign" else grad

    def _adam(self, grad: Tensor) -> Tensor:
        beta1, beta2 = self.rule.betas
        if self.first is None or self.second is None:
            self.first, self.second = torch.zeros_like(grad), torch.zeros_like(grad)
        self.first.lerp_(grad, 1 - beta1)
        self.second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = math.sqrt(1 - beta2**self.count) / (1 - beta1**self.count)
        return scale * self.first / (self.second.sqrt() + self.rule.eps)

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        state = {f"{prefix}.count": torch.tensor(self.count)}
        for name in ("first", "second"):
            if (tensor := getattr(self, name)) is not None:
                state[f"{prefix}.{name}"] = tensor
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], prefix: str, device: torch.device) -> None:
        self.count = int(state[f"{prefix}.count"])
        for name in ("first", "second"):
            tensor = state.get(f"{prefix}.{name}")
            setattr(self, name, None if tensor is None else tensor.to(device, copy=True))


class VariationalWeights:
    """q(theta) = N(mu* + sigma* z, sigma^2) over a flat vector of d weights.

    Args:
        center: mu*, float [d].
        prior_std: sigma*, float [d].
        rule: how z moves.
        family: "mean_only" evaluates the network at the mean (sigma plays no part); "mean_field" at a sample.
        learn_std: under "mean_field", whether log sigma moves too. It starts at log sigma*.
        std_learning_rate: of log sigma, which always moves by Adam.
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
        self.z = torch.zeros_like(center)
        self.moments = Moments(rule)
        self.log_std = prior_std.log() if learn_std else None
        std_rule = UpdateRule("adam", std_learning_rate, betas=rule.betas, eps=rule.eps)
        self.std_moments = Moments(std_rule) if learn_std else None

    @property
    def mean(self) -> Tensor:
        """mu, float [d]."""
        return self.center + self.prior_std * self.z

    def sample(self, seed: int, draw: int) -> Tensor:
        """The weights that draw number `draw` evaluates the network at: mu, or a sample of q."""
        if self.family == "mean_only":
            return self.mean
        log_std = self.prior_std.log() if self.log_std is None else self.log_std
        return ops.sample_weights(self.mean, log_std, seed, draw)

    def kl(self) -> Tensor:
        """KL(q || N(mu*, sigma*^2)), a scalar: ||z||^2 / 2 unless sigma is learned."""
        if self.log_std is None:
            return 0.5 * self.z.square().sum()
        return ops.gaussian_kl(self.mean, self.log_std, self.center, self.prior_std)

    def whitened_gradient(self, grad: Tensor, kl_weight: float) -> Tensor:
        """dL/dz from dL_network/dtheta `grad`: the chain rule plus the gradient of kl_weight * KL."""
        return self.prior_std * grad + kl_weight * self.z

    def std_gradient(self, grad: Tensor, kl_weight: float, seed: int, draw: int) -> Tensor:
        """dL/dlog_std from the gradient at the sample of draw `draw`, whose noise is regenerated."""
        assert self.log_std is not None
        n = ops.standard_normal(grad.shape, seed, draw, stream=Stream.WEIGHTS, device=grad.device)
        std = self.log_std.exp()
        return grad * n * std + kl_weight * ((std / self.prior_std).square() - 1)

    def gradient_norm(self, grad_z: Tensor) -> float:
        """Norm of the gradient in the coordinates that the update rule moves: mu for "adam", z for the others."""
        return float((grad_z / self.prior_std if self.rule.name == "adam" else grad_z).norm())

    def step(self, grad_z: Tensor, grad_log_std: Tensor | None = None, *, scale: float = 1.0) -> None:
        """Move z (and log sigma) at `scale` times the rate of the rule, given dL/dz and dL/dlog_std, float [d]."""
        lr = scale * self.rule.learning_rate
        if self.rule.name == "adam":
            self.z.sub_(self.moments.direction(grad_z / self.prior_std) / self.prior_std, alpha=lr)
        else:
            self.z.sub_(self.moments.direction(grad_z), alpha=lr)
        if self.log_std is not None and grad_log_std is not None:
            assert self.std_moments is not None
            std_lr = scale * self.std_moments.rule.learning_rate
            self.log_std.sub_(self.std_moments.direction(grad_log_std), alpha=std_lr)

    def state_dict(self) -> dict[str, Tensor]:
        """What changes during unlearning, as flat tensors; mu* and sigma* come from model and posterior."""
        state = {"z": self.z, **self.moments.state_dict("moments")}
        if self.log_std is not None and self.std_moments is not None:
            state |= {"log_std": self.log_std, **self.std_moments.state_dict("std_moments")}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        device = self.center.device  # a state read from a file lies on the CPU
        self.z = state["z"].to(device, copy=True)
        self.moments.load_state_dict(state, "moments", device)
        if self.std_moments is not None:
            self.log_std = state["log_std"].to(device, copy=True)
            self.std_moments.load_state_dict(state, "std_moments", device)
