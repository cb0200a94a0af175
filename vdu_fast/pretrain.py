"""Training a DDPM with diffusers, keeping checkpoints and recording the posterior on the way.

The learning rate is constant first and annealed to zero at the end. The posterior's variance is recorded in the second
half of the constant part, its mean is the annealed average: a model that is not at rest cannot be unlearned cleanly.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdu_fast.checkpoint import (
    StoppedAtOnce,
    load_tensors,
    prepare_output,
    save_tensors,
    uninterrupted,
    write_json_atomic,
)
from vdu_fast.data import ImageSet
from vdu_fast.errors import InputError
from vdu_fast.ops import standard_normal
from vdu_fast.pipelines import pick_device, save_pipeline
from vdu_fast.posterior import PosteriorRecorder
from vdu_fast.rng import Stream, batch_indices, randint
from vdu_fast.schedule import NoiseSchedule

STATE_FILE = "resume/pretrain.safetensors"


@dataclass
class PretrainConfig:
    """Settings of `vdu-fast pretrain`.

    Args:
        steps: optimizer steps at the constant learning rate.
        anneal_steps: further steps in which the learning rate falls linearly to zero.
        batch_size: images per step.
        learning_rate: of Adam, after warm-up.
        warmup_steps: steps in which the learning rate rises from zero.
        channels: channels of the U-Net at each resolution; every further one halves the size.
        layers_per_block: residual layers per resolution.
        attention: whether the lowest resolution has self-attention (the middle block always has).
        ema_decay: decay of the averaged weights, which are what is saved.
        checkpoints: number of checkpoints kept for the posterior, evenly spaced over the second half of `steps`.
        max_gradient_norm: gradients are clipped to this norm.
        prediction_type: what the network predicts: epsilon, v_prediction or sample.
        save_every: steps between saves of the state that --resume needs.
        device: "auto" takes CUDA where there is one.
        seed: of weights, batches, timesteps and noise.
    """

    steps: int = 3000
    anneal_steps: int = 600
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    channels: tuple[int, ...] = (32, 64)
    layers_per_block: int = 1
    attention: bool = False
    ema_decay: float = 0.99
    checkpoints: int = 10
    max_gradient_norm: float = 1.0
    prediction_type: str = "epsilon"
    save_every: int = 200
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        self.channels = tuple(self.channels)
        for name in ("steps", "batch_size", "layers_per_block", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.checkpoints < 2 or self.checkpoints > self.steps // 2:
            raise InputError(
                f"checkpoints must be between 2 and steps / 2 = {self.steps // 2}, got {self.checkpoints}."
            )
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise InputError(f"prediction_type must be epsilon, v_prediction or sample, got {self.prediction_type!r}.")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must be in [0, 1), got {self.ema_decay}.")
        for name in ("anneal_steps", "warmup_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        for name in ("learning_rate", "max_gradient_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name} must be a positive number, got {getattr(self, name)}.")
        if not self.channels or any(c % 8 for c in self.channels):
            raise InputError(
                f"channels must be multiples of 8 (group normalisation has 8 groups), got {self.channels}."
            )


def build_unet(config: PretrainConfig, image_channels: int, size: int) -> nn.Module:
    """A diffusers UNet2DModel for square images of the given size, initialised from the seed."""
    from diffusers import UNet2DModel

    levels = len(config.channels)
    if size % 2 ** (levels - 1):
        raise InputError(
            f"images of {size} x {size} cannot be halved {levels - 1} times: give fewer --channels or --resize."
        )
    down = ["DownBlock2D"] * (levels - 1) + ["AttnDownBlock2D" if config.attention else "DownBlock2D"]
    up = ["AttnUpBlock2D" if config.attention else "UpBlock2D"] + ["UpBlock2D"] * (levels - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return UNet2DModel(  # type: ignore[return-value]
            sample_size=size,
            in_channels=image_channels,
            out_channels=image_channels,
            layers_per_block=config.layers_per_block,
            block_out_channels=config.channels,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            norm_num_groups=8,
        )


class Pretraining:
    """The state of a training run and its one step; everything random is a function of (seed, step)."""

    def __init__(self, data: ImageSet, config: PretrainConfig) -> None:
        from diffusers import DDPMScheduler

        _, channels, height, width = data.images.shape
        if height != width:
            raise InputError(f"pretraining needs square images, {data.name} has {height} x {width}; give --resize.")
        self.data, self.config = data, config
        self.scheduler = DDPMScheduler(1000, prediction_type=config.prediction_type)
        self.schedule = NoiseSchedule.from_scheduler(self.scheduler)
        self.unet = build_unet(config, channels, height)
        self.device = pick_device(config.device, self.unet)
        self.unet.to(self.device)
        self.average = [p.detach().clone() for p in self.unet.parameters()]
        self.optimizer = torch.optim.Adam(self.unet.parameters(), lr=config.learning_rate, fused=True)
        # The last of `checkpoints` records falls on the last constant step.
        every = config.steps // 2 // config.checkpoints
        self.recorder = PosteriorRecorder(self.unet, every=every, start=config.steps - every * config.checkpoints)
        self.step = 0
        self.losses: list[float] = []

    @property
    def total(self) -> int:
        return self.config.steps + self.config.anneal_steps

    def learning_rate(self) -> float:
        config = self.config
        factor = min(1.0, (self.step + 1) / max(config.warmup_steps, 1))
        if self.step >= config.steps:
            factor = 1 - (self.step - config.steps) / config.anneal_steps
        return config.learning_rate * factor

    def train_step(self) -> tuple[float, bool]:
        """One optimizer step; returns the loss and whether the posterior took a record."""
        config, step = self.config, self.step
        rows = batch_indices(len(self.data), config.batch_size, step, config.seed)
        x0 = self.data.images[rows].to(self.device)
        timesteps = randint(len(self.schedule), len(x0), config.seed, step, stream=Stream.TIMESTEPS).to(self.device)
        eps = standard_normal(x0.shape, config.seed, step, stream=Stream.IMAGE_NOISE, device=self.device)
        prediction = self.unet(self.schedule.add_noise(x0, eps, timesteps), timesteps).sample
        loss = (prediction - self.schedule.target(x0, eps, timesteps)).square().mean()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), config.max_gradient_norm)
        self.optimizer.step()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.unet.parameters()], 1 - decay)
        self.step += 1
        recorded = self.recorder.step() if self.step <= config.steps else False
        self.losses.append(loss.item())
        return self.losses[-1], recorded

    def averaged_unet(self) -> nn.Module:
        """Put the averaged weights into the network and return it."""
        with torch.no_grad():
            for parameter, average in zip(self.unet.parameters(), self.average, strict=True):
                parameter.copy_(average)
        return self.unet

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors that restore the run exactly."""
        state = {f"unet.{name}": t for name, t in self.unet.state_dict().items()}
        state |= {f"average.{i}": t for i, t in enumerate(self.average)}
        for i, parameter in enumerate(self.unet.parameters()):
            state |= {f"adam.{i}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        state |= {f"recorder.{name}": t for name, t in self.recorder.state_dict().items()}
        state["step"] = torch.tensor(self.step)
        state["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""

        def under(prefix: str) -> dict[str, Tensor]:
            # A state read from a file lies on the CPU.
            return {name[len(prefix) :]: t.to(self.device) for name, t in state.items() if name.startswith(prefix)}

        self.unet.load_state_dict(under("unet."))
        average = under("average.")
        self.average = [average[str(i)] for i in range(len(self.average))]
        for i, parameter in enumerate(self.unet.parameters()):
            self.optimizer.state[parameter] = dict(under(f"adam.{i}."))
        self.recorder.load_state_dict(under("recorder."))
        self.step = int(state["step"])
        self.losses = state["losses"].tolist()


def pretrain(
    data: ImageSet,
    output: Path | str,
    config: PretrainConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Train a pipeline on `data` and write it to `output`.

    `output` receives the pipeline folder (model_index.json, unet/, scheduler/), posterior.safetensors,
    checkpoints/step-*.safetensors and pretrain.json with settings, losses and time.

    Args:
        data: the training images.
        output: the folder; see `prepare_output` for the flags.
        config: the settings; with `resume` they must be those of the interrupted run.
        on_step: called after each step with a dict of step, total, loss, images_per_second.

    Raises:
        InputError: unusable settings, device or folder; a loss that is not finite (the last saved state is kept).
    """
    run = Pretraining(data, config)
    output = prepare_output(output, overwrite=overwrite, resume=resume, owned=STATE_FILE)
    pixels = hashlib.sha256(data.images.numpy().tobytes()).hexdigest()[:16]
    settings = json.dumps(asdict(config) | {"data": data.name, "images": len(data), "pixels": pixels})
    if resume:
        state, metadata = load_tensors(output / STATE_FILE)
        if metadata["settings"] != settings:
            raise InputError(
                f"--resume: the interrupted run had other settings: {metadata['settings']}; now {settings}."
            )
        run.load_state_dict(state)

    def save_state() -> None:
        save_tensors(output / STATE_FILE, run.state_dict(), {"settings": settings})

    if not resume:
        # What an earlier run left must not mix with the checkpoints and the state of this one.
        for stale in [*(output / "checkpoints").glob("step-*.safetensors"), output / STATE_FILE]:
            stale.unlink(missing_ok=True)

    began, first = time.perf_counter(), run.step
    try:
        while run.step < run.total:
            with uninterrupted():
                loss, recorded = run.train_step()
                if recorded:
                    weights = dict(run.unet.named_parameters())
                    save_tensors(output / f"checkpoints/step-{run.step:06d}.safetensors", weights)
            if not math.isfinite(loss):
                kept = f"The state of the last save is kept in {output / STATE_FILE}. "
                raise InputError(
                    f"the training loss became {loss} at step {run.step}. "
                    f"{kept if (output / STATE_FILE).is_file() else ''}Start anew with a lower --learning_rate."
                )
            if run.step % config.save_every == 0 and run.step < run.total:
                save_state()
            if on_step is not None:
                rate = config.batch_size * (run.step - first) / (time.perf_counter() - began)
                on_step({"step": run.step, "total": run.total, "loss": loss, "images_per_second": rate})
    except StoppedAtOnce:
        raise  # in the middle of a step: the last save stands
    except KeyboardInterrupt:
        save_state()
        raise
    _finish(run, output, data, time.perf_counter() - began)
    return output


def _finish(run: Pretraining, output: Path, data: ImageSet, seconds: float) -> None:
    from diffusers import DDPMPipeline

    unet = run.averaged_unet().eval()
    save_pipeline(DDPMPipeline(unet=unet, scheduler=run.scheduler), output)  # type: ignore[arg-type]
    posterior = run.recorder.posterior()
    # The mean is the model beside it, and ten checkpoints know a std to a quarter of its value: eight bits say it all.
    posterior.mean = None
    posterior.save(output / "posterior.safetensors", std_dtype=torch.bfloat16)
    record = {
        "settings": asdict(run.config),
        "data": {"name": data.name, "images": len(data)},
        "parameters": sum(p.numel() for p in unet.parameters()),
        "seconds_of_last_run": seconds,
        "torch": torch.__version__,
        "device": run.device.type,
        "threads": torch.get_num_threads(),
        "mean_loss_of_last_100_steps": sum(run.losses[-100:]) / len(run.losses[-100:]),
        "losses": [round(loss, 5) for loss in run.losses],
    }
    write_json_atomic(output / "pretrain.json", record)
    (output / STATE_FILE).unlink(missing_ok=True)
    if (output / "resume").is_dir() and not any((output / "resume").iterdir()):
        (output / "resume").rmdir()
