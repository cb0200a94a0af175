"""How a step grows: with the number of parameters from 10^5 to 10^9, with tensors, and with threads."""

from __future__ import annotations

import torch

from vdu_fast import ops
from vdu_fast.benchmarks.case import Case, Line, Setting, question
from vdu_fast.benchmarks.cases import mean_only_step
from vdu_fast.benchmarks.measure import COPIED, COPY, measure
from vdu_fast.benchmarks.parameters import State, stable_diffusion_shapes
from vdu_fast.benchmarks.tables import lines_of
from vdu_fast.machine import free_memory

# theta and gradient in bfloat16, mu*, sigma* and z in float32, beside the copy that bandwidth is measured by.
BYTES_KEPT, BYTES_MOVED = 16, 20


def _fits(numel: int, device: torch.device) -> bool:
    free = free_memory(device)
    return free is None or 1.1 * BYTES_KEPT * numel + 8 * COPIED < free


def _step_lines(s: State, implementation: str, *, listed: bool) -> list[Line]:
    constants = mean_only_step.UpdateRule("natural", 1e-4).constants(1, kl_weight=1e-6, noise_scale=0.0)
    names = ("theta", "grad", "center", "prior_std", "z")
    tensors = [s.lists(name) if listed else getattr(s, name) for name in names]
    case = Case(
        {}, {"vdu_fast": lambda: ops.variational_step_(*tensors, constants, 1, 2, 3, rule="natural")}, s.numel,
        bytes=BYTES_MOVED * s.numel,
    )  # fmt: skip
    times, failed = measure(case, s.device)
    lines = lines_of(case, times, failed)
    named = [line for line in lines if line["implementation"] != COPY]
    if len(named) > 1:  # a line per backend of a GPU
        return [line | {"implementation": f"{implementation}, {line['implementation']}"} for line in named]
    return [line | {"implementation": implementation} for line in named]


@question("step, natural, bfloat16: 10^5 to 10^9 parameters", group="machine")
def parameters(setting: Setting) -> list[Line]:
    lines: list[Line] = []
    for exponent in range(5, 10):
        numel = 10**exponent
        if not _fits(numel, setting.device):
            lines.append({"implementation": f"10^{exponent} parameters", "note": "left out: memory is short"})
            continue
        s = State([torch.Size([numel])], setting.device, torch.bfloat16)
        lines += _step_lines(s, f"10^{exponent} parameters", listed=False)
    return lines


@question("step, natural, bfloat16: Stable Diffusion 1.5, 860 M", group="machine", needs=("diffusers",))
def stable_diffusion(setting: Setting) -> list[Line]:
    shapes = stable_diffusion_shapes()
    numel = sum(shape.numel() for shape in shapes)
    if not _fits(numel, setting.device):
        return [{"implementation": "vdu_fast", "note": "left out: memory is short"}]
    s = State(shapes, setting.device, torch.bfloat16)
    return _step_lines(s, "one flat arena", listed=False) + _step_lines(s, f"{len(shapes)} tensors", listed=True)


@question("step, natural, by threads", group="machine", devices=("cpu",))
def threads(setting: Setting) -> list[Line]:
    most = torch.get_num_threads()
    s = State(setting.shapes, setting.device)
    counts = sorted({1, *(2**k for k in range(1, 10) if 2**k <= most), most})
    try:
        lines: list[Line] = []
        for count in counts:
            torch.set_num_threads(count)
            lines += _step_lines(s, f"{count} threads" if count > 1 else "1 thread", listed=False)
        return lines
    finally:
        torch.set_num_threads(most)
