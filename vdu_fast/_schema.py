"""The ops as torch knows them: names and signatures, shapes without data, derivatives, and the reference behind all.

A native library registers itself for its device when it is loaded and takes over from the reference; nothing here
changes. Seeds and steps travel as int64 tensors, because torch.compile would compile anew for every Python integer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vdu_fast import reference
from vdu_fast.reference import compute_dtype
from vdu_fast.rng import Stream

LIBRARY = torch.library.Library("vdu_fast", "DEF")

SCHEMAS = {
    "standard_normal_": "(Tensor(a!) out, Tensor seed, Tensor step, *, int stream=0, SymInt offset=0) -> ()",
    "sample_weights": "(Tensor mean, Tensor log_std, Tensor seed, Tensor step, *, SymInt offset=0) -> Tensor",
    "sample_weights_backward": "(Tensor grad, Tensor log_std, Tensor seed, Tensor step, *, SymInt offset=0) -> Tensor",
    "sample_weights_": (
        "(Tensor(a!)[] out, Tensor[] mean, Tensor[] log_std, Tensor seed, Tensor step, *, SymInt offset=0) -> ()"
    ),
    "sample_whitened_weights": (
        "(Tensor center, Tensor prior_std, Tensor z, Tensor seed, Tensor step, *, float noise_scale=1.0, "
        "SymInt offset=0) -> Tensor"
    ),
    "sample_whitened_weights_": (
        "(Tensor(a!)[] out, Tensor[] center, Tensor[] prior_std, Tensor[] z, Tensor[] log_std, Tensor seed, "
        "Tensor step, *, float noise_scale=1.0, SymInt offset=0) -> ()"
    ),
    "mix_noise": "(Tensor x0, Tensor signal, Tensor noise, Tensor seed, Tensor step) -> Tensor",
    "noise_prediction_error": (
        "(Tensor prediction, Tensor? x0, Tensor? signal, Tensor? noise, Tensor seed, Tensor step) -> Tensor"
    ),
    "noise_prediction_error_backward": (
        "(Tensor grad, Tensor prediction, Tensor? x0, Tensor? signal, Tensor? noise, Tensor seed, Tensor step) "
        "-> Tensor"
    ),
    "gaussian_kl": "(Tensor mean, Tensor log_std, Tensor prior_mean, Tensor prior_std) -> Tensor",
    "gaussian_kl_backward": (
        "(Tensor grad, Tensor mean, Tensor log_std, Tensor prior_mean, Tensor prior_std, int needs) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "quadratic_penalty": "(Tensor mean, Tensor prior_mean, Tensor prior_std) -> Tensor",
    "quadratic_penalty_backward": (
        "(Tensor grad, Tensor mean, Tensor prior_mean, Tensor prior_std, int needs) -> (Tensor, Tensor, Tensor)"
    ),
    "variational_gradients": (
        "(Tensor grad, Tensor mean, Tensor log_std, Tensor prior_mean, Tensor prior_std, Tensor seed, Tensor step, *, "
        "float kl_weight=1.0, SymInt offset=0) -> (Tensor, Tensor, Tensor)"
    ),
    "variational_gradients_": (
        "(Tensor(a!) d_mean, Tensor(b!) d_log_std, Tensor grad, Tensor mean, Tensor log_std, Tensor prior_mean, "
        "Tensor prior_std, Tensor seed, Tensor step, *, float kl_weight=1.0, SymInt offset=0) -> Tensor"
    ),
    "variational_step_": (
        "(Tensor(a!)[] theta, Tensor[] grad, Tensor[] center, Tensor[] prior_std, Tensor(b!)[] z, Tensor(c!)[] first, "
        "Tensor(d!)[] second, Tensor(e!)[] log_std, Tensor(f!)[] std_first, Tensor(g!)[] std_second, "
        "Tensor[] noise_grad, Tensor constants, Tensor seed, Tensor draw, Tensor next_draw, int rule, *, "
        "SymInt offset=0) -> Tensor"
    ),
    "variational_gradient_norm": (
        "(Tensor[] grad, Tensor[] z, Tensor[] prior_std, Tensor constants, int rule) -> Tensor"
    ),
    "add_noise_gradient_": (
        "(Tensor(a!)[] sum, Tensor[] grad, Tensor seed, Tensor draw, *, float scale=1.0, SymInt offset=0) -> ()"
    ),
    "welford_update_": "(Tensor(a!) mean, Tensor(b!) squares, Tensor value, int count) -> Tensor",
}

# The functions of vdu_fast.ops that these serve.
PUBLIC_OPS = (
    "standard_normal",
    "sample_weights",
    "sample_weights_",
    "sample_whitened_weights",
    "sample_whitened_weights_",
    "add_noise",
    "mix_noise",
    "noise_prediction_loss",
    "gaussian_kl",
    "quadratic_penalty",
    "variational_gradients",
    "variational_gradients_",
    "variational_step_",
    "variational_gradient_norm",
    "add_noise_gradient_",
    "welford_update_",
)


def _contiguous(function: Callable[..., Any]) -> Callable[..., Any]:
    """Results are contiguous whichever backend runs; the reference on its own keeps the strides of its arguments."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if isinstance(result, tuple):
            return tuple(tensor.contiguous() for tensor in result)
        return result if result is None else result.contiguous()

    return call


