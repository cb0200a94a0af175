"""noise_prediction_error and its backward: squared distance to a target that is made, not stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdu_fast.kernels.access import read, write
from vdu_fast.kernels.batch import Batch, coefficient, columns_of, image_noise, rows_of
from vdu_fast.kernels.launch import VARYING, check_beside, float32_only, integer, launch, vector
from vdu_fast.kernels.sums import fold, partials_of


@triton.jit
def _difference(
    prediction, x0, signal, noise, seed, step, row, at, inside, samples, elements, chunks,
    NOISY: tl.constexpr, GROUPED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """prediction - (signal x_0 + noise eps); without x_0 the target is noise eps, without noise signal x_0."""
    predicted = read(prediction, at, inside)
    if NOISY:
        eps = image_noise(seed, step, row, elements, chunks, GROUPED, COLUMNS)
        target = coefficient(noise, row, samples, 1.0) * eps
        if x0 is not None:
            target = coefficient(signal, row, samples, 1.0) * read(x0, at, inside) + target
        return predicted - target
    else:
        return predicted - coefficient(signal, row, samples, 1.0) * read(x0, at, inside)


@triton.jit(do_not_specialize=VARYING)
def noise_prediction_error_kernel(
    prediction, partials, x0, signal, noise, seed, step, samples, elements, chunks,
    NOISY: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = rows_of(chunks, ROWS), columns_of(chunks, COLUMNS)
    at = row[:, None] * elements + column[None, :]
    inside = (row < samples)[:, None] & (column < elements)[None, :]
    d = _difference(
        prediction, x0, signal, noise, seed, step, row, at, inside, samples, elements, chunks, NOISY, GROUPED, COLUMNS
    )
    terms = tl.where(inside, d * d, 0.0).to(tl.float64)
    slot = row * chunks + tl.program_id(0) % chunks
    tl.store(partials + slot, tl.sum(terms, axis=1), mask=row < samples)


@triton.jit(do_not_specialize=VARYING)
def noise_prediction_error_backward_kernel(
    out, grad, prediction, x0, signal, noise, seed, step, samples, elements, chunks,
    NOISY: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = rows_of(chunks, ROWS), columns_of(chunks, COLUMNS)
    at = row[:, None] * elements + column[None, :]
    inside = (row < samples)[:, None] & (column < elements)[None, :]
    d = _difference(
        prediction, x0, signal, noise, seed, step, row, at, inside, samples, elements, chunks, NOISY, GROUPED, COLUMNS
    )
    scale = 2.0 * coefficient(grad, row, samples, 0.0)
    # A sample that a hinge has let go of has no gradient, even where its prediction is not finite.
    write(out, at, inside, tl.where(scale == 0.0, 0.0, scale * d))


def _arguments(
    prediction: Tensor, x0: Tensor | None, signal: Tensor | None, noise: Tensor | None, seed: Tensor, step: Tensor
) -> tuple[Batch, tuple[object, ...], dict[str, object]]:
    """What both kernels take: the batch, arguments from x_0 on, and compile-time arguments."""
    batch = Batch.of(prediction)
    check_beside(prediction, target=x0)
    target = None if x0 is None else x0.contiguous()
    coefficients = (vector(values, name, batch.samples, prediction) for name, values in
                    (("signal", signal), ("noise", noise)))  # fmt: skip
    draw = integer(seed, "seed", prediction), integer(step, "step", prediction)
    noisy = x0 is None or noise is not None
    extent = batch.samples, batch.elements, batch.chunks
    return batch, (target, *coefficients, *draw, *extent), {"NOISY": noisy, **batch.options}


@float32_only("prediction")
def noise_prediction_error(
    prediction: Tensor, x0: Tensor | None, signal: Tensor | None, noise: Tensor | None, seed: Tensor, step: Tensor
) -> Tensor:
    """Sum of (target - prediction)^2 over the elements of every sample, float32 [B]."""
    prediction = prediction.contiguous()
    batch, arguments, options = _arguments(prediction, x0, signal, noise, seed, step)
    partials = partials_of(prediction, batch.samples, batch.chunks)
    launch(noise_prediction_error_kernel, batch.programs, prediction, partials, *arguments, **options)
    return fold(partials, torch.empty(batch.samples, dtype=torch.float32, device=prediction.device))


@float32_only("prediction")
def noise_prediction_error_backward(
    grad: Tensor,
    prediction: Tensor,
    x0: Tensor | None,
    signal: Tensor | None,
    noise: Tensor | None,
    seed: Tensor,
    step: Tensor,
) -> Tensor:
    """2 grad (prediction - target) with the noise drawn again; grad is [B]."""
    prediction = prediction.contiguous()
    batch, arguments, options = _arguments(prediction, x0, signal, noise, seed, step)
    out = torch.empty_like(prediction)
    grad = vector(grad, "grad", batch.samples, prediction)
    launch(noise_prediction_error_backward_kernel, batch.programs, out, grad, prediction, *arguments, **options)
    return out
