"""`vdu-fast unlearn`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from vdu_fast.checkpoint import fingerprint, write_json_atomic
from vdu_fast.classifier import ImageClassifier
from vdu_fast.cli.parser import CommandParser, CommonOptions, command_parser, take
from vdu_fast.cli.runtime import Interruption, load_forget_images, report_interruption, running
from vdu_fast.config import UnlearnConfig
from vdu_fast.data import ImageSet
from vdu_fast.errors import InputError
from vdu_fast.pipelines import load_pipeline
from vdu_fast.progress import ProgressDisplay, unlearning_observers
from vdu_fast.unlearner import PASSED_ON, STATE_FILE, UnlearnResult, unlearn


@dataclass
class UnlearnFiles:
    """Input and output of `vdu-fast unlearn`.

    Args:
        model: pipeline folder of the trained model; it is only read.
        posterior: posterior file, from `vdu-fast pretrain` or `vdu-fast posterior`.
        forget: pictures of what must go: "digits:3", a folder of pictures, a folder of class sub-folders, an IDX folder
            or an .npz, the last three with ":CLASS" at the end: without it every class in them goes. Of labelled data
            the training split is used.
        output: folder for the new pipeline and unlearn.json.
        bank: replay bank file; read when it exists, otherwise made and written there for other
            requests on the same model.
        pass_on_bank: leave what the filter leaves of the bank in passed-on/bank.safetensors of --output, as --bank of
            the next request on the model that is there then: it keeps what the first model drew, and loses less.
        filter_classifier: with --bank_filter classifier, the classifier's file (`vdu-fast evaluate --classifier` writes
            one; judge the result with another, from another --classifier_seed).
        forget_label: with --filter_classifier, name or number of the class that must go.
        overwrite: accept an output folder that is not empty.
        resume: go on with the interrupted run in the output folder.
        resize: bring every picture to N x N pixels first.
        image_channels: convert the pictures to 1 (gray) or 3 (colour) channels first.
    """

    model: str
    posterior: str
    forget: str
    output: str
    bank: str | None = None
    pass_on_bank: bool = False
    filter_classifier: str | None = None
    forget_label: str | None = None
    overwrite: bool = False
    resume: bool = False
    resize: int | None = None
    image_channels: int | None = None


def build_parser() -> CommandParser:
    parser = command_parser("unlearn", "Make a trained diffusion model forget what the given pictures show.")
    names = {
        "posterior": "FILE",
        "bank": "FILE",
        "filter_classifier": "FILE",
        "forget": "DATA",
        "forget_label": "CLASS",
    }
    parser.add_settings(UnlearnFiles, "input and output", model="DIR", output="DIR", **names)
    parser.add_settings(UnlearnConfig, "method")
    parser.add_settings(CommonOptions, "how it runs")
    parser.set_usage()
    return parser


def run(arguments: Namespace, command: list[str]) -> int:
    files, config = take(UnlearnFiles, arguments), take(UnlearnConfig, arguments)
    if Path(files.output).resolve() == Path(files.model).resolve():
        raise InputError(
            f"--output {files.output} is --model itself, and the original would be lost; name another folder."
        )
    classifier, label = filter_classifier(files.filter_classifier, files.forget_label, config)
    try:
        with running(take(CommonOptions, arguments)) as display, Interruption(display) as interruption:
            pipeline = load_pipeline(files.model)
            images = load_forget_images(files.forget, resize=files.resize, channels=files.image_channels)
            display.say(f"forgetting what {len(images)} images of {files.forget} show")
            warn_of_several_classes(images, display)
            result = unlearn(
                pipeline,
                images,
                posterior=files.posterior,
                config=config,
                bank=files.bank,
                pass_on_bank=files.pass_on_bank,
                classifier=classifier,
                forget_label=label,
                output=files.output,
                overwrite=files.overwrite,
                resume=files.resume,
                observers=unlearning_observers(display, config, poll=interruption.poll),
            )
    except KeyboardInterrupt:
        return report_interruption(command, Path(files.output), STATE_FILE)
    _record_inputs(files, classifier)
    _print_result(files, result)
    return 0


def warn_of_several_classes(images: ImageSet, display: ProgressDisplay) -> None:
    """Whoever names a whole data set forgets all of it, which is seldom meant and leaves little to keep."""
    if images.labels is None or len(found := images.labels.unique().tolist()) < 2:
        return
    names = [images.class_names[label] for label in found]
    shown = ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
    display.warn(
        f"--forget {images.name} holds the classes {shown}, and all of them will be forgotten. To forget one, name it "
        f"after a colon: --forget {images.name}:{names[0]}. To forget several, one after another with "
        "--pass_on_bank can do better."
    )


def filter_classifier(
    path: str | None, label: str | None, config: UnlearnConfig
) -> tuple[ImageClassifier | None, int | None]:
    """The classifier of --bank_filter classifier and its label of the unwanted class."""
    given = path is not None, label is not None
    if config.bank_filter != "classifier":
        if any(given):
            raise InputError(
                f"--filter_classifier and --forget_label go with --bank_filter classifier, not {config.bank_filter}. "
                "Add it, or leave them out."
            )
        return None, None
    if not all(given):
        raise InputError(
            "--bank_filter classifier needs both --filter_classifier FILE and --forget_label CLASS. Give them, or use "
            "--bank_filter positive_unlabelled, which needs neither."
        )
    assert path is not None
    assert label is not None
    classifier = ImageClassifier.load(path)
    names = classifier.class_names
    if label in names:
        return classifier, names.index(label)
    if label.isdecimal() and int(label) < len(names):
        return classifier, int(label)
    raise InputError(f"--forget_label {label} is no class of the classifier; choose one of {', '.join(names)}.")


def _record_inputs(files: UnlearnFiles, classifier: ImageClassifier | None) -> None:
    """Add to unlearn.json what the run was given, so that `evaluate` knows which classifier must not judge it."""
    path = Path(files.output) / "unlearn.json"
    inputs: dict[str, Any] = {"model": files.model, "posterior": files.posterior, "forget": files.forget}
    if classifier is not None:
        weights = fingerprint(classifier)
        inputs["filter_classifier"] = {"path": files.filter_classifier, "weights": weights, "seed": classifier.seed}
    write_json_atomic(path, json.loads(path.read_text()) | {"inputs": inputs})


def _print_result(files: UnlearnFiles, result: UnlearnResult) -> None:
    seconds = ", ".join(f"{name} {value:.1f}s" for name, value in result.seconds.items())
    print(f"Done after {result.steps} steps: {result.stopped_because} ({seconds}).")
    print(f"Wrote the pipeline to {files.output}. To measure what it forgot and what it kept:")
    print(
        f"  vdu-fast evaluate --before {files.model} --after {files.output} --data LABELLED_DATA --forget CLASS "
        "--output DIR"
    )
    if files.pass_on_bank:
        print(f"For the next request on it: --model {files.output} --bank {Path(files.output) / PASSED_ON}")
