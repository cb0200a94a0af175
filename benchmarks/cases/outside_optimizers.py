"""A whole mean-field step in a user's loop, draw and update, against ivon-opt's."""

from __future__ import annotations

import torch

from vdu_fast.benchmarks.case import Budget, Calls, Case, Setting, question
from vdu_fast.optim import VariationalOptimizer


@question("mean-field step against ivon-opt", group="step", needs=("ivon",))
def against_ivon(setting: Setting) -> Case:
    import ivon

    generator = torch.Generator(setting.device).manual_seed(0)

    def parameters() -> list[torch.nn.Parameter]:
        made = []
        for shape in setting.shapes:
            p = torch.nn.Parameter(torch.randn(shape, generator=generator, device=setting.device) * 0.05)
            p.grad = torch.randn(shape, generator=generator, device=setting.device) * 1e-3
            made.append(p)
        return made

    theirs = ivon.IVON(parameters(), lr=1e-3, ess=1e6)
    mine = VariationalOptimizer(parameters(), 1e-3, lr=1e-3, kl_weight=1e-6, rule="natural_adam")

    def ivon_step() -> None:
        with theirs.sampled_params(train=True):
            pass
        theirs.step()

    def ours(*, restore: bool) -> None:
        with mine.sampled_weights(restore=restore):
            pass
        mine.step()

    both: Calls = {
        "vdu_fast": lambda: ours(restore=False),
        "vdu_fast, mean restored between": lambda: ours(restore=True),
    }
    budget = Budget({"": 20}) if setting.device.type == "cpu" else Budget()
    return Case({"ivon": ivon_step}, both, setting.numel, budget=budget, per_backend=False)
