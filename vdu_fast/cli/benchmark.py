"""`vdu-fast benchmark`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import groupby

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from vdu_fast.benchmarks.case import Line
from vdu_fast.benchmarks.roofline import peak_arithmetic, write_roofline
from vdu_fast.benchmarks.suite import Answer, ask, chosen, make_setting
from vdu_fast.benchmarks.tables import environment, shown, write_csv, write_json
from vdu_fast.checkpoint import prepare_output
from vdu_fast.cli.parser import CommandParser, CommonOptions, command_parser, take
from vdu_fast.cli.runtime import running
from vdu_fast.errors import InputError

# The questions that a user's machine answers without other packages, in about two minutes.
GROUPS = ("ops", "step")


@dataclass
class BenchmarkOptions:
    """Options of `vdu-fast benchmark`.

    Args:
        quick: ask fewer questions on fewer parameters; takes seconds, or half a minute where torch.compile works.
        ops: only the questions whose name contains one of these texts, whatever they are about.
        device: "auto" takes CUDA where there is one.
        output: folder for benchmark.csv, benchmark.json and roofline.png.
        overwrite: accept an output folder that is not empty.
    """

    quick: bool = False
    ops: list[str] = field(default_factory=list)
    device: str = "auto"
    output: str = "vdu-fast-benchmark"
    overwrite: bool = False


def build_parser() -> CommandParser:
    parser = command_parser(
        "benchmark", "Measure the fast ops on this machine, against what torch does without them and other packages."
    )
    parser.add_settings(BenchmarkOptions, "what is measured", output="DIR")
    parser.add_settings(CommonOptions, "how it runs")
    parser.usage = "vdu-fast benchmark [options]"
    return parser


def run(arguments: Namespace, command: list[str]) -> int:
    options, began = take(BenchmarkOptions, arguments), time.perf_counter()
    # A lone name on the command line is a list of one.
    questions = chosen(options.ops, groups=() if options.ops else GROUPS, quick=options.quick)
    device = _device(options.device)
    output = prepare_output(options.output, overwrite=options.overwrite)
    answers: list[Answer] = []
    with running(take(CommonOptions, arguments)) as display:
        setting = make_setting(device, quick=options.quick)
        where = environment(device, setting.numel)

        def asked(question: object) -> None:
            display.update("questions", len(answers), len(questions))

        for answer in ask(questions, setting, on_question=asked):
            answers.append(answer)
            lines = [line for each in answers for line in each.lines]
            # After every question: an interruption loses nothing that was measured.
            write_csv(output / "benchmark.csv", lines, where)
            write_json(output / "benchmark.json", lines, where)
        display.update("questions", len(questions), len(questions))
        title = f"{where['device']}, {setting.numel / 1e6:.1f} million parameters"
        drawn = write_roofline(output / "roofline.png", lines, peak_arithmetic(device), title)
    print(f"{title}, torch {where['torch']}")
    print_lines(lines, Console(highlight=False))
    for answer in answers:
        if answer.left_out is not None:
            print(f"left out: {answer.question.name}: {answer.left_out}")
    files = "benchmark.csv, benchmark.json" + (" and roofline.png" if drawn else "")
    failed = any(answer.failed for answer in answers)
    print(f"Took {time.perf_counter() - began:.0f} s. {files} are in {output}.")
    return 1 if failed else 0


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: torch finds no CUDA device here. Use 'cpu'; `vdu-fast doctor` lists the devices."
        )
    if name not in ("cpu", "cuda"):
        raise InputError(f"--device {name!r}: the benchmarks know 'auto', 'cpu' and 'cuda'. Name one of them.")
    return torch.device(name)


def print_lines(lines: list[Line], console: Console) -> None:
    """Time, ratio to the best baseline and share of the bandwidth of a copy, by question."""
    console.print(_grid(["", "ms", "+-", "ns each", "x best", "of copy", "of net"]), style="bold")
    for name, answered in groupby(lines, key=lambda line: line["question"]):
        console.print(name, style="bold")
        for line in answered:
            console.print(_grid(_cells(line)))
            # What a budget says is the developers' business.
            if "note" in line and "kept" not in line:
                console.print(f"    {line['note']}", style="dim")


def _cells(line: Line) -> list[str]:
    share, ratio, part = (
        line.get(name) for name in ("share_of_copy_bandwidth", "ratio_to_best_baseline", "part_of_network")
    )
    return [
        f"  {line['implementation']}",
        shown(line.get("milliseconds")),
        f"{line['spread']:.0%}" if "spread" in line else "",
        shown(line.get("ns_per_unit")),
        f"{ratio:.2f}" if ratio is not None else "",
        f"{share:.0%}" if share is not None else "",
        f"{part:.1%}" if part is not None else "",
    ]


def _grid(cells: list[str]) -> Table:
    """One row of columns that are as wide in every row, so that names of any length may stand between them."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=33, no_wrap=True)
    for width in (7, 4, 8, 7, 7, 6):
        grid.add_column(width=width, justify="right", no_wrap=True)
    grid.add_row(*cells)
    return grid
