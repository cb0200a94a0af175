"""Standard normals of (seed, draw) into memory that is there, against torch's own."""

from __future__ import annotations

import torch

from vdu_fast import rng
from vdu_fast.benchmarks.case import Case, Setting, check_close, question
from vdu_fast.benchmarks.parameters import State

SEED, DRAW = torch.tensor(1), torch.tensor(2)


@question("standard_normal", group="ops", quick=True)
def standard_normal(setting: Setting) -> Case:
    s = State(setting.shapes, setting.device)

    def ours() -> None:
        torch.ops.vdu_fast.standard_normal_(s.theta, SEED, DRAW)

    ours()
    expected = rng.standard_normal((min(s.numel, 4096),), 1, 2)
    check_close("standard_normal_", s.theta[: len(expected)].cpu(), expected)
    return Case({"torch normal_": s.theta.normal_}, {"vdu_fast": ours}, s.numel, unit="normal", bytes=4 * s.numel)
