"""`vdu-fast compare`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import Namespace

from vdu_fast.baselines import METHOD_NAMES, get_method
from vdu_fast.cli.parser import CommandParser, CommonOptions, command_parser, take
from vdu_fast.cli.runtime import load_data, running
from vdu_fast.comparison import Comparison, plan, read_pretraining, run_all
from vdu_fast.comparison_report import write_comparison
from vdu_fast.demo import shipped_model
from vdu_fast.errors import InputError
from vdu_fast.evaluation import EvaluationConfig
from vdu_fast.persistence import PersistenceConfig


@dataclass
class CompareOptions:
    """What `vdu-fast compare` compares.

    Args:
        data: labelled real pictures, all classes: "digits", a folder of class sub-folders, an IDX folder or an .npz.
        forget: names or numbers of the classes to forget, each in runs of its own, with commas between.
        output: folder for runs/, table.csv, table.md and pictures; runs in it that are finished are not made again.
        model: pipeline folder of the trained model; for the digits the one that comes with the package.
        posterior: posterior file; null is the posterior.safetensors in the model's folder.
        methods: names of the methods, with commas between, or "all".
        seeds: seeds per class and method, counted from 0.
        jobs: runs at a time, each in a process of one thread; 1 runs in this process with --threads threads.
        device: where the models run; "auto" takes CUDA where there is one.
        resize: bring every picture to N x N pixels first.
        image_channels: convert the pictures to 1 (gray) or 3 (colour) channels first.
        forget_images: forget from so many images of the class, chosen at random for every seed; null is all.
        evaluations: network evaluations that every run may spend; null is what `unlearn` needs under its defaults.
        persistence: also measure whether the class stays forgotten; runs that are finished without it are unlearned
            again, and not evaluated again.
    """

    data: str
    forget: str
    output: str
    model: str | None = None
    posterior: str | None = None
    methods: str = "all"
    seeds: int = 3
    jobs: int = 1
    device: str = "auto"
    resize: int | None = None
    image_channels: int | None = None
    forget_images: int | None = None
    evaluations: int | None = None
    persistence: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}.")


def build_parser() -> CommandParser:
    parser = command_parser("compare", "Let other unlearning methods and this one forget the same, at the same cost.")
    names = {"data": "DATA", "forget": "CLASS,...", "model": "DIR", "posterior": "FILE", "output": "DIR"}
    parser.add_settings(CompareOptions, "what is compared", methods="NAME,...", **names)
    parser.add_settings(EvaluationConfig, "how it is measured")
    parser.add_settings(PersistenceConfig, "whether it stays forgotten (--persistence)")
    parser.add_settings(CommonOptions, "how it runs")
    parser.set_usage()
    return parser


def run(arguments: Namespace, command: list[str]) -> int:
    options, config = take(CompareOptions, arguments), take(EvaluationConfig, arguments)
    persistence = take(PersistenceConfig, arguments) if options.persistence else None
    model, posterior = _model(options)
    methods = _methods(options.methods, model)
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; give a folder.")
    try:
        with running(take(CommonOptions, arguments)) as display:
            how = {"resize": options.resize, "channels": options.image_channels}
            train = load_data(options.data, split="train", **how)  # type: ignore[arg-type]
            heldout = load_data(options.data, split="heldout", **how)  # type: ignore[arg-type]
            labels = [train.class_index(name) for name in _names(options.forget, "forget")]
            jobs = plan(methods, labels, options.seeds)
            display.say(f"{len(jobs)} runs: {', '.join(methods)}")
            comparison = Comparison(
                model, posterior, train, heldout, output, config, device=options.device, persistence=persistence,
                forget_images=options.forget_images, evaluations=options.evaluations,
            )  # fmt: skip
            records = run_all(
                comparison,
                jobs,
                processes=options.jobs,
                progress=lambda done, total, text: display.update("runs", done, total, text, lines=total),
            )
    except KeyboardInterrupt:
        print(f"Interrupted. The finished runs are in {output / 'runs'}; the same command goes on.", file=sys.stderr)
        return 130
    write_comparison(output, records)
    print((output / "table.md").read_text())
    print(f"Wrote the table and the pictures to {output}.")
    return 0


def _names(text: str, flag: str) -> list[str]:
    """The parts of a list with commas, each once."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise InputError(f"--{flag} names nothing; give one or more names with commas between.")
    return names


def _model(options: CompareOptions) -> tuple[Path, Path]:
    """The model's folder and the posterior's file."""
    if options.model is None and options.data != "digits":
        raise InputError(
            f"--model is missing: only for --data digits does a model come with the package, not for {options.data}. "
            "Give the pipeline folder of a model of these pictures."
        )
    model = Path(options.model) if options.model is not None else shipped_model()
    posterior = Path(options.posterior) if options.posterior is not None else model / "posterior.safetensors"
    if not posterior.is_file():
        raise InputError(
            f"--posterior: {posterior} does not exist. Give the file that `vdu-fast pretrain` or `vdu-fast posterior` "
            "wrote."
        )
    return model, posterior


def _methods(text: str, model: Path) -> list[str]:
    """The methods asked for; of all, those that the model's folder has what it takes for."""
    if text == "all":
        return [name for name in METHOD_NAMES if name != "retrain" or read_pretraining(model) is not None]
    names = _names(text, "methods")
    for name in names:
        if name not in METHOD_NAMES:
            raise InputError(f"--methods: there is no {name!r}; choose among {', '.join(METHOD_NAMES)}, or say all.")
        get_method(name)
    return names
