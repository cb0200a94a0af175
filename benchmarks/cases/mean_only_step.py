"""Penalty and update around mu* in one pass, against _foreach or flat eager with torch's fused Adam, and torch.compile.

Theirs move the weights by Adam; ours move whitened coordinates, by the natural gradient and by Adam.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vdu_fast import ops
from vdu_fast.benchmarks.case import Budget, Calls, Case, Setting, check_close, question
from vdu_fast.benchmarks.operations import operations_for
from vdu_fast.benchmarks.parameters import State
from vdu_fast.optim import UpdateRule

KL_WEIGHT = 1e-6
BYTES = {"natural": 24, "natural_adam": 40}  # per parameter, read and written
BUDGETS = {
    "cpu": Budget({"_foreach": 4.5, "flat": 4.5}, bandwidth=0.7),
    "cuda": Budget({"_foreach": 3, "compile": 1.3}, bandwidth=0.9),
}


def step(s: State, rule: str, noise_scale: float = 0.0) -> Callable[[], object]:
    """Our one-pass step; with a noise scale it leaves the next draw in theta, as mean-field learning needs."""
    constants = UpdateRule(rule, 1e-4).constants(1, kl_weight=KL_WEIGHT, noise_scale=noise_scale)  # type: ignore[arg-type]
    moments = {"first": s.first, "second": s.second} if "adam" in rule else {}

    def run() -> object:
        return ops.variational_step_(
            s.theta, s.grad, s.center, s.prior_std, s.z, constants, 1, 2, 3, rule=rule, **moments
        )

    return run


def baselines(s: State) -> Calls:
    parameters = [torch.nn.Parameter(t.clone()) for t in s.lists("theta")]
    center, prior_std = s.lists("center"), s.lists("prior_std")
    precision = [std.square().reciprocal() for std in prior_std]
    for p, g in zip(parameters, s.lists("grad"), strict=True):
        p.grad = g.clone()
    adam = torch.optim.Adam(parameters, lr=1e-5, fused=True)
    one = torch.nn.Parameter(s.theta.clone())
    one.grad = s.grad.clone()
    flat_adam = torch.optim.Adam([one], lr=1e-5, fused=True)
    flat_precision = s.prior_std.square().reciprocal()

    @torch.no_grad()
    def foreach() -> object:
        away = torch._foreach_sub(parameters, center)
        pull = torch._foreach_mul(away, precision)
        penalty = sum(0.5 * (a * p).sum() for a, p in zip(away, pull, strict=True))
        torch._foreach_add_([p.grad for p in parameters], pull, alpha=KL_WEIGHT)
        adam.step()
        return penalty

    @torch.no_grad()
    def flat() -> object:
        away = one - s.center
        pull = away * flat_precision
        penalty = 0.5 * (away * pull).sum()
        assert one.grad is not None
        one.grad.add_(pull, alpha=KL_WEIGHT)
        flat_adam.step()
        return penalty

    return {"_foreach + fused Adam": foreach, "flat + fused Adam": flat, "compile": _compiled(s, flat_precision)}


def _compiled(s: State, precision: Tensor) -> Callable[[], object]:
    @torch.compile
    def body(theta: Tensor, grad: Tensor, center: Tensor, precision: Tensor, first: Tensor, second: Tensor) -> Tensor:
        away = theta - center
        pull = away * precision
        g = grad + KL_WEIGHT * pull
        first.mul_(0.9).add_(g, alpha=0.1)
        second.mul_(0.99).addcmul_(g, g, value=0.01)
        theta.addcdiv_(first, second.sqrt() + 1e-8, value=-1e-5)
        return 0.5 * (away * pull).sum()

    theta, first, second = s.theta.clone(), torch.zeros_like(s.theta), torch.zeros_like(s.theta)
    return lambda: body(theta, s.grad, s.center, precision, first, second)


def _check(s: State, rule: str) -> None:
    """The first step from rest is -lr times the direction, or its sign under Adam."""
    for name in ("z", "first", "second"):
        getattr(s, name).zero_()
    step(s, rule)()
    direction = s.prior_std * s.grad
    expected = -1e-4 * (direction if rule == "natural" else direction.sign())
    sizeable = direction.abs() > 1e-8  # below, the eps of Adam is felt
    check_close(f"variational_step_ {rule}", s.z[sizeable], expected[sizeable], 1e-3)


def _case(setting: Setting, rule: str) -> Case:
    s = State(setting.shapes, setting.device)
    _check(s, rule)
    ours = step(s, rule)
    return Case(
        baselines(s),
        {"vdu_fast": ours},
        s.numel,
        bytes=BYTES[rule] * s.numel,
        operations=operations_for(s.numel, lambda small: step(small, rule)()),
        budget=BUDGETS[setting.device.type],
    )


@question("mean-only step, natural", group="ops", quick=True)
def natural(setting: Setting) -> Case:
    return _case(setting, "natural")


@question("mean-only step, natural_adam", group="ops", quick=True)
def natural_adam(setting: Setting) -> Case:
    return _case(setting, "natural_adam")
