"""The hot paths in plain torch: the definition that every faster implementation is held to.

Everything is computed in float32, in float64 for float64 inputs, and rounded once to the dtype of the result. Element
by element, each function does the same operations in the same order as csrc/core, so that results agree in their bits;
sums over elements agree up to the order of addition. The functions without a trailing underscore are differentiable in
their float tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vdu_fast.elementary import exponential, square_root
from vdu_fast.rng import Seed, Stream, standard_normal

Reduction = Literal["mean", "sum", "none"]
Saturation = Literal["none", "hinge", "npo"]

# How a gradient becomes a step; the position of a rule is its number in csrc/core/variational.h.
RULES = ("natural", "natural_sign", "natural_adam", "adam")


class StepConstants(NamedTuple):
    """The scalars of one `variational_step_`, in the order of csrc/core/variational.h.

    Attributes:
        learning_rate: in units of prior_std for the natural rules, of the weights for "adam".
        std_learning_rate: of log_std, which always moves by Adam.
        momentum: of "natural" and "natural_sign".
        beta1, one_minus_beta1, beta2, one_minus_beta2, eps: of the Adam rules.
        bias_correction: sqrt(1 - beta2^t) / (1 - beta1^t) at step t = 1, 2, ...
        kl_weight: multiplies the KL in the objective.
        gradient_scale: multiplies the gradient of the weights, before the KL's is added.
        clip: multiplies the whole gradient of z.
        noise_scale: std / prior_std where log_std is not learned; 0 writes the mean in any case.
    """

    learning_rate: float
    std_learning_rate: float
    momentum: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    bias_correction: float
    kl_weight: float
    gradient_scale: float
    clip: float
    noise_scale: float

    def tensor(self) -> Tensor:
        """float64 [13], as the ops take it."""
        return torch.tensor(self, dtype=torch.float64, device="cpu")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of this dtype are computed in."""
    return torch.promote_types(dtype, torch.float32)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(compute_dtype(tensor.dtype)) for tensor in tensors)


def _weight_noise(like: Tensor, seed: Seed, step: Seed, offset: int) -> Tensor:
    dtype = compute_dtype(like.dtype)
    return standard_normal(
        like.shape, seed, step, stream=Stream.WEIGHTS, offset=offset, dtype=dtype, device=like.device
    )


def standard_normal_(out: Tensor, seed: Seed, step: Seed = 0, *, stream: int = 0, offset: int = 0) -> None:
    """Fill `out` with standard normals."""
    shape, dtype, device = out.shape, out.dtype, out.device
    out.copy_(standard_normal(shape, seed, step, stream=stream, offset=offset, dtype=dtype, device=device))


def sample_weights(mean: Tensor, log_std: Tensor, seed: Seed, step: Seed = 0, *, offset: int = 0) -> Tensor:
    """theta = mean + exp(log_std) n with n ~ N(0, 1) of stream WEIGHTS (Kingma and Welling 2014, eq. 4)."""
    wide_mean, wide_log_std = _wide(mean, log_std)
    n = _weight_noise(mean, seed, step, offset)
    return (wide_mean + exponential(wide_log_std) * n).to(mean.dtype)


def sample_weights_backward(grad: Tensor, log_std: Tensor, seed: Seed, step: Seed = 0, *, offset: int = 0) -> Tensor:
    """dL/dlog_std from dL/dtheta; dL/dmean is dL/dtheta itself."""
    wide_grad, wide_log_std = _wide(grad, log_std)
    return (wide_grad * exponential(wide_log_std) * _weight_noise(grad, seed, step, offset)).to(log_std.dtype)


def sample_weights_(
    out: Sequence[Tensor],
    mean: Sequence[Tensor],
    log_std: Sequence[Tensor],
    seed: Seed,
    step: Seed = 0,
    *,
    offset: int = 0,
) -> None:
    """`sample_weights` over lists of tensors that are numbered as if they lay end to end, into `out` of any dtype."""
    for target, m, s in zip(out, mean, log_std, strict=True):
        wide_mean, wide_log_std = _wide(m, s)
        target.copy_(wide_mean + exponential(wide_log_std) * _weight_noise(m, seed, step, offset))
        offset += m.numel()


