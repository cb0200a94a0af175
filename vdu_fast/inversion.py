"""From an image back to the noise that a model would draw it from, by its deterministic sampler run backwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdu_fast.pipelines import Denoiser
from vdu_fast.sampling import sampler_for, schedule_index


def invert_images(denoiser: Denoiser, images: Tensor, *, steps: int = 50, batch_size: int = 250) -> Tensor:
    """The noise x_T that `sampling.decode_noise` brings back to these images, up to the error of the steps.

    Every step of the sampler is solved for its input, with the prediction at the step's output in the place of the
    unknown one at its input: DDIM inversion (Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis",
    2021, appendix F), or Euler steps backwards for flow matching. Where the network predicts x_0, no noise follows from
    its prediction for a clean image, and the image is taken for the first noised state.

    Args:
        images: float32 [N, C, H, W] in [-1, 1].
        steps: network evaluations per image, the same as for decoding.
        batch_size: images per network call.

    Returns:
        float32 [N, C, H, W] on the CPU.
    """
    noise = torch.empty(images.shape)
    with denoiser.evaluating():
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            x_t = images[rows].to(denoiser.device, denoiser.dtype)
            noise[rows] = _invert(denoiser, steps, x_t).float().cpu()
    return noise


def _invert(denoiser: Denoiser, steps: int, x_t: Tensor) -> Tensor:
    sampler, kind = sampler_for(denoiser, steps), denoiser.schedule.prediction_type
    inverse = None if kind == "velocity" else _inverse_of(sampler)
    # Steps are numbered as the sampler takes them, and are taken from the last one up.
    for i in reversed(range(len(sampler.timesteps) - (kind == "sample"))):
        timestep = sampler.timesteps[i]
        timesteps = schedule_index(denoiser, timestep).to(x_t.device).expand(len(x_t))
        prediction = denoiser.predict(x_t, timesteps, repeated=True)
        if inverse is None:
            x_t = x_t + (sampler.sigmas[i] - sampler.sigmas[i + 1]) * prediction
        else:
            x_t = inverse.step(prediction, int(timestep), x_t).prev_sample
    return x_t


def _inverse_of(sampler: Any) -> Any:
    """diffusers' inverse of a DDIM scheduler, over the same noise levels.

    Predictions of x_0 are not clipped: what was cut off could not be undone.
    """
    from diffusers import DDIMInverseScheduler

    inverse = DDIMInverseScheduler.from_config(sampler.config, timestep_spacing="leading", clip_sample=False)
    # `step` goes by these alone, whatever the spacing of the timesteps that it is called with.
    inverse.alphas_cumprod, inverse.initial_alpha_cumprod = sampler.alphas_cumprod, sampler.final_alpha_cumprod
    inverse.num_inference_steps = sampler.num_inference_steps
    return inverse
