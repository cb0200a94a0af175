"""Where the time and the memory of unlearning go, on the user's own model, data and settings."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vdu_fast import _native
from vdu_fast.checkpoint import save_tensors
from vdu_fast.config import UnlearnConfig
from vdu_fast.data import ImageSet
from vdu_fast.errors import InputError
from vdu_fast.job import Observers, check_inputs
from vdu_fast.machine import METERED, AcceleratorMeter, cores, device_name, has_bfloat16
from vdu_fast.phases import PhaseCost, PhaseRecorder
from vdu_fast.pipelines import denoiser_of
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.profiling.measuring import (
    STEP,
    Report,
    alternating_steps,
    highest,
    probe,
    recorded_step,
    repairing_step,
    samples_of,
    timed,
)
from vdu_fast.profiling.record import PhaseRow, Profile, RunPart, duration
from vdu_fast.profiling.replay_costs import ReplayCosts
from vdu_fast.profiling.tracing import chrome_trace, memory_of_phases
from vdu_fast.replay import ReplayBank
from vdu_fast.request_bank import check_replay
from vdu_fast.unlearning_run import UnlearningRun

# Of the phases, as they follow one another in a step.
ORDER = ("data", "weights", "forward", "loss", "backward", "accumulate", "update", "check", STEP)
QUARTILES = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
# How often the check is measured.
CHECKS = 3
FROM_TRACE = "torch.profiler's records of the CPU's tensor allocations; scratch space of libraries is not in them"
FROM_NOTHING = "not known on this kind of device"
FROM_DEVICE = "the device allocator's peak, torch.accelerator.max_memory_allocated"


def profile(
    model: Any,
    forget_images: Tensor | ImageSet,
    *,
    posterior: GaussianPosterior | str | Path,
    config: UnlearnConfig | None = None,
    scheduler: Any = None,
    bank: ReplayBank | str | Path | None = None,
    classifier: nn.Module | None = None,
    forget_label: int | None = None,
    steps: int = 20,
    warmup: int = 5,
    scratch: Path | str | None = None,
    progress: Report | None = None,
) -> Profile:
    """Take a few steps of unlearning on a copy of the model, and measure where the time and the memory go.

    What was measured by steps is exact for these steps; the whole run is extrapolated from them, and a bank that is not
    there yet from a small one. Not in it: loading the model, compiling it, and writing the new pipeline.

    Args:
        model: as for `unlearn`; left as it is, bit for bit.
        forget_images, posterior, config, scheduler, classifier, forget_label: as for `unlearn`.
        bank: as for `unlearn`, but none is written.
        steps: measured steps; each is taken twice, recorded and not.
        warmup: steps before these, of which nothing is kept.
        scratch: a folder on the disk that the run would save to; None takes the system's temporary one.
        progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        InputError: what `unlearn` refuses, or a number of steps that measures nothing.
    """
    if steps < 1:
        raise InputError(f"steps (--profile_steps) must be at least 1, got {steps}.")
    if warmup < 0:
        raise InputError(f"warmup (--profile_warmup) must be at least 0, got {warmup}.")
    config = config or UnlearnConfig()
    job = check_inputs(_copied(model), forget_images, posterior, config, scheduler, Observers())
    report = progress or (lambda stage, done, total: None)
    replay = None
    if config.replay_weight > 0:
        check_replay(job, bank, classifier, forget_label)
        replay = ReplayCosts(job, bank, classifier, forget_label, report)
    device, used = job.denoiser.device, replay.bank if replay is not None else None
    run, seconds = timed(
        device, lambda: UnlearningRun(job.denoiser, job.images, job.posterior, used, _for_measuring(config))
    )
    start = RunPart("start", seconds, False, "measured")
    try:
        return _measure(run, replay, start, config, steps=steps, warmup=warmup, scratch=scratch, report=report)
    finally:
        run.release()


def _measure(
    run: UnlearningRun,
    replay: ReplayCosts | None,
    start: RunPart,
    config: UnlearnConfig,
    *,
    steps: int,
    warmup: int,
    scratch: Path | str | None,
    report: Report,
) -> Profile:
    """Everything that a run tells; `config` is the user's, not the run's own."""
    device = run.denoiser.device
    for done in range(warmup):
        run.step()
        report("warming up", done + 1, warmup)
    recorder = PhaseRecorder(device, meter=AcceleratorMeter(device) if device.type in METERED else None)
    trace = chrome_trace(lambda: (recorded_step(run, recorder), recorded_step(run, recorder, check=True)))
    marked, plain, network = alternating_steps(run, recorder, steps, report)
    checks = [recorded_step(run, recorder, check=True)["check"] for _ in range(CHECKS)]
    memory: dict[str, PhaseCost] = {}
    if device.type == "cpu":
        memory = memory_of_phases(trace, STEP)
    elif device.type in METERED:
        memory = highest([*marked, *({"check": cost} for cost in checks)])
    rows = _rows(marked, checks, memory, config)
    if replay is not None:
        replay.measure()
    peak = max((row.peak for row in rows if row.peak is not None), default=0)
    passes = config.samples_per_step * config.accumulate
    step, check = statistics.median(plain), statistics.median(cost.seconds for cost in checks)
    repair = repairing_step(run) if config.forget_steps < config.steps else step
    return Profile(
        phases=rows,
        parts=[*(replay.parts() if replay else []), start, *_parts_of_steps(run, config, step, repair, check, scratch)],
        step=step,
        network=statistics.median(network),
        overhead=statistics.median(whole / (passes * bare) for whole, bare in zip(plain, network, strict=True)) - 1,
        check=check,
        probe=probe(run, peak, report),
        samples=samples_of(run),
        passes=passes,
        parameters=sum(parameter.numel() for parameter in run.denoiser.module.parameters()),
        trainable=run.arena.numel,
        sample_shape=run.denoiser.sample_shape,
        held=_held(run) | ({"bank": replay.nbytes} if replay else {}),
        memory_from=FROM_TRACE if device.type == "cpu" else FROM_DEVICE if memory else FROM_NOTHING,
        machine=_machine(device),
        settings=asdict(config),
        trace=trace,
    )


def _copied(model: Any) -> Any:
    """What stands in for the model: its network is a copy, on the device that the user's is on."""
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    # Asked here, where a pipeline that cannot be used still has its name.
    denoiser = denoiser_of(model)
    return SimpleNamespace(unet=copy.deepcopy(denoiser.module), scheduler=model.scheduler)