def sample_whitened_weights(
    center: Tensor,
    prior_std: Tensor,
    z: Tensor,
    seed: Seed,
    step: Seed = 0,
    *,
    log_std: Tensor | None = None,
    noise_scale: float = 1.0,
    offset: int = 0,
) -> Tensor:
    """theta = center + prior_std (z + noise_scale n), or center + prior_std z + exp(log_std) n where that is given.

    With noise_scale 0 it is the mean, center + prior_std z, in any case.

    z = (mean - center) / prior_std are whitened coordinates: the KL from N(center, prior_std^2) is ||z||^2 / 2 there.
    """
    dtype = z.dtype
    center, prior_std, z = _wide(center, prior_std, z)
    if noise_scale == 0:
        return (center + prior_std * z).to(dtype)
    if log_std is not None:
        noise = exponential(log_std.to(z.dtype)) * _weight_noise(z, seed, step, offset)
        return (center + prior_std * z + noise).to(dtype)
    return (center + prior_std * (z + noise_scale * _weight_noise(z, seed, step, offset))).to(dtype)


def sample_whitened_weights_(
    out: Sequence[Tensor],
    center: Sequence[Tensor],
    prior_std: Sequence[Tensor],
    z: Sequence[Tensor],
    log_std: Sequence[Tensor],
    seed: Seed,
    step: Seed = 0,
    *,
    noise_scale: float = 1.0,
    offset: int = 0,
) -> None:
    """`sample_whitened_weights` over lists of tensors, into `out` of any dtype; `log_std` may be empty."""
    for k, target in enumerate(out):
        rho = log_std[k] if log_std else None
        sample = sample_whitened_weights(
            center[k], prior_std[k], z[k], seed, step, log_std=rho, noise_scale=noise_scale, offset=offset
        )
        target.copy_(sample)
        offset += z[k].numel()


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] shaped to broadcast over `like` [B, ...], in what `like` is computed in."""
    return values.to(like.device, compute_dtype(like.dtype)).reshape((-1,) + (1,) * (like.ndim - 1))


def image_noise(like: Tensor, seed: Seed, step: Seed = 0) -> Tensor:
    """The eps that `add_noise` adds to, and `noise_prediction_loss` compares with, a batch of this shape."""
    dtype = compute_dtype(like.dtype)
    return standard_normal(like.shape, seed, step, stream=Stream.IMAGE_NOISE, dtype=dtype, device=like.device)


def mix_noise(x0: Tensor, signal: Tensor, noise: Tensor, seed: Seed, step: Seed = 0) -> Tensor:
    """signal x_0 + noise eps with coefficients per sample, [B], and eps of stream IMAGE_NOISE."""
    (wide,) = _wide(x0)
    mixed = _per_sample(signal, x0) * wide + _per_sample(noise, x0) * image_noise(x0, seed, step)
    return mixed.to(x0.dtype)


def add_noise(x0: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, seed: Seed, step: Seed = 0) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps with eps of stream IMAGE_NOISE (Ho et al. 2020, eq. 4)."""
    abar = alphas_cumprod.to(x0.device)[timesteps.to(x0.device)]
    return mix_noise(x0, abar.sqrt(), (1 - abar).sqrt(), seed, step)


def _target(like: Tensor, x0: Tensor | None, signal: Tensor | None, noise: Tensor | None, seed: Seed, step: Seed):
    dtype = compute_dtype(like.dtype)
    if x0 is None:
        eps = image_noise(like, seed, step)
        return eps if noise is None else _per_sample(noise, like) * eps
    scaled = x0.to(dtype) if signal is None else _per_sample(signal, like) * x0.to(dtype)
    return scaled if noise is None else scaled + _per_sample(noise, like) * image_noise(like, seed, step)


def noise_prediction_error(
    prediction: Tensor,
    x0: Tensor | None,
    signal: Tensor | None,
    noise: Tensor | None,
    seed: Seed,
    step: Seed = 0,
) -> Tensor:
    """Sum of (target - prediction)^2 over each sample's elements, [B], float32 or float64.

    The target is signal x_0 + noise eps. Without x_0 it is eps (times `noise`), without `noise` it is x_0 (times
    `signal`) and nothing is drawn.
    """
    difference = prediction.to(compute_dtype(prediction.dtype)) - _target(prediction, x0, signal, noise, seed, step)
    squared = difference.square()
    return squared.flatten(1).sum(dim=1) if squared.ndim > 1 else squared.reshape(-1)


