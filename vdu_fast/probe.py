"""Measurements on fixed images with fixed noise, so that two of them differ only by the weights."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from vdu_fast.objective import per_sample_error
from vdu_fast.ops import standard_normal
from vdu_fast.pipelines import Denoiser
from vdu_fast.replay import ReplayBank
from vdu_fast.rng import Stream, batch_indices


class _FixedBatch:
    """States x_t [B, C, H, W], timesteps int64 [B], what the network should predict there, and C_t of each, [B].

    At most `batch_size` of them pass through the network at once.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        timesteps: Tensor,
        target: Tensor,
        weights: Tensor,
        *,
        batch_size: int,
    ) -> None:
        self.denoiser = denoiser
        # Equal parts: a last call with a handful of samples would cost as much as a full one.
        self._calls = max(1, -(-len(x_t) // batch_size))
        self.x_t, self.timesteps, self.target = (v.to(denoiser.device) for v in (x_t, timesteps, target))
        self.weight = weights[timesteps.cpu()].to(denoiser.device, torch.float32)

    def error(self) -> Tensor:
        """Per-sample weighted squared error with the weights as they are now, float [B]."""
        tensors = self.x_t, self.timesteps, self.target, self.weight
        with self.denoiser.evaluating():
            parts = zip(*(t.tensor_split(self._calls) for t in tensors), strict=True)
            return torch.cat([per_sample_error(self.denoiser.predict(x, t), y, w) for x, t, y, w in parts])


class NoisePredictionProbe(_FixedBatch):
    """The mean squared prediction error on a fixed batch of (x_0, t, eps).

    Timesteps are spread evenly, which makes the estimate steadier than random ones.

    Args:
        denoiser: gives schedule and device.
        images: float [N, C, H, W]; used again from the start when `size` exceeds N.
        size: samples in the batch; below 256 the measure is too noisy to stop by.
        seed: of the choice of images and noise.
        window: [low, high) of timesteps, None for all.
        weights: C_t, [T].
        batch_size: samples per network call.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        images: Tensor,
        *,
        size: int,
        seed: int,
        weights: Tensor,
        window: tuple[int, int] | None = None,
        batch_size: int = 250,
    ) -> None:
        low, high = window or (0, len(denoiser.schedule))
        timesteps = (low + (torch.arange(size) * 2 + 1) * (high - low) // (2 * size)).to(denoiser.device)
        x0 = images[batch_indices(len(images), size, 0, seed, stream=Stream.PROBE)].to(denoiser.device)
        eps = standard_normal(x0.shape, seed, stream=Stream.PROBE).to(denoiser.device)
        x_t = denoiser.schedule.add_noise(x0, eps, timesteps)
        target = denoiser.schedule.target(x0, eps, timesteps)
        super().__init__(denoiser, x_t, timesteps, target, weights, batch_size=batch_size)


def error_curve(
    denoiser: Denoiser, images: Tensor, *, size: int, seed: int, weights: Tensor, batch_size: int = 250
) -> Tensor:
    """The error on `images` as a function of the timestep, with the weights as they are now, float32 [T].

    Errors span two orders of magnitude from clean images to noise, so anything that is compared with "the error before"
    needs it at its own timestep. Measured at `size` even timesteps, averaged in the logarithm over a fortieth of the
    range, and interpolated.
    """
    probe = NoisePredictionProbe(denoiser, images, size=size, seed=seed, weights=weights, batch_size=batch_size)
    log_error = probe.error().double().cpu().clamp_min(1e-12).log()
    reach = max(1, size // 80)
    padded = torch.cat([log_error[:reach].flip(0), log_error, log_error[-reach:].flip(0)])
    smooth = padded.unfold(0, 2 * reach + 1, 1).mean(dim=1).numpy()
    timesteps = numpy.arange(len(denoiser.schedule))
    curve = numpy.interp(timesteps, probe.timesteps.cpu().numpy(), smooth)
    return torch.from_numpy(curve).exp().float().to(denoiser.device)


class ReplayProbe(_FixedBatch):
    """The mean squared distance to the old predictions on a fixed batch of the replay bank."""

    def __init__(
        self, denoiser: Denoiser, bank: ReplayBank, *, size: int, seed: int, weights: Tensor, batch_size: int = 250
    ) -> None:
        batch = bank.batch(min(size, len(bank)), 0, seed ^ 0x5EED)
        super().__init__(denoiser, *batch, weights, batch_size=batch_size)
