"""From diffusers folders to what unlearning needs of them (network, schedule, image shape), and back."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdu_fast.checkpoint import current_umask, replacing_folder
from vdu_fast.errors import InputError
from vdu_fast.execution import Execution, differing_gradients
from vdu_fast.modules import unwrapped
from vdu_fast.schedule import NoiseSchedule

logger = logging.getLogger(__name__)

SUPPORTED = "unconditional pixel-space pipelines with a UNet2DModel (DDPMPipeline, DDIMPipeline and the like)"


class Denoiser:
    """A network that maps (x_t, timesteps) to a prediction, together with its noise schedule.

    Args:
        module: any nn.Module called as module(x_t, timesteps), taken out of DataParallel, DistributedDataParallel and
            torch.compile, whose wrappers rename the parameters; returns a tensor, or an object or tuple whose first
            field (`sample`) is one. An output of twice the channels is read as (prediction, learned variance).
        scheduler: the diffusers scheduler it was trained with, or a NoiseSchedule.
        sample_shape: (C, H, W) of one image.

    Attributes:
        execution: how the network is run, plainly at first; may be set at any time.
    """

    def __init__(self, module: nn.Module, scheduler: Any, sample_shape: tuple[int, int, int]) -> None:
        self.module = unwrapped(module)
        self.scheduler = scheduler
        self.schedule = scheduler if isinstance(scheduler, NoiseSchedule) else NoiseSchedule.from_scheduler(scheduler)
        self.sample_shape = sample_shape
        self.execution = Execution()
        self._compiled: tuple[str, Callable[..., Any]] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def predict(self, x_t: Tensor, timesteps: Tensor, *, repeated: bool = False) -> Tensor:
        """The network's prediction, of the shape of x_t [B, C, H, W], for schedule indices timesteps int64 [B].

        `repeated` calls come many times with one B: these are compiled, where `execution` says so.
        """
        arguments = x_t.to(self.dtype), self.schedule.model_timesteps(timesteps)
        output = self._call_compiled(*arguments) if repeated else self.execution.call(self.module, *arguments)
        if not isinstance(output, Tensor):
            output = output.sample if hasattr(output, "sample") else output[0]
        if output.shape[1] == 2 * x_t.shape[1]:
            output = output[:, : x_t.shape[1]]
        # Samplers and losses go on from here in the model's own dtype, whatever autocast left.
        return output.to(self.dtype)

    def _call_compiled(self, x_t: Tensor, timesteps: Tensor) -> Any:
        """By the compiled network; where it cannot be compiled, by the plain one from now on, with a warning."""
        mode = self.execution.compile
        if self._compiled is None or self._compiled[0] != mode:
            self._compiled = mode, self.execution.compiled(self.module)
        try:
            return self.execution.call(self._compiled[1], x_t, timesteps)
        except Exception as error:
            if mode == "off":
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            logger.warning("torch.compile cannot be used here, so the network runs uncompiled: %s", reason[0])
            self.execution = replace(self.execution, compile="off")
            return self.execution.call(self.module, x_t, timesteps)

    def check_compiled(self, x_t: Tensor, timesteps: Tensor) -> None:
        """Where the compiled network has other gradients than the plain one: say so, and compile no more."""
        if self.execution.compile == "off":
            return

        def loss(repeated: bool) -> Tensor:
            return self.predict(x_t, timesteps, repeated=repeated).float().square().mean()

        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if wrong := differing_gradients(lambda: loss(False), lambda: loss(True), trained):
            logger.warning(
                "torch.compile gives %d of %d parameters a wrong gradient (%s, ...), so the network runs uncompiled. "
                "Leave --compile out, or try another version of torch.", len(wrong), len(trained), wrong[0],
            )  # fmt: skip
            self.execution = replace(self.execution, compile="off")

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off and no autograd inside the block; the module's mode is put back after it."""
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train(training)


