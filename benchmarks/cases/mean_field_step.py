"""The step that also draws the next weights, against _foreach: the fused Adam step, then a draw."""

from __future__ import annotations

from vdu_fast.benchmarks.case import Budget, Case, Setting, question
from vdu_fast.benchmarks.cases import mean_only_step, sample_weights
from vdu_fast.benchmarks.operations import operations_for
from vdu_fast.benchmarks.parameters import State

BUDGETS = {"cpu": Budget(), "cuda": Budget({"_foreach": 3}, bandwidth=0.9)}


@question("mean-field step, natural_adam", group="ops")
def mean_field_step(setting: Setting) -> Case:
    s = State(setting.shapes, setting.device)
    update, draw = mean_only_step.baselines(s)["_foreach + fused Adam"], sample_weights.baselines(s)["_foreach"]
    return Case(
        {"_foreach + fused Adam": lambda: (update(), draw())},
        {"vdu_fast": mean_only_step.step(s, "natural_adam", noise_scale=1.0)},
        s.numel,
        bytes=40 * s.numel,
        operations=operations_for(s.numel, lambda small: mean_only_step.step(small, "natural_adam", 1.0)()),
        budget=BUDGETS[setting.device.type],
    )
