"""`vdu-fast demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jsonargparse import Namespace
from rich.console import Console

from vdu_fast.cli.parser import CommandParser, CommonOptions, command_parser, take
from vdu_fast.cli.runtime import running
from vdu_fast.demo import SAMPLES, run_demo
from vdu_fast.report import print_summary

_TABLE_SAMPLES = 1000


@dataclass
class DemoOptions:
    """Options of `vdu-fast demo`.

    Args:
        forget: the digit to forget, 0 to 9.
        output: folder for report.html, metrics.json, pictures and the new pipeline; an earlier demo in it is replaced.
        samples: images drawn from each model for the evaluation.
        seed: of the unlearning.
        overwrite: accept an output folder that holds something else.
    """

    forget: int = 0
    output: str = "vdu-fast-demo"
    samples: int = SAMPLES
    seed: int = 0
    overwrite: bool = False


def build_parser() -> CommandParser:
    parser = command_parser("demo", "Make a small model of handwritten digits forget one of them, and report on it.")
    parser.add_settings(DemoOptions, "what is done", output="DIR", forget="DIGIT")
    parser.add_settings(CommonOptions, "how it runs")
    parser.usage = "vdu-fast demo [options]"
    return parser


def run(arguments: Namespace, command: list[str]) -> int:
    options = take(DemoOptions, arguments)
    with running(take(CommonOptions, arguments)) as display:
        metrics = take(run_demo, arguments, display=display)
    print_summary(metrics, Console())
    if options.samples < _TABLE_SAMPLES:
        print(
            f"{options.samples:,} images were drawn from each model; published figures take {_TABLE_SAMPLES:,} "
            f"(--samples {_TABLE_SAMPLES})."
        )
    print(f"The report is in {Path(options.output) / 'report.html'}.")
    return 0
