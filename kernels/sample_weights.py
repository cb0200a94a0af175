"""sample_weights and sample_whitened_weights: reparameterised draws from q, in plain and in whitened coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdu_fast.kernels.access import groups, is_whole, place, read, within, write
from vdu_fast.kernels.elementary import exponential
from vdu_fast.kernels.launch import (
    VARYING,
    block,
    check_beside,
    check_sizes,
    float32_only,
    integer,
    over_elements,
)
from vdu_fast.kernels.noise import WEIGHTS, normals

Tensors = Sequence[Tensor]


@triton.jit
def _sample(out, mean, log_std, n, at, inside):
    write(out, at, inside, read(mean, at, inside) + exponential(read(log_std, at, inside)) * n)


@triton.jit(do_not_specialize=VARYING)
def sample_weights_kernel(
    out, mean, log_std, seed, step, group, numel, SKIP: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    at = place(SKIP, BLOCK)
    n = normals(seed, step, WEIGHTS, groups(group, BLOCK))
    if SPLIT:
        if is_whole(numel, BLOCK):
            _sample(out, mean, log_std, n, at, None)
        else:
            _sample(out, mean, log_std, n, at, within(at, numel, SKIP))
    else:
        _sample(out, mean, log_std, n, at, within(at, numel, SKIP))


@triton.jit
def _sample_backward(out, grad, log_std, n, at, inside):
    write(out, at, inside, read(grad, at, inside) * exponential(read(log_std, at, inside)) * n)


@triton.jit(do_not_specialize=VARYING)
def sample_weights_backward_kernel(
    out, grad, log_std, seed, step, group, numel, SKIP: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    at = place(SKIP, BLOCK)
    n = normals(seed, step, WEIGHTS, groups(group, BLOCK))
    if SPLIT:
        if is_whole(numel, BLOCK):
            _sample_backward(out, grad, log_std, n, at, None)
        else:
            _sample_backward(out, grad, log_std, n, at, within(at, numel, SKIP))
    else:
        _sample_backward(out, grad, log_std, n, at, within(at, numel, SKIP))


@triton.jit
def whitened_weight(center, prior_std, z, std, n, noise_scale):
    """center + prior_std z + std n, where std is noise_scale prior_std if it is None; without n, the mean."""
    mean = center + prior_std * z
    if n is None:
        return mean
    elif std is None:
        return tl.where(noise_scale == 0.0, mean, center + prior_std * (z + noise_scale * n))
    else:
        return tl.where(noise_scale == 0.0, mean, mean + std * n)


@triton.jit
def _whitened(out, center, prior_std, z, log_std, n, noise_scale, at, inside):
    std = None
    if log_std is not None:
        std = exponential(read(log_std, at, inside))
    theta = whitened_weight(
        read(center, at, inside), read(prior_std, at, inside), read(z, at, inside), std, n, noise_scale
    )
    write(out, at, inside, theta)


@triton.jit(do_not_specialize=VARYING)
def sample_whitened_weights_kernel(
    out, center, prior_std, z, log_std, noise_scale, seed, step, group, numel,
    NOISY: tl.constexpr, SKIP: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = place(SKIP, BLOCK)
    n = None
    if NOISY:
        n = normals(seed, step, WEIGHTS, groups(group, BLOCK))
    if SPLIT:
        if is_whole(numel, BLOCK):
            _whitened(out, center, prior_std, z, log_std, n, noise_scale, at, None)
        else:
            _whitened(out, center, prior_std, z, log_std, n, noise_scale, at, within(at, numel, SKIP))
    else:
        _whitened(out, center, prior_std, z, log_std, n, noise_scale, at, within(at, numel, SKIP))


@float32_only("mean")
def sample_weights_(
    out: Tensors, mean: Tensors, log_std: Tensors, seed: Tensor, step: Tensor, *, offset: int = 0
) -> None:
    """out = mean + exp(log_std) n over lists of tensors; `out` may have another dtype."""
    check_sizes(out, mean=mean, log_std=log_std)
    for target, *operands in zip(out, mean, log_std, strict=True):
        check_beside(target, out=[target], operands=operands)
        draw = integer(seed, "seed", target), integer(step, "step", target), offset // 4
        sizes = block("sample_weights", target, *operands)
        over_elements(sample_weights_kernel, target.numel(), offset, target, *operands, *draw, **sizes)
        offset += target.numel()


@float32_only("mean")
def sample_weights(mean: Tensor, log_std: Tensor, seed: Tensor, step: Tensor, *, offset: int = 0) -> Tensor:
    """mean + exp(log_std) n."""
    mean = mean.contiguous()
    out = torch.empty_like(mean)
    sample_weights_([out], [mean], [log_std.contiguous()], seed, step, offset=offset)
    return out


@float32_only("log_std")
def sample_weights_backward(grad: Tensor, log_std: Tensor, seed: Tensor, step: Tensor, *, offset: int = 0) -> Tensor:
    """The gradient in log_std, grad exp(log_std) n; that in mean is grad itself."""
    log_std = log_std.contiguous()
    out = torch.empty_like(log_std)
    check_beside(out, grad=grad, log_std=log_std)
    draw = integer(seed, "seed", out), integer(step, "step", out), offset // 4
    sizes = block("sample_weights_backward", out, grad, log_std)
    over_elements(sample_weights_backward_kernel, out.numel(), offset, out, grad.contiguous(), log_std, *draw, **sizes)
    return out


@float32_only("z")
def sample_whitened_weights_(
    out: Tensors,
    center: Tensors,
    prior_std: Tensors,
    z: Tensors,
    log_std: Tensors,
    seed: Tensor,
    step: Tensor,
    *,
    noise_scale: float = 1.0,
    offset: int = 0,
) -> None:
    """center + prior_std z + std n, std = exp(log_std), or noise_scale prior_std where that list is empty."""
    check_sizes(out, center=center, prior_std=prior_std, z=z, log_std=log_std)
    for k, target in enumerate(out):
        operands = (center[k], prior_std[k], z[k])
        check_beside(target, out=[target], operands=operands, log_std=log_std[k : k + 1])
        sizes = block("sample_whitened_weights", target, *operands)
        over_elements(
            sample_whitened_weights_kernel, target.numel(), offset, target, *operands,
            log_std[k] if log_std else None, float(noise_scale),
            integer(seed, "seed", target), integer(step, "step", target), offset // 4,
            NOISY=noise_scale != 0, **sizes,
        )  # fmt: skip
        offset += target.numel()


@float32_only("z")
def sample_whitened_weights(
    center: Tensor,
    prior_std: Tensor,
    z: Tensor,
    seed: Tensor,
    step: Tensor,
    *,
    noise_scale: float = 1.0,
    offset: int = 0,
) -> Tensor:
    """center + prior_std (z + noise_scale n)."""
    z = z.contiguous()
    out = torch.empty_like(z)
    inputs = [center.contiguous()], [prior_std.contiguous()], [z]
    sample_whitened_weights_([out], *inputs, [], seed, step, noise_scale=noise_scale, offset=offset)
    return out
