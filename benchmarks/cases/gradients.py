"""Draw weights, the KL, and gradients in mean and log_std: what a step of variational learning adds to the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vdu_fast import ops
from vdu_fast.benchmarks.case import Budget, Case, Setting, check_close, question
from vdu_fast.benchmarks.operations import operations_for
from vdu_fast.benchmarks.parameters import State

KL_WEIGHT = 1e-6
ARGUMENTS = ("mean", "log_std", "center", "prior_std", "grad")
BUDGETS = {
    # The goal is 3. Two threads of an EPYC reach 2.87, at 79% of the bandwidth of a copy; below 2.6 something was lost.
    "cpu": Budget({"": 2.6}),
    "cuda": Budget({"_foreach": 3, "compile": 1.3}, bandwidth=0.9),
}


def body(
    n: Tensor, mean: Tensor, log_std: Tensor, center: Tensor, prior_std: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition: theta, KL, dL/dmean and dL/dlog_std, given the noise and the gradient in theta."""
    std = log_std.exp()
    theta = mean + std * n
    scaled, ratio = (mean - center) / prior_std, std / prior_std
    kl = (0.5 * ratio.square() + 0.5 * scaled.square() - ratio.log() - 0.5).sum()
    d_mean = grad + KL_WEIGHT * scaled / prior_std
    return theta, kl, d_mean, grad * n * std + KL_WEIGHT * (ratio.square() - 1)


def foreach(s: State) -> object:
    mean, log_std, center, prior_std, grad = (s.lists(name) for name in ARGUMENTS)
    n = [torch.randn_like(m) for m in mean]
    std = torch._foreach_exp(log_std)
    noise = torch._foreach_mul(std, n)
    theta = torch._foreach_add(mean, noise)
    scaled = torch._foreach_sub(mean, center)
    torch._foreach_div_(scaled, prior_std)
    ratio = torch._foreach_div(std, prior_std)
    log_ratio = torch._foreach_log(ratio)
    torch._foreach_mul_(ratio, ratio)
    pieces = zip(ratio, scaled, log_ratio, strict=True)
    kl = sum(0.5 * r.sum() + 0.5 * q.square().sum() - g.sum() for r, q, g in pieces)
    torch._foreach_div_(scaled, prior_std)
    d_mean = torch._foreach_add(grad, scaled, alpha=KL_WEIGHT)
    torch._foreach_mul_(noise, grad)
    torch._foreach_sub_(ratio, 1)
    torch._foreach_add_(noise, ratio, alpha=KL_WEIGHT)
    return theta, kl, d_mean, noise


def _operands(s: State) -> tuple[Any, ...]:
    return s.grad, s.mean, s.log_std, s.center, s.prior_std, 1, 2


def fresh(s: State) -> tuple[Tensor, Tensor, Tensor]:
    """Ours into new tensors, as all baselines but one do."""
    ops.sample_weights_(s.theta, s.mean, s.log_std, 1, 2)
    return ops.variational_gradients(*_operands(s), kl_weight=KL_WEIGHT)


def given(s: State) -> Tensor:
    """Ours into tensors that are there, as in a training loop: returns the KL."""
    ops.sample_weights_(s.theta, s.mean, s.log_std, 1, 2)
    return ops.variational_gradients_(s.first, s.second, *_operands(s), kl_weight=KL_WEIGHT)


def _compiled_into(s: State) -> Callable[[], object]:
    """torch.compile into tensors that are there, the noise among them."""
    noise, theta, d_mean, d_log_std = (torch.empty_like(s.mean) for _ in range(4))
    arguments = [getattr(s, name) for name in ARGUMENTS]

    @torch.compile
    def into(n: Tensor, theta: Tensor, d_mean: Tensor, d_log_std: Tensor, tensors: list[Tensor]) -> Tensor:
        made = body(n, *tensors)
        theta.copy_(made[0])
        d_mean.copy_(made[2])
        d_log_std.copy_(made[3])
        return made[1]

    return lambda: into(noise.normal_(), theta, d_mean, d_log_std, arguments)


@question("sample + KL + gradients", group="ops", quick=True)
def gradients(setting: Setting) -> Case:
    s = State(setting.shapes, setting.device)
    compiled_body = torch.compile(body)
    arguments = [getattr(s, name) for name in ARGUMENTS]
    lists = [s.lists(name) for name in ARGUMENTS]

    def eager() -> object:
        return [body(torch.randn_like(t[0]), *t) for t in zip(*lists, strict=True)]

    expected = body(ops.standard_normal(s.numel, 1, 2, device=s.device), *arguments)
    names = ("theta", "KL", "d_mean", "d_log_std")
    for results in ((s.theta, given(s), s.first, s.second), (s.theta, *fresh(s))):
        for name, got, want in zip(names, results, expected, strict=True):
            check_close(f"variational_gradients: {name}", got, want)
    del results, expected
    return Case(
        {
            "eager": eager,
            "_foreach": lambda: foreach(s),
            "compile": lambda: compiled_body(torch.randn_like(s.mean), *arguments),
            "compile, given results": _compiled_into(s),
        },
        {"vdu_fast": lambda: given(s), "vdu_fast, fresh results": lambda: fresh(s)},
        s.numel,
        bytes=40 * s.numel,
        operations=operations_for(s.numel, fresh),
        budget=BUDGETS[setting.device.type],
    )
