"""`vdu-fast posterior`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import Namespace

from vdu_fast.checkpoint import load_state
from vdu_fast.cli.parser import CommandParser, CommonOptions, command_parser, take
from vdu_fast.cli.runtime import running
from vdu_fast.errors import InputError
from vdu_fast.fisher import fisher_posterior
from vdu_fast.pipelines import denoiser_of, load_pipeline, pick_device
from vdu_fast.posterior import GaussianPosterior, RunningMoments, check_enough
from vdu_fast.progress import ProgressDisplay

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass
class PosteriorFiles:
    """Input and output of `vdu-fast posterior`.

    Args:
        output: the .safetensors file to write.
        fisher: use the diagonal Fisher information of one model instead of checkpoints.
        model: with --fisher, the pipeline folder.
        device: with --fisher, where the model runs; "auto" takes CUDA where there is one.
        overwrite: replace the output file.
    """

    output: str
    fisher: bool = False
    model: str | None = None
    device: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        path = Path(self.output)
        if path.suffix != ".safetensors" or path.is_dir():
            raise InputError(
                f"--output {path} must be a file that ends in .safetensors, such as posterior.safetensors."
            )
        if path.exists() and not self.overwrite:
            raise InputError(f"--output {path} exists: --overwrite replaces it, or name another file.")


def build_parser() -> CommandParser:
    parser = command_parser("posterior", "Estimate the Gaussian posterior over the weights of a trained model.")
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        type=str,
        metavar="PATH",
        help="two or more checkpoints of one training run: .safetensors files, pipeline folders, or folders full of "
        ".safetensors files",
    )
    parser.add_settings(PosteriorFiles, "input and output", output="FILE", model="DIR")
    parser.add_settings(RunningMoments.posterior, "with --checkpoints", skip=("self",))
    parser.add_settings(fisher_posterior, "with --fisher", skip=("denoiser", "progress"))
    parser.add_settings(CommonOptions, "how it runs")
    parser.usage = (
        "vdu-fast posterior --checkpoints PATH [PATH ...] --output FILE [options]\n"
        "       vdu-fast posterior --fisher --model DIR --output FILE [options]"
    )
    return parser


def run(arguments: Namespace, command: list[str]) -> int:
    files = take(PosteriorFiles, arguments)
    _check_source(files, arguments.checkpoints)
    with running(take(CommonOptions, arguments)) as display:
        if files.fisher:
            posterior = _from_model(files, arguments, display)
        else:
            posterior = _from_checkpoints(expand_checkpoints(arguments.checkpoints), arguments, display)
        posterior.save(files.output)
    weights = sum(std.numel() for std in posterior.std.values())
    spread = math.sqrt(sum(float(std.double().square().sum()) for std in posterior.std.values()) / weights)
    print(f"Wrote {files.output}: {weights:,} weights, root mean square of std {spread:.3g}.")
    return 0


def _check_source(files: PosteriorFiles, checkpoints: list[str] | None) -> None:
    if bool(checkpoints) == files.fisher:
        came = "both" if checkpoints else "neither"
        raise InputError(
            f"posterior takes either --checkpoints or --fisher, got {came}. Give --checkpoints PATH PATH ... of one "
            "training run, or --fisher --model DIR where there is but one."
        )
    if files.fisher and files.model is None:
        raise InputError("--fisher needs --model, the pipeline folder whose posterior is wanted.")
    if checkpoints and files.model is not None:
        raise InputError("--model goes with --fisher only; checkpoints need no model. Leave one of the two out.")


def expand_checkpoints(paths: list[str]) -> list[Path]:
    """Checkpoint files and pipeline folders, with every folder of several .safetensors files replaced by its files.

    Raises:
        InputError: a path that does not exist, a folder of pickles, or fewer than two checkpoints in all.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(
                f"--checkpoints {path} does not exist; give .safetensors files, or folders that hold them."
            )
        pipeline = (path / "model_index.json").is_file()
        inside = sorted(path.glob("*.safetensors")) if path.is_dir() and not pipeline else []
        pickles = [file for pattern in _PICKLES for file in sorted(path.glob(pattern))] if path.is_dir() else []
        if pickles and not inside:
            # As for a pickle given by name: the loader's own message says how to convert it.
            inside = pickles[:1]
            load_state(inside[0])
        found += inside or [path]
    check_enough(found)
    return found


def _from_checkpoints(paths: list[Path], arguments: Namespace, display: ProgressDisplay) -> GaussianPosterior:
    moments = RunningMoments()
    for done, path in enumerate(paths, start=1):
        moments.update(load_state(path), label=f"--checkpoints {path}")
        display.update("reading checkpoints", done, len(paths))
    return moments.posterior(shrink=arguments.shrink, floor=arguments.floor)


def _from_model(files: PosteriorFiles, arguments: Namespace, display: ProgressDisplay) -> GaussianPosterior:
    assert files.model is not None
    denoiser = denoiser_of(load_pipeline(files.model))
    denoiser.module.to(pick_device(files.device, denoiser.module))
    display.say(f"drawing {arguments.draws} images from the model, then as many gradients")
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        display.update("gradients", done, arguments.draws, lines=8)

    return take(fisher_posterior, arguments, denoiser=denoiser, progress=advance)
