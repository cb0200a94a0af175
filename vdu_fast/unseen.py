"""What a model would predict had it never seen the unwanted, by Bayes' rule over the images of a bank.

With w_j the density of a state x_t around each image x_j that the old model drew, and u_j the probability that the
image is unwanted,

    E[x_0 | x_t]  =  sum_j w_j x_j / sum_j w_j                      the old model's own
    E'[x_0 | x_t] =  sum_j w_j (1 - u_j) x_j / sum_j w_j (1 - u_j)  without the unwanted

and the old prediction is moved by the difference. Where x_t shows what it will be, the images of a bank lie too far
apart to tell it: the fewer images a mean is over, the less it says. The larger the pictures, the more noise it takes
until many images lie near; with the schedule and the latents of Stable Diffusion no noise is enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdu_fast.schedule import NoiseSchedule


class Unseen:
    """The difference for any state.

    Args:
        images: float32 [M, C, H, W], what the old model draws.
        unwanted: float [M] in [0, 1], the probability that an image is unwanted.
        schedule: the model's.
    """

    def __init__(self, images: Tensor, unwanted: Tensor, schedule: NoiseSchedule) -> None:
        self._images, self._schedule = images.flatten(1).double(), schedule
        self._squares = torch.linalg.vecdot(self._images, self._images)
        self._wanted = (1 - unwanted.double()).log()

    def change(self, x_t: Tensor, timesteps: Tensor, *, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the old predictions change by, and how much that can be trusted.

        Args:
            x_t: [N, C, H, W].
            timesteps: int64 [N].
            own: int64 [N], the image that each state became, which would outweigh all others; None: it is not here.

        Returns:
            The change, float64 [N, C, H, W], and float64 [N], the images that the narrower of the two means is over, in
            effect: 1 / sum of squared weights.
        """
        nearness = self._log_density(x_t.flatten(1).double(), timesteps)
        if own is not None:
            nearness[torch.arange(len(own)), own] = -torch.inf
        old, new = nearness.softmax(dim=1), (nearness + self._wanted).softmax(dim=1)
        x0 = ((new - old) @ self._images).reshape(x_t.shape)
        # x_t stays where it is, so what x_0 gains the noise loses.
        signal, noise = self._schedule.coefficients(timesteps, x0)
        change = self._schedule.target(x0, -signal / noise * x0, timesteps)
        return change, 1 / torch.maximum(old.square().sum(dim=1), new.square().sum(dim=1))

    def _log_density(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """log p(x_t | x_0 = each image), [N, M], up to a constant of each state; x_t is float64 [N, D]."""
        signal, noise = self._schedule.coefficients(timesteps, x_t)
        # ||x_t - signal x_0||^2 without ||x_t||^2, which is the same for all images.
        distance = signal**2 * self._squares - 2 * signal * (x_t @ self._images.T)
        return -distance / (2 * noise**2)