def noise_prediction_error_backward(
    grad: Tensor,
    prediction: Tensor,
    x0: Tensor | None,
    signal: Tensor | None,
    noise: Tensor | None,
    seed: Seed,
    step: Seed = 0,
) -> Tensor:
    """dL/dprediction from dL/derror, [B]."""
    difference = prediction.to(compute_dtype(prediction.dtype)) - _target(prediction, x0, signal, noise, seed, step)
    scale = _per_sample(2 * grad, prediction)
    # A sample that a hinge has let go of has no gradient, even where its prediction is not finite.
    return torch.where(scale == 0, torch.zeros_like(difference), scale * difference).to(prediction.dtype)


def saturate(
    error: Tensor,
    saturation: Saturation,
    *,
    limit: Tensor | None = None,
    beta: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """A bounded stand-in for an error that is pushed up, [B]; rises with the error, and less and less.

    "none" is the error itself; "hinge" min(error, limit), which lets go of a sample once its error has reached
    `limit`; "npo" -(2 / beta) softplus(-beta (error - before)), whose pull fades smoothly (Zhang et al. 2024, negative
    preference optimisation).
    """
    if saturation == "hinge":
        assert limit is not None
        return torch.minimum(error, limit.to(error))
    if saturation == "npo":
        assert beta is not None
        assert before is not None
        beta = beta.to(error)
        return -2 / beta * functional.softplus(-beta * (error - before.to(error)))
    return error


def reduce_errors(error: Tensor, reduction: Reduction, numel: int) -> Tensor:
    """Keep per-sample sums [B], add them, or average them over `numel` elements."""
    if reduction == "none":
        return error
    return error.sum() if reduction == "sum" else error.sum() / numel


def noise_prediction_loss(
    prediction: Tensor,
    seed: Seed,
    step: Seed = 0,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    target: Tensor | None = None,
    signal: Tensor | None = None,
    noise: Tensor | None = None,
    saturation: Saturation = "none",
    limit: Tensor | None = None,
    beta: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """Weighted squared error between a prediction [B, ...] and the noise of (seed, step), or a given target.

    Args:
        weight: [B], multiplies the error of each sample (C_t, for instance).
        reduction: "none" gives the sum over each sample's elements, [B]; "sum" adds these over the batch; "mean"
            divides that by the number of elements of `prediction`.
        target: compared with instead of regenerated noise.
        signal, noise: [B]; the target is signal * target + noise * eps, eps of (seed, step): every prediction type.
        saturation, limit, beta, before: see `saturate`; applied to the weighted error of each sample.
    """
    error = noise_prediction_error(prediction, target, signal, noise, seed, step)
    if weight is not None:
        error = error * weight.to(error)
    error = saturate(error, saturation, limit=limit, beta=beta, before=before)
    return reduce_errors(error, reduction, prediction.numel())


def gaussian_kl(mean: Tensor, log_std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """KL(N(mean, exp(log_std)^2) || N(prior_mean, prior_std^2)), summed over all elements: a scalar."""
    mean, log_std, prior_mean, prior_std = _wide(mean, log_std, prior_mean, prior_std)
    ratio = log_std - prior_std.log()
    scaled = (mean - prior_mean) / prior_std
    return (0.5 * torch.exp(2 * ratio) + 0.5 * scaled.square() - ratio - 0.5).sum()


def gaussian_kl_backward(
    grad: Tensor, mean: Tensor, log_std: Tensor, prior_mean: Tensor, prior_std: Tensor, needs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the four arguments; `needs` has bit k set where that of argument k is wanted, others are empty."""
    wide_mean, wide_log_std, wide_prior_mean, wide_prior_std = _wide(mean, log_std, prior_mean, prior_std)
    precision_root = 1 / wide_prior_std
    scaled = (wide_mean - wide_prior_mean) * precision_root
    excess = (exponential(wide_log_std) * precision_root).square() - 1
    d_mean = grad * (scaled * precision_root)
    parts = (d_mean, grad * excess, -d_mean, grad * (-(excess + scaled * scaled) * precision_root))
    return _wanted(parts, mean.dtype, needs)  # type: ignore[return-value]


def quadratic_penalty(mean: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """sum (mean - prior_mean)^2 / (2 prior_std^2), the KL of two Gaussians with equal variances: a scalar."""
    mean, prior_mean, prior_std = _wide(mean, prior_mean, prior_std)
    return 0.5 * ((mean - prior_mean) / prior_std).square().sum()


def quadratic_penalty_backward(
    grad: Tensor, mean: Tensor, prior_mean: Tensor, prior_std: Tensor, needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the three arguments; `needs` has the bits 1, 4 and 8 of `gaussian_kl_backward`."""
    wide_mean, wide_prior_mean, wide_prior_std = _wide(mean, prior_mean, prior_std)
    precision_root = 1 / wide_prior_std
    scaled = (wide_mean - wide_prior_mean) * precision_root
    d_mean = grad * (scaled * precision_root)
    parts = (d_mean, d_mean, -d_mean, grad * (-(scaled * scaled) * precision_root))
    d_mean, _, d_prior_mean, d_prior_std = _wanted(parts, mean.dtype, needs)
    return d_mean, d_prior_mean, d_prior_std


def _wanted(parts: tuple[Tensor, ...], dtype: torch.dtype, needs: int) -> tuple[Tensor, ...]:
    return tuple(part.to(dtype) if needs >> k & 1 else part.new_empty(0, dtype=dtype) for k, part in enumerate(parts))


def variational_gradients(
    grad: Tensor,
    mean: Tensor,
    log_std: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    seed: Seed,
    step: Seed = 0,
    *,
    kl_weight: float = 1.0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The KL, and the gradients of (loss + kl_weight KL) in mean and log_std, from dloss/dtheta at a sampled theta.

    Args:
        grad: the loss's gradient at theta = `sample_weights(mean, log_std, seed, step)`.
    """
    dtype = mean.dtype
    n = _weight_noise(mean, seed, step, offset)
    grad, mean, log_std, prior_mean, prior_std = _wide(grad, mean, log_std, prior_mean, prior_std)
    std, precision_root = exponential(log_std), 1 / prior_std
    squared_ratio, scaled = (std * precision_root).square(), (mean - prior_mean) * precision_root
    kl = (0.5 * squared_ratio + 0.5 * scaled * scaled - (log_std - prior_std.log()) - 0.5).sum()
    d_mean = grad + kl_weight * (scaled * precision_root)
    d_log_std = grad * n * std + kl_weight * (squared_ratio - 1)
    return kl, d_mean.to(dtype), d_log_std.to(dtype)


def variational_gradients_(
    d_mean: Tensor,
    d_log_std: Tensor,
    grad: Tensor,
    mean: Tensor,
    log_std: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    seed: Seed,
    step: Seed = 0,
    *,
    kl_weight: float = 1.0,
    offset: int = 0,
) -> Tensor:
    """`variational_gradients` into d_mean and d_log_std; returns the KL."""
    tensors = (grad, mean, log_std, prior_mean, prior_std)
    kl, *gradients = variational_gradients(*tensors, seed, step, kl_weight=kl_weight, offset=offset)
    d_mean.copy_(gradients[0])
    d_log_std.copy_(gradients[1])
    return kl


def variational_step_(
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    center: Sequence[Tensor],
    prior_std: Sequence[Tensor],
    z: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    log_std: Sequence[Tensor],
    std_first: Sequence[Tensor],
    std_second: Sequence[Tensor],
    noise_grad: Sequence[Tensor],
    constants: Tensor,
    seed: Seed,
    draw: Seed,
    next_draw: Seed,
    rule: int,
    *,
    offset: int = 0,
) -> Tensor:
    """Everything after backward: see `vdu_fast.ops.variational_step_`. Absent state is an empty list."""
    k = StepConstants(*constants.tolist())
    kl = squared = torch.zeros((), dtype=torch.float64, device=theta[0].device if theta else None)
    for j in range(len(theta)):
        moments = tuple(state[j] if state else None for state in (first, second))
        squared = squared + _step_z(k, RULES[rule], grad[j], z[j], prior_std[j], *moments)
        if log_std:
            noisy = noise_grad[j] if noise_grad else grad[j].to(z[j]) * _weight_noise(z[j], seed, draw, offset)
            _step_log_std(k, noisy, log_std[j], prior_std[j], std_first[j], std_second[j])
            ratio = log_std[j] - prior_std[j].log()
            kl = kl + (0.5 * z[j] * z[j] + (0.5 * torch.exp(2 * ratio) - ratio - 0.5)).double().sum()
        else:
            kl = kl + (0.5 * z[j] * z[j]).double().sum()
        rho = log_std[j] if log_std else None
        sample = sample_whitened_weights(
            center[j], prior_std[j], z[j], seed, next_draw, log_std=rho, noise_scale=k.noise_scale, offset=offset
        )
        theta[j].copy_(sample)
        offset += z[j].numel()
    return torch.stack([kl, squared])


def _mean_gradient(k: StepConstants, rule: str, grad: Tensor, z: Tensor, prior_std: Tensor) -> Tensor:
    """The gradient in the coordinate that the rule moves: the weights for "adam", z for the others."""
    g = prior_std * (k.gradient_scale * grad.to(z.dtype)) + k.kl_weight * z
    return g / prior_std if rule == "adam" else g


def _step_z(
    k: StepConstants,
    rule: str,
    grad: Tensor,
    z: Tensor,
    prior_std: Tensor,
    first: Tensor | None,
    second: Tensor | None,
) -> Tensor:
    """Move z; returns the squared norm of the gradient before clipping, in float64."""
    g = _mean_gradient(k, rule, grad, z, prior_std)
    squared = g.double().square().sum()
    g = k.clip * g
    if rule in ("natural_adam", "adam"):
        assert first is not None
        assert second is not None
        direction = _adam_direction(k, g, first, second)
        g = direction / prior_std if rule == "adam" else direction
    else:
        if first is not None:
            g = first.copy_(k.momentum * first + g)
        if rule == "natural_sign":
            g = torch.where((g > 0) | (g < 0), g.sign(), g)  # torch's sign of NaN is 0: a step that hides it
    z.copy_(z - k.learning_rate * g)
    return squared


def _adam_direction(k: StepConstants, g: Tensor, first: Tensor, second: Tensor) -> Tensor:
    first.copy_(first + k.one_minus_beta1 * (g - first))
    second.copy_(k.beta2 * second + k.one_minus_beta2 * (g * g))
    return (k.bias_correction * first) / (square_root(second) + k.eps)


def _step_log_std(
    k: StepConstants, noise_grad: Tensor, log_std: Tensor, prior_std: Tensor, first: Tensor, second: Tensor
) -> None:
    std = exponential(log_std)
    ratio = std / prior_std
    g = (k.gradient_scale * noise_grad) * std + k.kl_weight * (ratio * ratio - 1)
    log_std.copy_(log_std - k.std_learning_rate * _adam_direction(k, g, first, second))


def variational_gradient_norm(
    grad: Sequence[Tensor], z: Sequence[Tensor], prior_std: Sequence[Tensor], constants: Tensor, rule: int
) -> Tensor:
    """The squared gradient norm that `variational_step_` would report, float64 [1], without moving anything."""
    k = StepConstants(*constants.tolist())
    squares = [
        _mean_gradient(k, RULES[rule], g, at, std).double().square().sum()
        for g, at, std in zip(grad, z, prior_std, strict=True)
    ]
    return torch.stack(squares).sum().reshape(1) if squares else torch.zeros(1, dtype=torch.float64)


def add_noise_gradient_(
    sum: Sequence[Tensor], grad: Sequence[Tensor], seed: Seed, draw: Seed, *, scale: float = 1.0, offset: int = 0
) -> None:
    """sum += scale grad n, n of (seed, draw): dL/dlog_std / std, collected over several draws."""
    for total, g in zip(sum, grad, strict=True):
        n = _weight_noise(total, seed, draw, offset)
        total.copy_(total + scale * (g.to(total.dtype) * n))
        offset += total.numel()


def welford_update_(mean: Tensor, squares: Tensor, value: Tensor, count: int) -> Tensor:
    """Take one more value into a running mean and sum of squared deviations (Welford 1962).

    Args:
        count: the number of values with this one.

    Returns:
        float64 [2]: the sums of (value - mean before)^2 and of value^2.
    """
    value = value.to(mean.dtype)
    delta = value - mean
    mean.copy_(mean + (1 / count) * delta)
    squares.copy_(squares + delta * (value - mean))
    return torch.stack([delta.double().square().sum(), value.double().square().sum()])
