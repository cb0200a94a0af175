"""Saliency unlearning: relabel the forget data, and change only the weights that matter for them.

Fan, Liu, Zhang, Wong, Wei, Liu, "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image
Classification and Generation" (ICLR 2024):

    mask     = the weights whose |gradient of L(D_f)|, at the original model, is among the largest (half of all)
    minimise   R(D_f) + a L(D_r)       over the weights in the mask

The paper is about conditional models, where R makes the network predict at a forget image under its own condition what
it predicts there under another one. An unconditional network has no condition to exchange. Our adaptation keeps the
idea, a random wrong label: every noised forget image is relabelled as a random retained image, and R is the error
against what would have to be predicted if it were that one (`training.relabelled_loss`). R and L are means over batch
and elements; the paper's code sets a mean beside a sum, so that its weights mean something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdu_fast.baselines.method import Method, MethodRun
from vdu_fast.baselines.training import (
    TrainingSettings,
    denoising_loss,
    descend,
    flat,
    noised_batch,
    relabelled_loss,
    trained_parameters,
)


@dataclass(frozen=True)
class SalUnSettings(TrainingSettings):
    """Settings of SalUn.

    Attributes:
        retained_weight: a.
        mask_share: share of the weights that may change, in (0, 1].
        mask_batches: batches of forget images over which the gradient for the mask is summed.
    """

    learning_rate: float = 3e-4
    retained_weight: float = 3.0
    mask_share: float = 0.5
    mask_batches: int = 10


def saliency_mask(run: MethodRun) -> list[Tensor]:
    """For every parameter, true where the summed gradient of L(D_f) is among the largest of all; bool, its shape."""
    settings, denoiser, images = run.settings, run.denoiser, run.inputs.forget_images()
    parameters = trained_parameters(denoiser)
    total = torch.zeros(sum(p.numel() for p in parameters), device=denoiser.device)
    for number in range(settings.mask_batches):
        # Another seed than that of the steps, so that the mask is not made from their noise.
        batch = noised_batch(denoiser, [images], settings.batch_size, number, run.seed ^ 0x5A1)
        loss = denoising_loss(denoiser, denoiser.predict(batch.x_t, batch.timesteps), batch)
        total += flat(torch.autograd.grad(loss, parameters))
    saliency = total.abs()
    kept = max(1, round(settings.mask_share * len(saliency)))
    mask = torch.zeros(len(saliency), dtype=torch.bool, device=saliency.device)
    mask[saliency.topk(kept).indices] = True
    parts = mask.split([p.numel() for p in parameters])
    return [part.reshape(p.shape) for part, p in zip(parts, parameters, strict=True)]


def _train(run: MethodRun) -> dict[str, Any]:
    size, sets = run.settings.batch_size, [run.inputs.forget_images(), run.inputs.retained_images()]
    parameters, mask = trained_parameters(run.denoiser), saliency_mask(run)

    def gradient(step: int) -> dict[str, float]:
        batch = noised_batch(run.denoiser, sets, size, step, run.seed)
        prediction = run.denoiser.predict(batch.x_t, batch.timesteps)
        # Both halves are shuffled, so the retained image beside a forget image is a random one.
        relabelled = relabelled_loss(run.denoiser, prediction[:size], batch[:size], batch.x0[size:])
        retained = denoising_loss(run.denoiser, prediction[size:], batch[size:])
        (relabelled + run.settings.retained_weight * retained).backward()
        for parameter, inside in zip(parameters, mask, strict=True):
            assert parameter.grad is not None
            parameter.grad.mul_(inside)  # Adam leaves a weight whose gradient was always zero where it is
        return {"relabelled_loss": float(relabelled.detach()), "retained_loss": float(retained.detach())}

    return descend(run, gradient, cost=3 * 2 * size)


SALUN = Method(
    name="salun",
    title="SalUn",
    paper="Fan, Liu, Zhang, Wong, Wei, Liu, SalUn, ICLR 2024",
    sees="forget + retained data",
    settings=SalUnSettings,
    train=_train,
)
