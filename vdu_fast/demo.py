"""The demonstration: the digits model that comes with the package forgets one digit and is judged for it.

Everything is real and small: scikit-learn's digits, a diffusion model and its posterior made by `vdu-fast pretrain`,
the default settings, and the same evaluation that `vdu-fast evaluate` runs.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from vdu_fast.checkpoint import prepare_output, write_json_atomic
from vdu_fast.config import UnlearnConfig
from vdu_fast.data import load_images
from vdu_fast.errors import InputError
from vdu_fast.evaluation import EvaluationConfig, evaluate
from vdu_fast.pipelines import denoiser_of, load_pipeline
from vdu_fast.progress import ProgressDisplay, unlearning_observers
from vdu_fast.report import write_report
from vdu_fast.unlearner import unlearn

SAMPLES = 500
MARKER = ".vdu-fast-demo"
CHECKSUMS = "SHA256SUMS"
_DAMAGED = "Install vdu_fast again."


def shipped_model() -> Path:
    """The folder of the digits pipeline and its posterior.safetensors inside the installed package, checksums verified.

    Raises:
        InputError: it is absent or damaged.
    """
    folder = Path(str(resources.files("vdu_fast"))) / "pretrained" / "digits"
    verify_checksums(folder)
    return folder


def verify_checksums(folder: Path) -> None:
    """Compare every file named in SHA256SUMS (the format of sha256sum) with its checksum.

    Raises:
        InputError: the list or a file is absent, or a file differs.
    """
    listing = folder / CHECKSUMS
    if not listing.is_file():
        raise InputError(f"the model shipped with the package is absent: {listing} does not exist. {_DAMAGED}")
    for line in listing.read_text().splitlines():
        expected, name = line.split(maxsplit=1)
        file = folder / name.removeprefix("*")
        if not file.is_file():
            raise InputError(f"the model shipped with the package is incomplete: {file} does not exist. {_DAMAGED}")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise InputError(
                f"the model shipped with the package is damaged: {file} has SHA-256 {found[:16]}..., expected "
                f"{expected[:16]}... {_DAMAGED}"
            )


def run_demo(
    output: Path | str,
    *,
    forget: int = 0,
    samples: int = SAMPLES,
    seed: int = 0,
    overwrite: bool = False,
    model: Path | str | None = None,
    config: UnlearnConfig | None = None,
    sampler_steps: int = 50,
    display: ProgressDisplay | None = None,
) -> dict[str, Any]:
    """Forget one digit, evaluate, and write the report.

    Args:
        output: folder for report.html, metrics.json, the pictures and the new pipeline (model/). An earlier demo in it
            is replaced.
        forget: the digit.
        samples: images drawn from each model for the evaluation.
        seed: of the unlearning; the evaluation keeps its own.
        overwrite: accept a folder that holds something else.
        model: pipeline folder with posterior.safetensors in it; None is the shipped one.
        config: unlearning settings; None is the default recipe. Its seed is replaced by `seed`.
        sampler_steps: of the evaluation.
        display: where progress goes; None shows none.

    Returns:
        What metrics.json holds.
    """
    began = time.perf_counter()
    if not 0 <= forget <= 9:
        raise InputError(f"--forget must be a digit from 0 to 9, got {forget}.")
    evaluation_config = EvaluationConfig(samples=samples, sampler_steps=sampler_steps)
    config = UnlearnConfig(**(asdict(config or UnlearnConfig()) | {"seed": seed}))
    display = display or ProgressDisplay(quiet=True)
    folder = Path(model) if model is not None else shipped_model()
    output = _claim(Path(output), overwrite=overwrite, forget=forget, seed=seed)

    train, heldout = load_images("digits", split="train"), load_images("digits", split="heldout")
    before, pipeline = load_pipeline(folder), load_pipeline(folder)
    display.say(f"forgetting digit {forget}, shown by {len(train.only(forget))} images")
    result = unlearn(
        pipeline,
        train.only(forget),
        posterior=folder / "posterior.safetensors",
        config=config,
        output=output / "model",
        overwrite=True,
        observers=unlearning_observers(display, config),
    )
    unlearned = time.perf_counter()
    after = denoiser_of(result.model)
    # unlearn has moved its model to the device that the settings name; the other one is sampled there as well.
    before.unet.to(after.device)
    evaluation = evaluate(
        denoiser_of(before),
        after,
        train=train,
        heldout=heldout,
        forget=forget,
        config=evaluation_config,
        progress=display.update,
    )
    ended = time.perf_counter()
    return write_report(
        output,
        evaluation=evaluation,
        settings=asdict(config) | {"evaluation": asdict(evaluation_config)},
        seed=seed,
        seconds=result.seconds | {"evaluate": ended - unlearned, "total": ended - began},
        history=result.history,
        title=f"vdu-fast demo: forgetting the digit {forget}",
    )


def _claim(output: Path, *, overwrite: bool, forget: int, seed: int) -> Path:
    """Take the output folder when it is new or an earlier demo's, and mark it before anything else is written."""
    ours = (output / MARKER).is_file()
    prepare_output(output, overwrite=overwrite or ours)
    write_json_atomic(output / MARKER, {"written_by": "vdu-fast demo", "forget": forget, "seed": seed})
    return output
