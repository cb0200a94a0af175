"""`vdu-fast sweep`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from jsonargparse import Namespace

from vdu_fast.cli.parser import CommandParser, CommonOptions, command_parser, take
from vdu_fast.cli.runtime import load_forget_images, running
from vdu_fast.cli.unlearn import warn_of_several_classes
from vdu_fast.config import UnlearnConfig
from vdu_fast.errors import InputError
from vdu_fast.pipelines import load_pipeline
from vdu_fast.progress import unlearning_observers
from vdu_fast.sweeping import SweepConfig, SweepResult, sweep
from vdu_fast.sweeping.grid import REFUSED, SWEPT
from vdu_fast.sweeping.report import FILES, unlearn_command, write_sweep


@dataclass
class SweepFiles:
    """Input and output of `vdu-fast sweep`.

    Args:
        model: pipeline folder of the trained model; it is only read.
        posterior: posterior file, from `vdu-fast pretrain` or `vdu-fast posterior`.
        forget: pictures of what must go, as for `vdu-fast unlearn`.
        output: folder for settings.yaml, curve.png, sweep.csv, sweep.json, the replay bank, and one file per setting;
            settings in it that were measured from the same inputs are not run again.
        bank: replay bank file; read when it exists, otherwise made and written there. Without it one is kept in the
            output folder.
        resize: bring every picture to N x N pixels first.
        image_channels: convert the pictures to 1 (gray) or 3 (colour) channels first.
    """

    model: str
    posterior: str
    forget: str
    output: str
    bank: str | None = None
    resize: int | None = None
    image_channels: int | None = None


def build_parser() -> CommandParser:
    parser = command_parser(
        "sweep", "Find the settings of `vdu-fast unlearn` that suit a model and what it must forget."
    )
    files = {"model": "DIR", "posterior": "FILE", "forget": "DATA", "output": "DIR", "bank": "FILE"}
    parser.add_settings(SweepFiles, "input and output", **files)
    names = ("replay_weights", "hinge_ratios", "gammas", "forget_shares", "replay_guidances")
    lists = dict.fromkeys(names, "[X,...]")
    parser.add_settings(SweepConfig, "what is tried", step_counts="[N,...]", **lists)
    parser.add_settings(UnlearnConfig, "the other settings of `vdu-fast unlearn`", skip=(*SWEPT, *REFUSED))
    parser.add_settings(CommonOptions, "how it runs")
    parser.set_usage()
    return parser


def run(arguments: Namespace, command: list[str]) -> int:
    files, grid, config = take(SweepFiles, arguments), take(SweepConfig, arguments), take(UnlearnConfig, arguments)
    output = Path(files.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; give a folder.")
    if (output / "model_index.json").exists():
        raise InputError(f"--output {output} is a pipeline's folder; name another one.")
    try:
        with running(take(CommonOptions, arguments)) as display:
            pipeline = load_pipeline(files.model)
            images = load_forget_images(files.forget, resize=files.resize, channels=files.image_channels)
            warn_of_several_classes(images, display)
            settings = grid.settings()
            display.say(f"{len(settings)} settings, each measured after {grid.step_counts} steps")
            result = sweep(
                pipeline,
                images,
                posterior=files.posterior,
                output=output,
                config=config,
                grid=grid,
                bank=files.bank,
                observers=unlearning_observers(display, config),
                progress=lambda done, total, text: display.update("settings", done, total, text, lines=total),
            )
    except KeyboardInterrupt:
        print(f"Interrupted. The finished settings are in {output}; the same command goes on.", file=sys.stderr)
        return 130
    write_sweep(output, result, grid)
    _print_result(files, output, result, grid)
    return 0


def _print_result(files: SweepFiles, output: Path, result: SweepResult, grid: SweepConfig) -> None:
    best = result.chosen
    if not result.reached:
        print(
            f"warning: no setting reached an estimated PUL of {grid.least_forgotten:g}; the one that forgets most is "
            "taken. Try smaller --replay_weights, larger --hinge_ratios or more --step_counts, or ask for less with "
            "--least_forgotten.",
            file=sys.stderr,
        )
    print(
        f"Chosen: {best.setting.describe()}; {best.steps} steps: estimated PUL {best.pul:.1f} "
        f"({best.forgotten_before} drawn before, {best.forgotten} after), kept distance {best.ratio:.2f} x that of the "
        "original model's own samples."
    )
    print(f"Wrote {', '.join(FILES[:-1])} and {FILES[-1]} to {output}. To unlearn with these settings:")
    inputs = asdict(files) | {"output": None}
    print(f"  {unlearn_command(inputs, output, result)}")
