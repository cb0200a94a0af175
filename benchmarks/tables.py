"""From times to lines of a table, held to their budgets, and the files that keep them."""

from __future__ import annotations

import csv
import datetime
import io
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vdu_fast import __version__
from vdu_fast.benchmarks.case import AT_THE_LIMIT, Budget, Case, Line
from vdu_fast.benchmarks.ledger import commit
from vdu_fast.benchmarks.measure import COPIED, COPY, GPU_BACKENDS, Times, spread
from vdu_fast.checkpoint import write_bytes_atomic, write_json_atomic
from vdu_fast.machine import device_name

COLUMNS = (
    "question", "implementation", "milliseconds", "spread", "ns_per_unit", "unit", "per_second",
    "ratio_to_best_baseline", "best_baseline", "share_of_copy_bandwidth", "copy_gb_per_second",
    "operations_per_byte", "gigaoperations_per_second", "bytes_per_parameter", "part_of_network", "budget", "kept",
    "note",
)  # fmt: skip


def timed_line(implementation: str, seconds: list[float], *, budget: Budget | None = None) -> Line:
    """A line of one implementation's seconds."""
    median = statistics.median(seconds)
    line: Line = {"implementation": implementation, "milliseconds": 1e3 * median, "spread": spread(seconds)}
    if budget is not None and budget.seconds is not None:
        line |= {"budget": f"at most {budget.seconds} s", "kept": median <= budget.seconds}
    return line


def lines_of(case: Case, times: Times, failed: dict[str, str], *, copied: int = COPIED) -> list[Line]:
    """A line of every implementation of a case: baselines, then ours, with ratio, share and budget.

    Args:
        times: seconds by implementation; those of "copy" are of `copied` float32 numbers.
        failed: why a baseline could not run, by name.
    """
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    bandwidth = 8 * copied / medians[COPY]
    baselines = [name for name in case.baselines if name in times]
    best = min(baselines, key=medians.__getitem__) if baselines else None
    held = _held(case, times)
    lines = []
    for name in (n for n in times if n != COPY):
        line = timed_line(name, times[name])
        line |= {
            "ns_per_unit": 1e9 * medians[name] / case.units,
            "unit": case.unit,
            "per_second": case.units / medians[name],
            "copy_gb_per_second": bandwidth / 1e9,
        }
        if name not in case.baselines:
            if best is not None and case.budget.part is None:
                line |= {"ratio_to_best_baseline": medians[best] / medians[name], "best_baseline": best}
            if name in held:
                if case.bytes:
                    line["share_of_copy_bandwidth"] = case.bytes / medians[name] / bandwidth
                if case.operations:
                    line["operations_per_byte"] = case.operations / case.bytes
                    line["gigaoperations_per_second"] = case.operations / medians[name] / 1e9
        if case.budget.part is not None and best is not None and name != baselines[0]:
            line["part_of_network"] = medians[name] / medians[baselines[0]]
        if name in held:
            line |= _verdict(case, name, medians, line.get("share_of_copy_bandwidth"))
        lines.append(line | case.columns.get(name, {}))
    lines += [{"implementation": name, "note": f"cannot run here: {reason}"} for name, reason in failed.items()]
    return lines


def _held(case: Case, times: Times) -> list[str]:
    """Whose bytes and budget the case tells: the first of ours, which on a GPU goes by its backend."""
    on_gpu = [name for name in GPU_BACKENDS if name in times]
    return on_gpu or [name for name in case.ours if name in times][:1]


def _verdict(case: Case, name: str, medians: dict[str, float], share: float | None) -> Line:
    """What the budget asks, and whether it is kept. At the memory's limit no ratio and no part is asked."""
    budget, asked, misses = case.budget, [], []
    at_the_limit = share is not None and share >= AT_THE_LIMIT
    for start, least in budget.ratios.items():
        others = [medians[other] for other in case.baselines if other in medians and other.startswith(start)]
        if not others:
            continue
        asked.append(f"{least} x {start or 'the best'}")
        if min(others) / medians[name] < least and not at_the_limit:
            misses.append(f"{min(others) / medians[name]:.2f} x {start or 'the best'}")
    if budget.bandwidth is not None and share is not None:
        asked.append(f"{budget.bandwidth:.0%} of copy")
        if share < budget.bandwidth:
            misses.append(f"{share:.0%} of copy")
    if budget.part is not None:
        part = medians[name] / medians[next(iter(case.baselines))]
        asked.append(f"at most {budget.part:.0%} of the network")
        if part > budget.part and not at_the_limit:
            misses.append(f"{part:.1%} of the network")
    if not asked:
        return {}
    note = f"missed: {', '.join(misses)}" if misses else ""
    if not misses and at_the_limit and (budget.ratios or budget.part):
        note = "at the limit of the memory"
    return {"budget": ", ".join(asked), "kept": not misses} | ({"note": note} if note else {})


def environment(device: torch.device, numel: int) -> Line:
    """What the answers were measured on."""
    where: Line = {"device": device_name(device), "parameters": numel}
    if device.type == "cuda":
        where["cuda"] = torch.version.cuda or torch.version.hip
    else:
        where |= {"threads": torch.get_num_threads(), "isa": torch.backends.cpu.get_cpu_capability()}
    return where | {
        "torch": torch.__version__,
        "vdu_fast": __version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def shown(value: Any) -> str:
    """A cell: four significant digits of a float, nothing for what is absent."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_csv(path: Path, lines: Iterable[Line], where: Line) -> None:
    """One row per line, with what it was measured on."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow([*COLUMNS, *where])
    for line in lines:
        writer.writerow([*(shown(line.get(column)) for column in COLUMNS), *where.values()])
    write_bytes_atomic(path, buffer.getvalue().encode())


def write_json(path: Path, lines: Iterable[Line], where: Line) -> None:
    write_json_atomic(path, {"environment": where, "lines": list(lines)})


def write_markdown(path: Path, lines: list[Line], where: Line) -> None:
    """The table with the columns that hold something, and the budgets that are missed below it."""
    columns = [c for c in COLUMNS if any(line.get(c) is not None for line in lines)]
    text = ["# Benchmarks", "", ", ".join(f"{key} {value}" for key, value in where.items()), ""]
    text += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    text += ["| " + " | ".join(shown(line.get(c)).replace("|", "/") for c in columns) + " |" for line in lines]
    missed = missed_budgets(lines)
    text += ["", "Budgets missed:" if missed else "All budgets are kept.", "", *(f"- {miss}" for miss in missed)]
    write_bytes_atomic(path, ("\n".join(text).rstrip() + "\n").encode())


def missed_budgets(lines: Iterable[Line]) -> list[str]:
    """One sentence for every budget that is not kept."""
    return [
        f"{line['question']}, {line['implementation']}: budget {line['budget']}; {line.get('note', 'missed')}"
        for line in lines
        if line.get("kept") is False
    ]