def _for_measuring(config: UnlearnConfig) -> UnlearnConfig:
    """The same work per step, but at a rate at which no number of steps can diverge, and with no check unasked for."""
    never = 2**62
    return replace(config, learning_rate=1e-3 * config.learning_rate, steps=never, check_every=never)


def _rows(
    steps: Sequence[Mapping[str, PhaseCost]],
    checks: Sequence[PhaseCost],
    memory: Mapping[str, PhaseCost],
    config: UnlearnConfig,
) -> list[PhaseRow]:
    seconds = {name: [costs[name].seconds for costs in steps] for name in steps[0]}
    if config.samples_per_step * config.accumulate == 1:
        # Nothing is collected then; the moment of finding that out is the step's own.
        collected = seconds.pop("accumulate")
        seconds[STEP] = [own + more for own, more in zip(seconds[STEP], collected, strict=True)]
    seconds["check"] = [cost.seconds / config.check_every for cost in checks]
    total = sum(statistics.median(values) for values in seconds.values())
    rows = []
    for name, values in sorted(seconds.items(), key=lambda item: ORDER.index(item[0])):
        low, median, high = torch.tensor(values, dtype=torch.float64).quantile(QUARTILES).tolist()
        needed = memory.get(name, PhaseCost())
        rows.append(PhaseRow(name, median, low, high, median / total, needed.peak, needed.rise))
    return rows


def _parts_of_steps(
    run: UnlearningRun, config: UnlearnConfig, step: float, repair: float, check: float, scratch: Path | str | None
) -> list[RunPart]:
    forgetting, repairing = config.forget_steps, config.steps - config.forget_steps
    checks = math.ceil(config.steps / config.check_every)
    # One before the first step; the last step is followed by the result instead.
    saves = 1 + (config.steps - 1) // config.save_every
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        path = Path(folder) / "state.safetensors"
        _, save = timed(run.denoiser.device, lambda: save_tensors(path, run.state_dict()))
    return [
        RunPart(
            "steps",
            forgetting * step + repairing * repair,
            True,
            f"{forgetting} x {duration(step)}" + (f" and {repairing} x {duration(repair)}" if repairing else ""),
        ),
        RunPart("checks", checks * check, True, f"{checks} x {duration(check)}"),
        RunPart("saves", saves * save, True, f"{saves} x {duration(save)}"),
    ]


def _held(run: UnlearningRun) -> dict[str, int]:
    """Bytes that a run holds between its steps."""
    module, weights = run.denoiser.module, run.weights
    network = [*module.parameters(), *module.buffers(), run.arena.grad]
    sums = [tensor for tensor in (run._gradient_sum, run._noise_gradient_sum) if tensor is not None]
    # The last is z as it was at the last check.
    state = [weights.center, weights.prior_std, *weights.state.values(), *sums, weights.z]
    return {
        "network and gradient": sum(tensor.nbytes for tensor in network),
        "state of q": sum(tensor.nbytes for tensor in state),
        "forget images": run.images.nbytes,
    }


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "backend": _native.backend_of(device.type),
        "bfloat16": has_bfloat16(device),
        "torch": torch.__version__,
    }