def _count_writes(name: str) -> None:
    """Let autograd see that an op writes into its arguments.

    It refuses to use a saved tensor that was overwritten in the meantime, and learns of that from a version number,
    which torch's own kernels keep and others have to.
    """
    overload = getattr(torch.ops.vdu_fast, name).default
    arguments = enumerate(overload._schema.arguments)
    written = [k for k, argument in arguments if argument.alias_info is not None and argument.alias_info.is_write]
    if not written:
        return

    def call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        for k in written:
            torch.autograd.graph.increment_version(args[k])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)

    LIBRARY.impl(name, call, "ADInplaceOrView", with_keyset=True)


for _name, _signature in SCHEMAS.items():
    LIBRARY.define(_name + _signature)
    LIBRARY.impl(_name, _contiguous(getattr(reference, _name)), "CompositeExplicitAutograd")
    _count_writes(_name)


# Shapes without data.


def _fake(name: str):
    return torch.library.register_fake(f"vdu_fast::{name}", lib=LIBRARY)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _scalar_sum(tensor: Tensor) -> Tensor:
    return tensor.new_empty((), dtype=compute_dtype(tensor.dtype))


for _name in ("standard_normal_", "sample_weights_", "sample_whitened_weights_", "add_noise_gradient_"):
    _fake(_name)(lambda *args, **kwargs: None)
_fake("sample_weights")(lambda mean, *args, **kwargs: _like(mean))
_fake("sample_weights_backward")(lambda grad, log_std, *args, **kwargs: _like(log_std))
_fake("sample_whitened_weights")(lambda center, *args, **kwargs: _like(center))
_fake("mix_noise")(lambda x0, *args: _like(x0))
_fake("noise_prediction_error_backward")(lambda grad, prediction, *args: _like(prediction))
_fake("gaussian_kl")(lambda mean, *args: _scalar_sum(mean))
_fake("quadratic_penalty")(lambda mean, *args: _scalar_sum(mean))
_fake("variational_gradients")(
    lambda grad, mean, log_std, *args, **kwargs: (_scalar_sum(mean), _like(mean), _like(log_std))
)
_fake("variational_gradients_")(lambda d_mean, *args, **kwargs: _scalar_sum(d_mean))


@_fake("noise_prediction_error")
def _(prediction: Tensor, *args: Any) -> Tensor:
    samples = prediction.shape[0] if prediction.ndim else 1
    return prediction.new_empty((samples,), dtype=compute_dtype(prediction.dtype))


@_fake("gaussian_kl_backward")
def _(grad: Tensor, mean: Tensor, log_std: Tensor, prior_mean: Tensor, prior_std: Tensor, needs: int):
    tensors = (mean, log_std, prior_mean, prior_std)
    return tuple(_like(t) if needs >> k & 1 else t.new_empty(0) for k, t in enumerate(tensors))


@_fake("quadratic_penalty_backward")
def _(grad: Tensor, mean: Tensor, prior_mean: Tensor, prior_std: Tensor, needs: int):
    tensors = ((1, mean), (4, prior_mean), (8, prior_std))
    return tuple(_like(t) if needs & bit else t.new_empty(0) for bit, t in tensors)