def load_pipeline(path: Path | str, *, argument: str = "model") -> Any:
    """Load a diffusers pipeline folder from the disk, safetensors only; `argument` is what messages call it.

    Raises:
        InputError: the folder is missing, is no pipeline, holds only pickled weights, or is conditional.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(
            f"--{argument} {path} does not exist or is not a folder; give a folder written by save_pretrained."
        )
    if not (path / "model_index.json").is_file():
        raise InputError(
            f"--{argument} {path} has no model_index.json, so it is no diffusers pipeline. Write one with "
            "DDPMPipeline(unet=..., scheduler=...).save_pretrained(folder), or `vdu-fast pretrain`."
        )
    import diffusers

    # diffusers reports a progress bar and optional packages through its logger; neither is for our users.
    diffusers.utils.logging.disable_progress_bar()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    _refuse_conditional(diffusers.DiffusionPipeline.load_config(str(path), local_files_only=True), path, argument)
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(str(path), use_safetensors=True, local_files_only=True)
    except Exception as error:
        pickled = [*path.rglob("*.bin"), *path.rglob("*.ckpt"), *path.rglob("*.pt")]
        if pickled and not list(path.rglob("*.safetensors")):
            raise InputError(
                f"--{argument} {path} holds only pickled weights ({pickled[0].name}), which can run code when loaded. "
                "Convert them where you trust them: pipeline.save_pretrained(folder, safe_serialization=True)."
            ) from error
        raise InputError(
            f"--{argument} {path} could not be loaded by diffusers: {str(error).splitlines()[0]}"
        ) from error
    denoiser_of(pipeline)
    return pipeline


def _refuse_conditional(index: dict[str, Any], path: Path, argument: str) -> None:
    parts = {name for name, value in index.items() if isinstance(value, list | tuple) and value[0] is not None}
    extra = sorted(parts - {"unet", "scheduler"})
    if "unet" not in parts or extra:
        raise InputError(
            f"--{argument} {path} is a {index.get('_class_name', 'pipeline')} of {', '.join(extra or sorted(parts))}, "
            f"which is conditional or works in a latent space. Supported: {SUPPORTED}."
        )


def denoiser_of(pipeline: Any) -> Denoiser:
    """The Denoiser of a loaded pipeline; InputError when it is conditional."""
    unet, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    if unet is None or scheduler is None:
        raise InputError(f"{type(pipeline).__name__} has no unet and scheduler. Supported: {SUPPORTED}.")
    config: Any = unwrapped(unet).config
    conditional = getattr(config, "num_class_embeds", None) or getattr(config, "class_embed_type", None)
    if conditional or hasattr(config, "cross_attention_dim"):
        raise InputError(f"{type(pipeline).__name__} has a conditional {type(unet).__name__}. Supported: {SUPPORTED}.")
    size = config.sample_size
    if size is None:
        raise InputError("the unet's config has no sample_size; set it to the size of the images it was trained on.")
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return Denoiser(unet, scheduler, (config.in_channels, height, width))


def pick_device(name: str, module: nn.Module) -> torch.device:
    """The device of that name; "auto" is the accelerator that the module is on already, else CUDA where there is one.

    Raises:
        InputError: torch knows no such device, or there is none here.
    """
    if name == "auto":
        here = next(module.parameters()).device
        return here if here.type != "cpu" or not torch.cuda.is_available() else torch.device("cuda")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(
            f"device {name!r} cannot be used here ({str(error).splitlines()[0]}). Use 'auto' or 'cpu'; "
            "`vdu-fast doctor` lists the devices."
        ) from error
    return device


def save_pipeline(pipeline: Any, path: Path) -> None:
    """Write a pipeline into `path`; a crash leaves the old files or the new ones."""
    with replacing_folder(path) as staged:
        pipeline.save_pretrained(str(staged), safe_serialization=True)
        # diffusers leaves its weights readable by their writer alone.
        for file in staged.rglob("*.safetensors"):
            file.chmod(0o666 & ~current_umask())
