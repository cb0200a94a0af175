"""gaussian_kl, quadratic_penalty, their gradients, and variational_gradients, which has all in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdu_fast.kernels.access import groups, is_whole, place, read, total, within, write
from vdu_fast.kernels.elementary import exponential, natural_log
from vdu_fast.kernels.launch import (
    VARYING,
    block,
    check_beside,
    float32_only,
    integer,
    over_elements,
    vector,
)
from vdu_fast.kernels.noise import WEIGHTS, normals
from vdu_fast.kernels.sums import CHUNK, CHUNK_WARPS, chunks_of, fold, partials_of


@triton.jit
def _kl(mean, log_std, prior_mean, prior_std, at, inside):
    prior = read(prior_std, at, inside)
    scaled = tl.div_rn(read(mean, at, inside) - read(prior_mean, at, inside), prior)
    if log_std is None:
        return total(0.5 * scaled * scaled, inside)
    else:
        ratio = read(log_std, at, inside) - natural_log(prior)
        return total(0.5 * exponential(2.0 * ratio) + 0.5 * scaled * scaled - ratio - 0.5, inside)


@triton.jit
def gaussian_kl_kernel(
    partials, mean, log_std, prior_mean, prior_std, numel,
    SKIP: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = place(SKIP, BLOCK)
    if SPLIT:
        if is_whole(numel, BLOCK):
            kl = _kl(mean, log_std, prior_mean, prior_std, at, None)
        else:
            kl = _kl(mean, log_std, prior_mean, prior_std, at, within(at, numel, SKIP))
    else:
        kl = _kl(mean, log_std, prior_mean, prior_std, at, within(at, numel, SKIP))
    tl.store(partials + tl.program_id(0), kl)


@triton.jit
def precision_root(prior_std):
    """1 / prior_std: one division, which costs as much as twenty products."""
    return tl.div_rn(tl.zeros_like(prior_std) + 1.0, prior_std)


@triton.jit
def _kl_backward(
    d_mean, d_log_std, d_prior_mean, d_prior_std, grad, mean, log_std, prior_mean, prior_std, at, inside
):  # fmt: skip
    scale = tl.load(grad).to(tl.float32)
    root = precision_root(read(prior_std, at, inside))
    scaled = (read(mean, at, inside) - read(prior_mean, at, inside)) * root
    pull = scale * (scaled * root)
    stretch = scaled * scaled
    if log_std is not None:
        ratio = exponential(read(log_std, at, inside)) * root
        excess = ratio * ratio - 1.0
        stretch = excess + stretch
        if d_log_std is not None:
            write(d_log_std, at, inside, scale * excess)
    if d_mean is not None:
        write(d_mean, at, inside, pull)
    if d_prior_mean is not None:
        write(d_prior_mean, at, inside, pull * -1.0)  # Triton's -x is 0 - x, which is 0 and not -0 where x is 0
    if d_prior_std is not None:
        write(d_prior_std, at, inside, scale * (stretch * -1.0 * root))


@triton.jit
def gaussian_kl_backward_kernel(
    mean, log_std, prior_mean, prior_std, d_mean, d_log_std, d_prior_mean, d_prior_std, grad, numel,
    SKIP: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = place(SKIP, BLOCK)
    if SPLIT:
        if is_whole(numel, BLOCK):
            _kl_backward(
                d_mean, d_log_std, d_prior_mean, d_prior_std, grad, mean, log_std, prior_mean, prior_std, at, None
            )
        else:
            _kl_backward(
                d_mean, d_log_std, d_prior_mean, d_prior_std, grad, mean, log_std, prior_mean, prior_std, at,
                within(at, numel, SKIP),
            )  # fmt: skip
    else:
        _kl_backward(
            d_mean, d_log_std, d_prior_mean, d_prior_std, grad, mean, log_std, prior_mean, prior_std, at,
            within(at, numel, SKIP),
        )  # fmt: skip


@triton.jit
def _gradients(d_mean, d_log_std, grad, mean, log_std, prior_mean, prior_std, kl_weight, n, at, inside):
    g, rho, prior = read(grad, at, inside), read(log_std, at, inside), read(prior_std, at, inside)
    std, root = exponential(rho), precision_root(prior)
    ratio = std * root
    squared_ratio = ratio * ratio
    scaled = (read(mean, at, inside) - read(prior_mean, at, inside)) * root
    write(d_mean, at, inside, g + kl_weight * (scaled * root))
    write(d_log_std, at, inside, g * n * std + kl_weight * (squared_ratio - 1.0))
    return total(0.5 * squared_ratio + 0.5 * scaled * scaled - (rho - natural_log(prior)) - 0.5, inside)


@triton.jit(do_not_specialize=VARYING)
def variational_gradients_kernel(
    d_mean, d_log_std, partials, grad, mean, log_std, prior_mean, prior_std, kl_weight, seed, step, group, numel,
    SKIP: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = place(SKIP, BLOCK)
    n = normals(seed, step, WEIGHTS, groups(group, BLOCK))
    if SPLIT:
        if is_whole(numel, BLOCK):
            kl = _gradients(d_mean, d_log_std, grad, mean, log_std, prior_mean, prior_std, kl_weight, n, at, None)
        else:
            inside = within(at, numel, SKIP)
            kl = _gradients(d_mean, d_log_std, grad, mean, log_std, prior_mean, prior_std, kl_weight, n, at, inside)
    else:
        inside = within(at, numel, SKIP)
        kl = _gradients(d_mean, d_log_std, grad, mean, log_std, prior_mean, prior_std, kl_weight, n, at, inside)
    tl.store(partials + tl.program_id(0), kl)


def _sum_like(tensor: Tensor) -> Tensor:
    return torch.empty(1, dtype=torch.float32, device=tensor.device)


def _divergence(mean: Tensor, log_std: Tensor | None, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    check_beside(mean, log_std=log_std, prior_mean=prior_mean, prior_std=prior_std)
    operands = [t if t is None else t.contiguous() for t in (mean, log_std, prior_mean, prior_std)]
    partials = partials_of(mean, 1, chunks_of(mean.numel()))
    over_elements(gaussian_kl_kernel, mean.numel(), 0, partials, *operands, BLOCK=CHUNK, num_warps=CHUNK_WARPS)
    return fold(partials, _sum_like(mean)).reshape(())


def _divergence_backward(
    grad: Tensor, mean: Tensor, log_std: Tensor | None, prior_mean: Tensor, prior_std: Tensor, needs: int
) -> list[Tensor]:
    check_beside(mean, log_std=log_std, prior_mean=prior_mean, prior_std=prior_std)
    inputs = [t if t is None else t.contiguous() for t in (mean, log_std, prior_mean, prior_std)]
    wanted = [t is not None and bool(needs >> k & 1) for k, t in enumerate(inputs)]
    out = [torch.empty_like(t) if want else None for t, want in zip(inputs, wanted, strict=True)]
    sizes = block("gaussian_kl_backward", *(t for t in inputs if t is not None))
    over_elements(gaussian_kl_backward_kernel, mean.numel(), 0, *inputs, *out, vector(grad, "grad", 1, mean), **sizes)
    return [mean.new_empty(0) if t is None else t for t in out]


@float32_only("mean")
def gaussian_kl(mean: Tensor, log_std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """KL(N(mean, exp(log_std)^2) || N(prior_mean, prior_std^2)), the sum over elements: float32 scalar."""
    return _divergence(mean, log_std, prior_mean, prior_std)


@float32_only("mean")
def gaussian_kl_backward(
    grad: Tensor, mean: Tensor, log_std: Tensor, prior_mean: Tensor, prior_std: Tensor, needs: int
) -> tuple[Tensor, ...]:
    """Gradients in the four arguments; those whose bit in `needs` is not set come back empty."""
    return tuple(_divergence_backward(grad, mean, log_std, prior_mean, prior_std, needs))


@float32_only("mean")
def quadratic_penalty(mean: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """sum (mean - prior_mean)^2 / (2 prior_std^2): float32 scalar."""
    return _divergence(mean, None, prior_mean, prior_std)


@float32_only("mean")
def quadratic_penalty_backward(
    grad: Tensor, mean: Tensor, prior_mean: Tensor, prior_std: Tensor, needs: int
) -> tuple[Tensor, ...]:
    """Gradients in the three arguments; `needs` has the bits 1, 4 and 8 of gaussian_kl_backward."""
    d_mean, _, d_prior_mean, d_prior_std = _divergence_backward(grad, mean, None, prior_mean, prior_std, needs)
    return d_mean, d_prior_mean, d_prior_std


@float32_only("mean")
def variational_gradients_(
    d_mean: Tensor,
    d_log_std: Tensor,
    grad: Tensor,
    mean: Tensor,
    log_std: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    seed: Tensor,
    step: Tensor,
    *,
    kl_weight: float = 1.0,
    offset: int = 0,
) -> Tensor:
    """The KL; the gradients of loss + kl_weight KL in mean and log_std go into d_mean and d_log_std."""
    tensors = {"grad": grad, "log_std": log_std, "prior_mean": prior_mean, "prior_std": prior_std}
    check_beside(mean, d_mean=d_mean, d_log_std=d_log_std, **tensors)
    check_beside(mean, d_mean=[d_mean], d_log_std=[d_log_std])  # as what is written: contiguous
    operands = [t.contiguous() for t in (grad, mean, log_std, prior_mean, prior_std)]
    partials = partials_of(mean, 1, chunks_of(mean.numel(), offset))
    over_elements(
        variational_gradients_kernel, mean.numel(), offset, d_mean, d_log_std, partials, *operands, float(kl_weight),
        integer(seed, "seed", mean), integer(step, "step", mean), offset // 4, BLOCK=CHUNK, num_warps=CHUNK_WARPS,
    )  # fmt: skip
    return fold(partials, _sum_like(mean)).reshape(())


@float32_only("mean")
def variational_gradients(
    grad: Tensor,
    mean: Tensor,
    log_std: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    seed: Tensor,
    step: Tensor,
    *,
    kl_weight: float = 1.0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The KL, and the gradients of loss + kl_weight KL in mean and log_std."""
    mean, log_std = mean.contiguous(), log_std.contiguous()
    d_mean, d_log_std = torch.empty_like(mean), torch.empty_like(log_std)
    tensors = (grad, mean, log_std, prior_mean, prior_std)
    kl = variational_gradients_(d_mean, d_log_std, *tensors, seed, step, kl_weight=kl_weight, offset=offset)
    return kl, d_mean, d_log_std