@_fake("variational_step_")
def _(theta: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
    like = theta[0] if theta else args[-5]  # the constants
    return like.new_empty(2, dtype=torch.float64)


@_fake("variational_gradient_norm")
def _(grad: list[Tensor], z: list[Tensor], prior_std: list[Tensor], constants: Tensor, rule: int) -> Tensor:
    return (z[0] if z else constants).new_empty(1, dtype=torch.float64)


@_fake("welford_update_")
def _(mean: Tensor, squares: Tensor, value: Tensor, count: int) -> Tensor:
    return mean.new_empty(2, dtype=torch.float64)


# Derivatives. Noise is drawn again, never stored.

_OPS = torch.ops.vdu_fast


def _sample_weights_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    _, log_std, seed, step = inputs
    ctx.save_for_backward(log_std, seed, step)
    ctx.offset = keyword_only_inputs["offset"]


def _sample_weights_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    log_std, seed, step = ctx.saved_tensors
    d_log_std = None
    if ctx.needs_input_grad[1]:
        d_log_std = _OPS.sample_weights_backward(grad, log_std, seed, step, offset=ctx.offset)
    return grad, d_log_std, None, None


def _whitened_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.options = keyword_only_inputs


def _whitened_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    prior_std, z, seed, step = ctx.saved_tensors
    wide = compute_dtype(grad.dtype)
    d_prior_std = d_z = None
    if ctx.needs_input_grad[1]:
        n = torch.empty_like(z, dtype=wide, memory_format=torch.contiguous_format)
        _OPS.standard_normal_(n, seed, step, stream=int(Stream.WEIGHTS), offset=ctx.options["offset"])
        d_prior_std = (grad.to(wide) * (z.to(wide) + ctx.options["noise_scale"] * n)).to(grad.dtype)
    if ctx.needs_input_grad[2]:
        d_z = grad * prior_std
    return grad, d_prior_std, d_z, None, None


def _sum_per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B], the sums over each sample's elements, in the dtype of `like`."""
    return (values.flatten(1).sum(1) if values.ndim > 1 else values).to(like)


def _mix_noise_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _mix_noise_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x0, signal, noise, seed, step = ctx.saved_tensors
    wide = compute_dtype(x0.dtype)
    d_x0 = d_signal = d_noise = None
    if ctx.needs_input_grad[0]:
        scale = signal.to(grad.device, wide).reshape((-1,) + (1,) * (grad.ndim - 1))
        d_x0 = (grad.to(wide) * scale).to(x0.dtype)
    if ctx.needs_input_grad[1]:
        d_signal = _sum_per_sample(grad.to(wide) * x0.to(wide), signal)
    if ctx.needs_input_grad[2]:
        eps = torch.empty_like(x0, dtype=wide, memory_format=torch.contiguous_format)
        _OPS.standard_normal_(eps, seed, step, stream=int(Stream.IMAGE_NOISE))
        d_noise = _sum_per_sample(grad.to(wide) * eps, noise)
    return d_x0, d_signal, d_noise, None, None


def _error_setup(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _error_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    prediction, x0, signal, noise, seed, step = ctx.saved_tensors
    d_x0 = d_signal = d_noise = None
    d_prediction = _OPS.noise_prediction_error_backward(grad, prediction, x0, signal, noise, seed, step)
    if ctx.needs_input_grad[1]:
        d_x0 = -d_prediction
        if signal is not None:
            d_x0 = d_x0 * signal.to(d_x0).reshape((-1,) + (1,) * (d_x0.ndim - 1))
        d_x0 = d_x0.to(x0.dtype)
    if ctx.needs_input_grad[2] and x0 is not None:
        d_signal = -_sum_per_sample(d_prediction.to(grad.dtype) * x0.to(grad.dtype), signal)
    if ctx.needs_input_grad[3]:
        eps = torch.empty_like(prediction, dtype=grad.dtype, memory_format=torch.contiguous_format)
        _OPS.standard_normal_(eps, seed, step, stream=int(Stream.IMAGE_NOISE))
        d_noise = -_sum_per_sample(d_prediction.to(grad.dtype) * eps, noise)
    return d_prediction if ctx.needs_input_grad[0] else None, d_x0, d_signal, d_noise, None, None


def _kl_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _kl_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    needs = sum(1 << k for k, want in enumerate(wanted) if want)
    gradients = _OPS.gaussian_kl_backward(grad, *ctx.saved_tensors, needs)
    return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))


def _penalty_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    needs = sum(bit for bit, want in zip((1, 4, 8), wanted, strict=True) if want)
    gradients = _OPS.quadratic_penalty_backward(grad, *ctx.saved_tensors, needs)
    return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))


for _name, _backward, _setup in (
    ("sample_weights", _sample_weights_backward, _sample_weights_setup),
    ("sample_whitened_weights", _whitened_backward, _whitened_setup),
    ("mix_noise", _mix_noise_backward, _mix_noise_setup),
    ("noise_prediction_error", _error_backward, _error_setup),
    ("gaussian_kl", _kl_backward, _kl_setup),
    ("quadratic_penalty", _penalty_backward, _kl_setup),
):
    # Once: what draws the noise again is not recorded, and a second derivative without it would be wrong in silence.
    torch.library.register_autograd(
        f"vdu_fast::{_name}", once_differentiable(_backward), setup_context=_setup, lib=LIBRARY
    )
