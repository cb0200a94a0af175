"""`vdu-fast evaluate`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from vdu_fast.checkpoint import fingerprint, prepare_output
from vdu_fast.classifier import ImageClassifier
from vdu_fast.cli.parser import CommandParser, CommonOptions, command_parser, take
from vdu_fast.cli.runtime import load_data, running
from vdu_fast.drawn import load_samples, save_samples
from vdu_fast.errors import InputError
from vdu_fast.evaluation import Evaluation, EvaluationConfig, evaluate
from vdu_fast.persistence import PersistenceConfig, measure_persistence
from vdu_fast.pipelines import Denoiser, denoiser_of, load_pipeline, pick_device
from vdu_fast.progress import ProgressDisplay
from vdu_fast.report import print_summary, write_report


@dataclass
class EvaluateFiles:
    """Input and output of `vdu-fast evaluate`.

    Args:
        before: pipeline folder of the original model.
        after: pipeline folder of the unlearned model.
        data: labelled real pictures, all classes: "digits", a folder of class sub-folders, an IDX folder or an .npz.
        forget: name or number of the forgotten class.
        output: folder for report.html, metrics.json and pictures.
        classifier: the classifier's file; read when it exists, otherwise one is trained and written there.
        original_samples: file of samples of the original model; read when it exists, otherwise written there, so that
            many changes of one model are evaluated and it is drawn from once.
        device: where the models run; "auto" takes CUDA where there is one.
        overwrite: accept an output folder that is not empty.
        resize: bring every picture to N x N pixels first.
        image_channels: convert the pictures to 1 (gray) or 3 (colour) channels first.
        persistence: also measure whether the class stays forgotten.
    """

    before: str
    after: str
    data: str
    forget: str
    output: str
    classifier: str | None = None
    original_samples: str | None = None
    device: str = "auto"
    overwrite: bool = False
    resize: int | None = None
    image_channels: int | None = None
    persistence: bool = False


def build_parser() -> CommandParser:
    parser = command_parser(
        "evaluate", "Measure what a model forgot and what that cost, beside references, and write a report."
    )
    names = {"before": "DIR", "after": "DIR", "output": "DIR", "data": "DATA", "forget": "CLASS", "classifier": "FILE"}
    names["original_samples"] = "FILE"
    parser.add_settings(EvaluateFiles, "input and output", **names)
    parser.add_settings(EvaluationConfig, "how it is measured")
    parser.add_settings(PersistenceConfig, "whether it stays forgotten (--persistence)")
    parser.add_settings(CommonOptions, "how it runs")
    parser.set_usage()
    return parser


def run(arguments: Namespace, command: list[str]) -> int:
    files, config = take(EvaluateFiles, arguments), take(EvaluationConfig, arguments)
    persistence = take(PersistenceConfig, arguments) if files.persistence else None
    began = time.perf_counter()
    for flag in ("classifier", "original_samples"):
        if (file := getattr(files, flag)) is not None and Path(file).is_dir():
            raise InputError(f"--{flag} {file} is a folder; name a .safetensors file in it.")
    for flag in ("before", "after"):
        if Path(files.output).resolve() == Path(getattr(files, flag)).resolve():
            raise InputError(f"--output {files.output} is --{flag} itself; name another folder for the report.")
    output = prepare_output(files.output, overwrite=files.overwrite)
    with running(take(CommonOptions, arguments)) as display:
        before, after = (
            _model(path, flag, files.device) for path, flag in ((files.before, "before"), (files.after, "after"))
        )
        unlearned = read_unlearning(Path(files.after), after, display)
        evaluation = _evaluate(files, config, persistence, before, after, display)
        if _judged_by_its_filter(evaluation.classifier, unlearned):
            evaluation.metrics["classifier"]["took_part"] = True
            evaluation.metrics["warnings"].append(
                "the classifier, or one trained from the same seed, also filtered the replay bank of this run: it "
                "judges its own work. Have another one trained: leave --classifier out and change --classifier_seed."
            )
    seconds = dict(unlearned.get("seconds", {})) | {"evaluate": time.perf_counter() - began}
    metrics = write_report(
        output,
        evaluation=evaluation,
        settings=unlearned.get("settings", {}) | {"evaluation": asdict(config)},
        seed=unlearned.get("settings", {}).get("seed", config.seed),
        seconds=seconds | {"total": seconds.get("unlearn", 0.0) + seconds["evaluate"]},
        history=unlearned.get("history"),
    )
    print_summary(metrics, Console())
    print(f"The report is in {output / 'report.html'}.")
    return 0


def _model(path: str, flag: str, device: str) -> Denoiser:
    denoiser = denoiser_of(load_pipeline(path, argument=flag))
    denoiser.module.to(pick_device(device, denoiser.module))
    return denoiser


def _evaluate(
    files: EvaluateFiles,
    config: EvaluationConfig,
    persistence: PersistenceConfig | None,
    before: Denoiser,
    after: Denoiser,
    display: ProgressDisplay,
) -> Evaluation:
    how = {"resize": files.resize, "channels": files.image_channels}
    train = load_data(files.data, split="train", **how)  # type: ignore[arg-type]
    heldout = load_data(files.data, split="heldout", **how)  # type: ignore[arg-type]
    path = Path(files.classifier) if files.classifier is not None else None
    known = path is not None and path.is_file()
    drawn = Path(files.original_samples) if files.original_samples is not None else None
    shared: dict[str, Any] = {
        "train": train,
        "heldout": heldout,
        "forget": train.class_index(files.forget),
        "config": config,
        "progress": display.update,
    }
    evaluation = evaluate(
        before,
        after,
        **shared,
        classifier=ImageClassifier.load(path) if path is not None and known else None,
        original_samples=load_samples(drawn, before, config) if drawn is not None and drawn.is_file() else None,
        on_original=None if drawn is None else lambda images: save_samples(drawn, images, before, config),
    )
    if path is not None and not known:
        evaluation.classifier.save(path)
    if persistence is not None:
        evaluation.metrics["persistence"] = measure_persistence(
            before,
            after,
            **shared,
            classifier=evaluation.classifier,
            persistence=persistence,
            original_samples=evaluation.original_samples,
        )
    return evaluation


def read_unlearning(folder: Path, after: Denoiser, display: ProgressDisplay) -> dict[str, Any]:
    """What `unlearn` recorded beside its pipeline (settings, seconds, history), or nothing.

    Raises:
        InputError: the record is damaged.
    """
    path = folder / "unlearn.json"
    if not path.is_file():
        display.warn(f"{path} does not exist, so the report has no loss curves, settings or times of the unlearning.")
        return {}
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"--after: {path} is not readable JSON ({error}). Remove it, or unlearn again.") from error
    if record.get("weights") != fingerprint(after.module):
        display.warn(f"{path} is of other weights than the pipeline beside it, so the report leaves it out.")
        return {}
    return record


def _judged_by_its_filter(judge: ImageClassifier, unlearned: dict[str, Any]) -> bool:
    """Whether the judge filtered the bank too, or comes from the seed of what did: the same data give the same one."""
    filtered_by = unlearned.get("inputs", {}).get("filter_classifier")
    if filtered_by is None:
        return False
    same_seed = judge.seed is not None and judge.seed == filtered_by.get("seed")
    return same_seed or fingerprint(judge) == filtered_by.get("weights")
