"""`vdu-fast pretrain`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from vdu_fast.cli.parser import CommandParser, CommonOptions, command_parser, take
from vdu_fast.cli.runtime import Interruption, load_data, report_interruption, running
from vdu_fast.pretrain import STATE_FILE, PretrainConfig, pretrain
from vdu_fast.progress import describe


@dataclass
class PretrainFiles:
    """Input and output of `vdu-fast pretrain`.

    Args:
        data: "digits", a folder of class sub-folders or of pictures, an IDX folder or an .npz; its training split is
            used. ":CLASS" at the end keeps one class.
        output: folder for the pipeline, posterior.safetensors, checkpoints/ and pretrain.json.
        overwrite: accept an output folder that is not empty.
        resume: go on with the interrupted run in the output folder.
        resize: bring every picture to N x N pixels first.
        image_channels: convert the pictures to 1 (gray) or 3 (colour) channels first.
    """

    data: str
    output: str
    overwrite: bool = False
    resume: bool = False
    resize: int | None = None
    image_channels: int | None = None


def build_parser() -> CommandParser:
    parser = command_parser("pretrain", "Train a diffusers pipeline on pictures, and record its posterior on the way.")
    parser.add_settings(PretrainFiles, "input and output", data="DATA", output="DIR")
    parser.add_settings(PretrainConfig, "training")
    parser.add_settings(CommonOptions, "how it runs")
    parser.set_usage()
    return parser


def run(arguments: Namespace, command: list[str]) -> int:
    files, config = take(PretrainFiles, arguments), take(PretrainConfig, arguments)
    try:
        with running(take(CommonOptions, arguments)) as display, Interruption(display) as interruption:
            data = load_data(files.data, split="train", resize=files.resize, channels=files.image_channels)
            display.say(f"training on {len(data)} images of {data.name}, each {tuple(data.images.shape[1:])}")

            def on_step(record: dict[str, Any]) -> None:
                display.update("training", record["step"], record["total"], describe(record), lines=12)
                interruption.poll()

            pretrain(data, files.output, config, overwrite=files.overwrite, resume=files.resume, on_step=on_step)
    except KeyboardInterrupt:
        return report_interruption(command, Path(files.output), STATE_FILE)
    print(f"Wrote the pipeline and its posterior to {files.output}. To make it forget a class:")
    print(
        f"  vdu-fast unlearn --model {files.output} --posterior {files.output}/posterior.safetensors "
        f"--forget {files.data}:CLASS --output DIR"
    )
    return 0
