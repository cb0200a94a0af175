"""`vdu-fast profile`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jsonargparse import Namespace
from rich.console import Console

from vdu_fast.checkpoint import prepare_output
from vdu_fast.cli.parser import CommandParser, CommonOptions, command_parser, take
from vdu_fast.cli.runtime import load_forget_images, running
from vdu_fast.cli.unlearn import filter_classifier, warn_of_several_classes
from vdu_fast.config import UnlearnConfig
from vdu_fast.demo import shipped_model
from vdu_fast.errors import InputError
from vdu_fast.pipelines import load_pipeline
from vdu_fast.profiling import profile
from vdu_fast.profiling.advice import advise
from vdu_fast.profiling.report import print_profile, save_profile

FILES = "profile.json, profile.csv, profile.png and trace.json"


@dataclass
class ProfileFiles:
    """Input and output of `vdu-fast profile`.

    Args:
        model: pipeline folder of the trained model; it is only read. Without it the digits model that comes with the
            package is taken, and forgets 0.
        posterior: posterior file; null takes posterior.safetensors in the model's folder.
        forget: pictures of what must go, as for `vdu-fast unlearn`.
        output: folder for profile.json, profile.csv, profile.png and trace.json; an earlier profile in it is replaced.
        bank: replay bank file; read when it exists, never written.
        filter_classifier: with --bank_filter classifier, the classifier's file.
        forget_label: with --filter_classifier, name or number of the class that must go.
        overwrite: accept an output folder that holds something else.
        resize: bring every picture to N x N pixels first.
        image_channels: convert the pictures to 1 (gray) or 3 (colour) channels first.
        profile_steps: steps that are measured; each is taken twice, recorded and not.
        profile_warmup: steps before these, of which nothing is kept.
    """

    model: str | None = None
    posterior: str | None = None
    forget: str | None = None
    output: str = "vdu-fast-profile"
    bank: str | None = None
    filter_classifier: str | None = None
    forget_label: str | None = None
    overwrite: bool = False
    resize: int | None = None
    image_channels: int | None = None
    profile_steps: int = 20
    profile_warmup: int = 5


def build_parser() -> CommandParser:
    parser = command_parser(
        "profile",
        "Take a few steps of unlearning on a copy of the model, and show where the time and the memory go.",
    )
    names = {
        "posterior": "FILE",
        "bank": "FILE",
        "filter_classifier": "FILE",
        "forget": "DATA",
        "forget_label": "CLASS",
    }
    parser.add_settings(ProfileFiles, "input and output", model="DIR", output="DIR", **names)
    parser.add_settings(UnlearnConfig, "method")
    parser.add_settings(CommonOptions, "how it runs")
    parser.usage = "vdu-fast profile [--model DIR --forget DATA] [options]"
    return parser


def run(arguments: Namespace, command: list[str]) -> int:
    files, config = take(ProfileFiles, arguments), take(UnlearnConfig, arguments)
    classifier, label = filter_classifier(files.filter_classifier, files.forget_label, config)
    model, posterior, forget = _what(files)
    earlier = (Path(files.output) / "profile.json").is_file()
    with running(take(CommonOptions, arguments)) as display:
        pipeline = load_pipeline(model)
        images = load_forget_images(forget, resize=files.resize, channels=files.image_channels)
        warn_of_several_classes(images, display)
        output = prepare_output(files.output, overwrite=files.overwrite or earlier)
        display.say(f"profiling the unlearning of what {len(images)} images of {forget} show, with {model}")
        found = profile(
            pipeline,
            images,
            posterior=posterior,
            config=config,
            bank=files.bank,
            classifier=classifier,
            forget_label=label,
            steps=files.profile_steps,
            warmup=files.profile_warmup,
            scratch=output,
            progress=display.update,
        )
    advice = advise(found)
    save_profile(found, output, advice)
    print_profile(found, advice, Console(highlight=False))
    print(f"Wrote {FILES} to {output}; ui.perfetto.dev shows the last one.")
    return 0


def _what(files: ProfileFiles) -> tuple[Path, Path, str]:
    """Model, posterior and forget data, with the shipped ones where no model is named."""
    if files.model is None:
        model, forget = shipped_model(), files.forget or "digits:0"
    elif files.forget is None:
        raise InputError("--model needs --forget, the pictures of what the model must forget; see `vdu-fast unlearn`.")
    else:
        model, forget = Path(files.model), files.forget
    posterior = Path(files.posterior) if files.posterior is not None else model / "posterior.safetensors"
    if files.posterior is None and model.is_dir() and not posterior.is_file():
        raise InputError(
            f"--posterior was not given and {posterior} does not exist. Give the file, or make one with "
            "`vdu-fast posterior`."
        )
    return model, posterior, forget
