"""Draw weights, theta = mean + exp(log_std) n, against eager torch, _foreach and torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from vdu_fast import ops
from vdu_fast.benchmarks.case import Budget, Calls, Case, Setting, check_close, question
from vdu_fast.benchmarks.operations import operations_for
from vdu_fast.benchmarks.parameters import State

BUDGETS = {
    "cpu": Budget({"eager": 6}),
    "cuda": Budget({"_foreach": 3, "compile": 1.3}, bandwidth=0.9),
}


def ours(s: State) -> object:
    return ops.sample_weights_(s.theta, s.mean, s.log_std, 1, 2)


def baselines(s: State) -> Calls:
    theta_list, mean_list, log_std_list = (s.lists(name) for name in ("theta", "mean", "log_std"))

    def eager() -> None:
        for theta, mean, log_std in zip(theta_list, mean_list, log_std_list, strict=True):
            theta.copy_(mean + log_std.exp() * torch.randn_like(mean))

    def foreach() -> None:
        noise = [torch.randn_like(m) for m in mean_list]
        torch._foreach_mul_(noise, torch._foreach_exp(log_std_list))
        torch._foreach_add_(noise, mean_list)
        torch._foreach_copy_(theta_list, noise)

    @torch.compile
    def compiled(mean: Tensor, log_std: Tensor) -> Tensor:
        return mean + log_std.exp() * torch.randn_like(mean)

    return {"eager": eager, "_foreach": foreach, "compile": lambda: compiled(s.mean, s.log_std)}


@question("sample_weights", group="ops", quick=True)
def sample_weights(setting: Setting) -> Case:
    s = State(setting.shapes, setting.device)
    ours(s)
    noise = ops.standard_normal(s.numel, 1, 2, device=s.device)
    check_close("sample_weights_", s.theta, s.mean + s.log_std.exp() * noise)
    lists = [s.lists(name) for name in ("theta", "mean", "log_std")]
    return Case(
        baselines(s),
        {"vdu_fast": lambda: ours(s), "vdu_fast Tensor[]": lambda: ops.sample_weights_(*lists, 1, 2)},
        s.numel,
        bytes=12 * s.numel,
        operations=operations_for(s.numel, ours),
        budget=BUDGETS[setting.device.type],
    )
