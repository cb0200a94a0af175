"""The unlearning objective

    L(theta) = -(1 - gamma) A + gamma B + lambda B_f

    A   = E C_t || target - prediction(x_t, t) ||^2  over the forget data     pushed up: the data become unlikely
    B   = KL(q || p(theta | D))                                                weights stay near the trained ones
    B_f = E C_t || prediction(x_t, t) - old prediction ||^2  over replays      what the model draws stays the same

after Panda et al., "Variational Diffusion Unlearning" (arXiv 2510.04058), with B_f as the term in function space.

Reductions are part of the meaning of gamma and lambda. Under "mean", A and B_f are means over batch and elements, and B
is divided by the number of parameters. Under "sum", A is the unbiased estimate of the sum over all forget images,
timesteps and elements, B_f the expected sum over timesteps and elements, and B is the plain KL.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from vdu_fast import ops
from vdu_fast.reference import Saturation, saturate

ObjectiveReduction = Literal["mean", "sum"]


def per_sample_error(
    prediction: Tensor, target: Tensor | None, weight: Tensor, *, seed: int = 0, draw: int = 0, **mixed: Any
) -> Tensor:
    """C_t times the mean squared error of each sample, float [B]; `weight` is C_t of the samples, [B].

    Without a target it is the noise of (seed, draw), drawn again; `mixed` are the signal and noise coefficients of
    `ops.noise_prediction_loss` for the other prediction types.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    if target is not None:
        mixed["target"] = target.to(dtype)
    error = ops.noise_prediction_loss(prediction.to(dtype), seed, draw, weight=weight, reduction="none", **mixed)
    return error / prediction[0].numel()


def ascent_loss(
    error: Tensor, saturation: Saturation, *, limit: Tensor, beta: Tensor, reference: Tensor | None
) -> Tensor:
    """What is minimised so that `error` grows: a scalar, the mean over the batch.

    Args:
        error: [B], per-sample errors on the forget data.
        saturation: see `vdu_fast.reference.saturate`.
        limit: for "hinge", [B].
        beta: for "npo", [B], in units of 1 / error.
        reference: for "npo", [B], the errors of the model before unlearning on the same samples.
    """
    return -saturate(error, saturation, limit=limit, beta=beta, before=reference).mean()


def forget_scale(reduction: ObjectiveReduction, *, images: int, timesteps: int, elements: int) -> float:
    """Factor from a batch mean of mean squared errors to A.

    Under "sum", (|D_f| / b) sum_batch T C_t ||.||^2 = |D_f| T dim(x) times the batch mean: unbiased for the sum over
    all images and `timesteps`, the number of timesteps drawn from.
    """
    return float(images * timesteps * elements) if reduction == "sum" else 1.0


def regularizer_scale(reduction: ObjectiveReduction, parameters: int) -> float:
    """Factor from the KL summed over parameters to B."""
    return 1.0 if reduction == "sum" else 1.0 / parameters
