"""Samples per second for evaluation, against the plain diffusers DDIM pipeline, and how far the samples differ."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vdu_fast.benchmarks.case import Case, Line, Setting, question
from vdu_fast.execution import Execution

OPTIONS = {
    "float32": Execution(),
    "channels_last": Execution(channels_last=True),
    "bfloat16": Execution("bfloat16"),
    "compile": Execution(compile="default"),
    "bfloat16, compile": Execution("bfloat16", compile="default"),
}
GPU_OPTIONS = {
    "reduce-overhead": Execution(compile="reduce-overhead"),
    "bfloat16, channels_last, reduce-overhead": Execution("bfloat16", True, "reduce-overhead"),
}
COUNT, STEPS, BATCH = 250, 10, 250


def _plain(pipeline: Any) -> Tensor:
    """What DDIMPipeline draws from the noise that ours starts from, [N, C, H, W] in [-1, 1]."""
    from vdu_fast.rng import Stream, standard_normal

    size = pipeline.unet.config.sample_size
    noise = standard_normal((COUNT, pipeline.unet.config.in_channels, size, size), 0, stream=Stream.SAMPLER)
    noise = noise.to(pipeline.device)
    with mock.patch("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", return_value=noise):
        images = pipeline(batch_size=COUNT, num_inference_steps=STEPS, eta=0.0, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


@question("evaluation sampling on digits", group="loop", needs=("diffusers",))
def sampling(setting: Setting) -> Case:
    from diffusers import DDIMPipeline, DDIMScheduler

    from vdu_fast.demo import shipped_model
    from vdu_fast.pipelines import denoiser_of, load_pipeline
    from vdu_fast.sampling import sample_images

    shipped = load_pipeline(shipped_model())
    plain = DDIMPipeline(shipped.unet, DDIMScheduler.from_config(shipped.scheduler.config)).to(setting.device)
    plain.set_progress_bar_config(disable=True)
    calls, columns, expected = {}, dict[str, Line](), _plain(plain)
    for name, execution in (OPTIONS | (GPU_OPTIONS if setting.device.type == "cuda" else {})).items():
        denoiser = denoiser_of(load_pipeline(shipped_model()))
        denoiser.module.to(setting.device)
        denoiser.execution = execution

        def ours(denoiser: Any = denoiser) -> Tensor:
            return sample_images(denoiser, COUNT, steps=STEPS, batch_size=BATCH)

        calls[name] = ours
        difference = (ours() - expected).abs()
        columns[name] = {
            "note": f"differs by at most {float(difference.max()):.1e}, {float(difference.mean()):.1e} on average"
        }
    return Case(
        {"diffusers DDIMPipeline": lambda: _plain(plain)},
        calls,
        COUNT,
        unit=f"image of {STEPS} steps",
        per_backend=False,
        columns=columns,
    )
