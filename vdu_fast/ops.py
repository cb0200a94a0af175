"""The hot paths as functions for anyone's training loop, with their arguments checked.

`seed` and `step` are ints or int64 tensors of one element; under torch.compile pass tensors, or every new value
compiles anew. The same seed draws the same bits whatever the shape is split into: `offset` is the index of the first
element (see `vdu_fast.rng`). Functions without a trailing underscore are differentiable, once, in their float tensors;
those with one write into their arguments. Where a list of tensors is accepted beside a tensor, the list is numbered as
if its tensors lay end to end, so that parameters one by one and the flat buffer that holds them give the same bits.

float32, bfloat16 and float16 are computed in float32, float64 in float64. Which implementation runs is told by
`vdu_fast.backends()` and chosen by `vdu_fast.use_backend`; all draw the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, get_args

import torch
from torch import Tensor

from vdu_fast import _native, reference
from vdu_fast.errors import InputError
from vdu_fast.reference import RULES, Reduction, Saturation, StepConstants
from vdu_fast.rng import Seed

Tensors = Tensor | Sequence[Tensor]

__all__ = [
    "StepConstants",
    "add_noise",
    "add_noise_gradient_",
    "gaussian_kl",
    "mix_noise",
    "noise_prediction_loss",
    "quadratic_penalty",
    "sample_weights",
    "sample_weights_",
    "sample_whitened_weights",
    "sample_whitened_weights_",
    "standard_normal",
    "variational_gradient_norm",
    "variational_gradients",
    "variational_gradients_",
    "variational_step_",
    "welford_update_",
]


def _implementation(name: str, device: torch.device) -> Callable[..., Any]:
    """The op as torch dispatches it, or the reference where that was chosen for this device."""
    if _native._chosen is not None and _native.backend_of(device.type) == "reference":
        return getattr(reference, name)
    return getattr(torch.ops.vdu_fast, name)


def _integer(name: str, value: Seed) -> Tensor:
    """A seed or step as the int64 scalar tensor that the ops take."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1:
            got = f"{value.dtype} {list(value.shape)}"
            raise InputError(f"{name} must be an int or an int64 tensor of one element, got {got}.")
        return value
    if not isinstance(value, Integral) or not -(2**63) <= value < 2**64:
        raise InputError(f"{name} must be an int of at most 64 bits or an int64 tensor of one element, got {value!r}.")
    # Above 2^63 the same 64 bits are a negative int64.
    return torch.tensor(value - 2**64 if value >= 2**63 else value, dtype=torch.int64, device="cpu")


def _index(offset: int) -> int:
    if offset < 0:
        raise InputError(f"offset must be the index of the first element, 0 or more, got {offset}.")
    return offset


def _same_shape(op: str, **tensors: Tensor) -> None:
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{op}: {name} must be a floating-point tensor, got {tensor.dtype}.")
        if tensor.shape != first.shape:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise InputError(f"{op}: all tensors must have one shape, got {shapes}.")
        if tensor.dtype != first.dtype:
            dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
            raise InputError(f"{op}: all tensors must have one dtype, got {dtypes}.")


def _listed(op: str, **operands: Tensors | None) -> dict[str, list[Tensor]]:
    """Every operand as a list, empty where it is None, and checked to match the first tensor by tensor."""
    lists = {
        name: [] if value is None else [value] if isinstance(value, Tensor) else list(value)
        for name, value in operands.items()
    }
    first_name, first = next(iter(lists.items()))
    shapes = [tensor.shape for tensor in first]
    same_shapes = True
    for name, tensors in lists.items():
        if not tensors and operands[name] is None:
            continue
        if [t.shape for t in tensors] != shapes:
            same_shapes = False
            if [t.numel() for t in tensors] != [t.numel() for t in first]:
                raise InputError(
                    f"{op}: {name} must match {first_name} tensor by tensor; got {[tuple(t.shape) for t in tensors]} "
                    f"beside {[tuple(t.shape) for t in first]}."
                )
        _check_alike(op, name, tensors)
    if not same_shapes:  # a flat buffer beside a parameter: their elements correspond in order
        return {name: [tensor.detach().view(-1) for tensor in tensors] for name, tensors in lists.items()}
    return lists


def _check_alike(op: str, name: str, tensors: list[Tensor]) -> None:
    """Refuse an operand whose tensors are not contiguous ones of one float dtype."""
    dtypes = list(dict.fromkeys(t.dtype for t in tensors))  # once each: a model is hundreds of tensors, at every step
    for dtype in dtypes:
        if not dtype.is_floating_point:
            raise InputError(f"{op}: {name} must be floating-point, got {dtype}.")
    if len(dtypes) > 1:
        raise InputError(
            f"{op}: the tensors of {name} must have one dtype, got {dtypes[0]} and {dtypes[1]}; "
            "call once per dtype, with the offset of its first element."
        )
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise InputError(
                f"{op}: {name} must be contiguous, got strides {tensor.stride()} for shape {tuple(tensor.shape)}; "
                "pass .contiguous(), or the buffer that it is a view of."
            )


def _check_state(op: str, lists: dict[str, list[Tensor]], names: Sequence[str]) -> None:
    """Refuse operands whose dtype is not that of the first of these."""
    wanted = lists[names[0]][0].dtype
    for name in names[1:]:
        if lists[name] and lists[name][0].dtype != wanted:
            raise InputError(f"{op}: {name} must have the dtype of {names[0]}, {wanted}, got {lists[name][0].dtype}.")


def _check_wide(op: str, name: str, tensor: Tensor) -> None:
    """Refuse to accumulate in a dtype that would lose the small updates."""
    if tensor.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{op}: {name} must be float32 or float64, got {tensor.dtype}.")


def standard_normal(
    shape: tuple[int, ...] | torch.Size | int,
    seed: Seed,
    step: Seed = 0,
    *,
    stream: int = 0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals of the given shape; element i of the flattened result has index offset + i.

    Drawn in float32 and then converted to `dtype`, so that every dtype sees the same noise.

    Raises:
        InputError: dtype is not floating-point, or stream is not in [0, 2^32).
    """
    if not dtype.is_floating_point:
        raise InputError(f"standard_normal: dtype must be floating-point, got {dtype}.")
    if not 0 <= stream < 2**32:
        raise InputError(f"standard_normal: stream must be at least 0 and below 2^32, got {stream}.")
    out = torch.empty(shape, dtype=dtype, device=device)
    _implementation("standard_normal_", out.device)(
        out, _integer("seed", seed), _integer("step", step), stream=int(stream), offset=_index(offset)
    )
    return out


def sample_weights(mean: Tensor, log_std: Tensor, seed: Seed, step: Seed = 0, *, offset: int = 0) -> Tensor:
    """theta = mean + exp(log_std) n, the reparameterised draw from q = N(mean, exp(log_std)^2).

    Args:
        mean, log_std: float tensors of one shape and dtype.

    Raises:
        InputError: shapes or dtypes differ, or a tensor is not floating-point.
    """
    _same_shape("sample_weights", mean=mean, log_std=log_std)
    op = _implementation("sample_weights", mean.device)
    return op(mean, log_std, _integer("seed", seed), _integer("step", step), offset=_index(offset))


def sample_weights_(
    out: Tensors, mean: Tensors, log_std: Tensors, seed: Seed, step: Seed = 0, *, offset: int = 0
) -> None:
    """`sample_weights` into tensors that are there already, which may have another dtype: nothing is allocated.

    Args:
        out: contiguous float tensor or list of them, in any float dtype.
        mean, log_std: the same, of one dtype.

    Raises:
        InputError: the lists do not match, mean and log_std differ in dtype, or a tensor is not contiguous or not
            floating-point.
    """
    lists = _listed("sample_weights_", out=out, mean=mean, log_std=log_std)
    if lists["out"]:
        _check_state("sample_weights_", lists, ("mean", "log_std"))
        with torch.no_grad():
            op = _implementation("sample_weights_", lists["out"][0].device)
            op(*lists.values(), _integer("seed", seed), _integer("step", step), offset=_index(offset))


def sample_whitened_weights(
    center: Tensor,
    prior_std: Tensor,
    z: Tensor,
    seed: Seed,
    step: Seed = 0,
    *,
    noise_scale: float = 1.0,
    offset: int = 0,
) -> Tensor:
    """theta = center + prior_std (z + noise_scale n), in the whitened coordinates z = (mean - center) / prior_std.

    Args:
        center, prior_std, z: float tensors of one shape and dtype.
        noise_scale: standard deviation of q over prior_std; 0 gives the mean.

    Raises:
        InputError: shapes or dtypes differ, or a tensor is not floating-point.
    """
    _same_shape("sample_whitened_weights", center=center, prior_std=prior_std, z=z)
    op = _implementation("sample_whitened_weights", z.device)
    return op(
        center,
        prior_std,
        z,
        _integer("seed", seed),
        _integer("step", step),
        noise_scale=float(noise_scale),
        offset=_index(offset),
    )


def sample_whitened_weights_(
    out: Tensors,
    center: Tensors,
    prior_std: Tensors,
    z: Tensors,
    seed: Seed,
    step: Seed = 0,
    *,
    log_std: Tensors | None = None,
    noise_scale: float = 1.0,
    offset: int = 0,
) -> None:
    """center + prior_std (z + noise_scale n), or center + prior_std z + exp(log_std) n, into `out` of any float dtype.

    Args:
        out: contiguous float tensor or list of them, in any float dtype.
        center, prior_std, z, log_std: the same, of one dtype.
        noise_scale: standard deviation of q over prior_std where log_std is None; 0 gives the mean in any case, and
            draws nothing.

    Raises:
        InputError: the lists do not match, or a tensor is not contiguous or not floating-point.
    """
    lists = _listed("sample_whitened_weights_", out=out, center=center, prior_std=prior_std, z=z, log_std=log_std)
    if lists["out"]:
        _check_state("sample_whitened_weights_", lists, ("z", "center", "prior_std", "log_std"))
        with torch.no_grad():
            op = _implementation("sample_whitened_weights_", lists["out"][0].device)
            op(
                *lists.values(),
                _integer("seed", seed),
                _integer("step", step),
                noise_scale=float(noise_scale),
                offset=_index(offset),
            )


def add_noise(x0: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, seed: Seed, step: Seed = 0) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, eps regenerated by `noise_prediction_loss` from (seed, step).

    Args:
        x0: float [B, ...].
        timesteps: int64 [B], indices into alphas_cumprod.
        alphas_cumprod: float [T].

    Raises:
        InputError: x0 is not floating-point, timesteps is not int64 [B], or alphas_cumprod is not one-dimensional.
    """
    _check_batch("add_noise", "x0", x0)
    if timesteps.dtype != torch.int64 or timesteps.shape != x0.shape[:1]:
        raise InputError(
            f"add_noise: timesteps must be int64 {list(x0.shape[:1])}, got {timesteps.dtype} {list(timesteps.shape)}."
        )
    if alphas_cumprod.ndim != 1:
        raise InputError(f"add_noise: alphas_cumprod must be [T], got {list(alphas_cumprod.shape)}.")
    abar = alphas_cumprod.to(x0.device)[timesteps.to(x0.device)]
    return mix_noise(x0, abar.sqrt(), (1 - abar).sqrt(), seed, step)


def mix_noise(x0: Tensor, signal: Tensor, noise: Tensor, seed: Seed, step: Seed = 0) -> Tensor:
    """signal x_0 + noise eps with coefficients per sample: `add_noise` for any forward process.

    Args:
        x0: float [B, ...].
        signal, noise: float [B].

    Raises:
        InputError: x0 is not floating-point, or signal or noise is not float [B].
    """
    _check_batch("mix_noise", "x0", x0)
    for name, value in (("signal", signal), ("noise", noise)):
        _check_per_sample("mix_noise", name, value, x0)
    return _implementation("mix_noise", x0.device)(x0, signal, noise, _integer("seed", seed), _integer("step", step))


def _check_batch(op: str, name: str, batch: Tensor) -> None:
    _same_shape(op, **{name: batch})
    if batch.ndim == 0:
        raise InputError(f"{op}: {name} must be [B, ...], got a scalar; a batch of one is {name}[None].")


def _check_per_sample(op: str, name: str, value: Tensor, batch: Tensor) -> None:
    if value.shape != batch.shape[:1]:
        raise InputError(f"{op}: {name} must be {list(batch.shape[:1])}, got {list(value.shape)}.")
    if not value.is_floating_point():
        raise InputError(f"{op}: {name} must be a floating-point tensor, got {value.dtype}.")


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
    """Weighted squared error between a prediction and the noise of (seed, step), or a given target.

    Args:
        prediction: float [B, ...].
        weight: float [B] or None.
        reduction: "none" gives [B], the sum over each sample's elements; "sum" the sum of these; "mean" that sum over
            the number of elements of `prediction`.
        target: of the shape of `prediction`; when given, no noise is drawn. Of two dtypes the wider one is computed in,
            as under autocast, where a bfloat16 prediction meets a float32 target.
        signal, noise: float [B]; the target is signal target + noise eps, which covers every prediction type with
            target = x_0: v_prediction has signal = -sqrt(1 - abar_t) and noise = sqrt(abar_t), flow matching -1 and 1.
        saturation: a bounded stand-in for errors that are pushed up, applied to each sample's weighted error e:
            "hinge" min(e, limit); "npo" -(2 / beta) softplus(-beta (e - before)).
        limit, beta, before: float [B], of the saturation.

    Returns:
        float32, or float64 where prediction or target is float64.

    Raises:
        InputError: a shape, a dtype, the reduction or the saturation is not among these.
    """
    op = "noise_prediction_loss"
    if reduction not in get_args(Reduction):
        raise InputError(f"{op}: reduction must be one of {get_args(Reduction)}, got {reduction!r}.")
    if saturation not in get_args(Saturation):
        raise InputError(f"{op}: saturation must be one of {get_args(Saturation)}, got {saturation!r}.")
    needed = {"none": (), "hinge": ("limit",), "npo": ("beta", "before")}[saturation]
    vectors = {"weight": weight, "signal": signal, "noise": noise, "limit": limit, "beta": beta, "before": before}
    if missing := [name for name in needed if vectors[name] is None]:
        raise InputError(f"{op}: saturation {saturation!r} needs {' and '.join(missing)}, float [B].")
    if signal is not None and target is None:
        raise InputError(f"{op}: signal multiplies target; give target = x_0 beside it.")
    _check_batch(op, "prediction", prediction)
    for name, value in vectors.items():
        if value is not None:
            _check_per_sample(op, name, value, prediction)
    if target is not None and prediction.is_floating_point() and target.is_floating_point():
        wider = torch.promote_types(prediction.dtype, target.dtype)
        prediction, target = prediction.to(wider), target.to(wider)
    _same_shape(op, prediction=prediction, **({} if target is None else {"target": target}))
    implementation = _implementation("noise_prediction_error", prediction.device)
    error = implementation(prediction, target, signal, noise, _integer("seed", seed), _integer("step", step))
    if weight is not None:
        error = error * weight.to(error)
    error = reference.saturate(error, saturation, limit=limit, beta=beta, before=before)
    return reference.reduce_errors(error, reduction, prediction.numel())


def gaussian_kl(mean: Tensor, log_std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """KL(N(mean, exp(log_std)^2) || N(prior_mean, prior_std^2)), summed over elements.

    Args:
        mean, log_std, prior_mean, prior_std: float tensors of one shape and dtype; prior_std positive.

    Returns:
        A scalar in float32, or float64 for float64 tensors.

    Raises:
        InputError: shapes or dtypes differ, or a tensor is not floating-point.
    """
    _same_shape("gaussian_kl", mean=mean, log_std=log_std, prior_mean=prior_mean, prior_std=prior_std)
    return _implementation("gaussian_kl", mean.device)(mean, log_std, prior_mean, prior_std)


def quadratic_penalty(mean: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """sum (mean - prior_mean)^2 / (2 prior_std^2): `gaussian_kl` for equal standard deviations.

    Args:
        mean, prior_mean, prior_std: float tensors of one shape and dtype; prior_std positive.

    Raises:
        InputError: shapes or dtypes differ, or a tensor is not floating-point.
    """
    _same_shape("quadratic_penalty", mean=mean, prior_mean=prior_mean, prior_std=prior_std)
    return _implementation("quadratic_penalty", mean.device)(mean, prior_mean, prior_std)


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
    """The KL, and the gradients of (loss + kl_weight KL) in mean and log_std, in one pass and without autograd.

    Args:
        grad: dloss/dtheta at theta = `sample_weights(mean, log_std, seed, step, offset=offset)`.
        mean, log_std, prior_mean, prior_std: float tensors of one shape and dtype with `grad`.

    Raises:
        InputError: shapes or dtypes differ, or a tensor is not floating-point.
    """
    tensors = {"mean": mean, "log_std": log_std, "prior_mean": prior_mean, "prior_std": prior_std}
    _same_shape("variational_gradients", grad=grad, **tensors)
    with torch.no_grad():
        op = _implementation("variational_gradients", mean.device)
        return op(
            grad, mean, log_std, prior_mean, prior_std, _integer("seed", seed), _integer("step", step),
            kl_weight=float(kl_weight), offset=_index(offset),
        )  # fmt: skip


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
    """`variational_gradients` into tensors that are there already: fresh memory can cost more than the computation.

    Args:
        d_mean, d_log_std: written; contiguous, of the shape and dtype of the others, sharing memory with none.
        grad, mean, log_std, prior_mean, prior_std: as for `variational_gradients`.

    Returns:
        The KL, a scalar in float32, or float64 for float64 tensors.

    Raises:
        InputError: shapes or dtypes differ, a tensor is not floating-point, or a written one is not contiguous.
    """
    op, out = "variational_gradients_", {"d_mean": d_mean, "d_log_std": d_log_std}
    tensors = {"grad": grad, "mean": mean, "log_std": log_std, "prior_mean": prior_mean, "prior_std": prior_std}
    _same_shape(op, **out, **tensors)
    for name, tensor in out.items():
        _check_alike(op, name, [tensor])
    with torch.no_grad():
        return _implementation(op, mean.device)(
            *out.values(), *tensors.values(), _integer("seed", seed), _integer("step", step),
            kl_weight=float(kl_weight), offset=_index(offset),
        )  # fmt: skip


def variational_step_(
    theta: Tensors,
    grad: Tensors,
    center: Tensors,
    prior_std: Tensors,
    z: Tensors,
    constants: StepConstants,
    seed: Seed,
    draw: Seed = 0,
    next_draw: Seed = 0,
    *,
    rule: str = "natural_adam",
    first: Tensors | None = None,
    second: Tensors | None = None,
    log_std: Tensors | None = None,
    std_first: Tensors | None = None,
    std_second: Tensors | None = None,
    noise_grad: Tensors | None = None,
    offset: int = 0,
) -> Tensor:
    """Everything after backward in one pass: regenerate noise, form gradients, add the KL's, step, write new weights.

    q = N(center + prior_std z, std^2), std = exp(log_std) where it is given, else noise_scale prior_std.

        g = prior_std gradient_scale dL/dtheta + kl_weight z,    z moves along clip g by the rule
        g_rho = gradient_scale dL/dtheta n std + kl_weight (std^2 / prior_std^2 - 1),    log_std moves by Adam
        theta = center + prior_std z + std n',    n' of next_draw

    Args:
        theta: written; any float dtype.
        grad: dL/dtheta at the weights of `draw`; any float dtype.
        center, prior_std: float32, or float64 with float64 state.
        z: updated, float32 or float64; so are first, second, log_std, std_first, std_second.
        constants: see `StepConstants`.
        seed, draw, next_draw: which noise `grad` was taken at, and which the new weights are to have.
        rule: "natural", "natural_sign", "natural_adam" or "adam".
        first: momentum of the natural rules (None keeps none), first moment of the Adam rules.
        second: second moment of the Adam rules.
        log_std, std_first, std_second: all three, or none.
        noise_grad: sum of n dL/dtheta over several draws (see `add_noise_gradient_`); None draws n of `draw` again.

    Returns:
        float64 [2]: the KL of the new q, and the squared norm of the gradient before clipping, in the coordinates that
        the rule moves (the weights for "adam", z for the others).

    Raises:
        InputError: an unknown rule, missing state, or tensors that do not match.
    """
    op = "variational_step_"
    lists = _listed(
        op, theta=theta, grad=grad, center=center, prior_std=prior_std, z=z, first=first, second=second,
        log_std=log_std, std_first=std_first, std_second=std_second, noise_grad=noise_grad,
    )  # fmt: skip
    if rule not in RULES:
        raise InputError(f"{op}: rule must be one of {', '.join(RULES)}, got {rule!r}.")
    if rule in ("natural_adam", "adam") and (first is None or second is None):
        raise InputError(f"{op}: rule {rule!r} needs first and second, its two moments; start them as zeros.")
    if len({value is None for value in (log_std, std_first, std_second)}) > 1:
        raise InputError(f"{op}: log_std, std_first and std_second go together; give all three or none.")
    if not lists["theta"]:
        return torch.zeros(2, dtype=torch.float64)
    _check_wide(op, "z", lists["z"][0])
    state = ("z", "center", "prior_std", "first", "second", "log_std", "std_first", "std_second", "noise_grad")
    _check_state(op, lists, state)
    with torch.no_grad():
        return _implementation(op, lists["theta"][0].device)(
            *lists.values(), constants.tensor(),
            _integer("seed", seed), _integer("draw", draw), _integer("next_draw", next_draw),
            RULES.index(rule), offset=_index(offset),
        )  # fmt: skip


def variational_gradient_norm(
    grad: Tensors, z: Tensors, prior_std: Tensors, constants: StepConstants, *, rule: str = "natural_adam"
) -> Tensor:
    """The squared norm that `variational_step_` would report, float64 [1], without moving anything: for clipping.

    Args:
        grad, z, prior_std, constants, rule: as for `variational_step_`.

    Raises:
        InputError: an unknown rule, or tensors that do not match.
    """
    if rule not in RULES:
        raise InputError(f"variational_gradient_norm: rule must be one of {', '.join(RULES)}, got {rule!r}.")
    lists = _listed("variational_gradient_norm", grad=grad, z=z, prior_std=prior_std)
    if lists["z"]:
        _check_wide("variational_gradient_norm", "z", lists["z"][0])
        _check_state("variational_gradient_norm", lists, ("z", "prior_std"))
    with torch.no_grad():
        device = lists["z"][0].device if lists["z"] else torch.device("cpu")
        op = _implementation("variational_gradient_norm", device)
        return op(*lists.values(), constants.tensor(), RULES.index(rule))


def add_noise_gradient_(
    sum: Tensors, grad: Tensors, seed: Seed, draw: Seed = 0, *, scale: float = 1.0, offset: int = 0
) -> None:
    """sum += scale grad n, n of (seed, draw) drawn again: the gradient in log_std over std, over several draws.

    Args:
        sum: updated, float32 or float64.
        grad: dL/dtheta at the weights of `draw`, any float dtype.

    Raises:
        InputError: the lists do not match, a tensor is not contiguous, or sum has another dtype.
    """
    lists = _listed("add_noise_gradient_", sum=sum, grad=grad)
    if lists["sum"]:
        _check_wide("add_noise_gradient_", "sum", lists["sum"][0])
        with torch.no_grad():
            op = _implementation("add_noise_gradient_", lists["sum"][0].device)
            op(
                *lists.values(),
                _integer("seed", seed),
                _integer("draw", draw),
                scale=float(scale),
                offset=_index(offset),
            )


def welford_update_(mean: Tensor, squares: Tensor, value: Tensor, count: int) -> Tensor:
    """Take one more value into a running mean and sum of squared deviations (Welford 1962).

    Args:
        mean, squares: updated, float32 or float64, of one shape and dtype.
        value: of that shape, any float dtype.
        count: the number of values with this one, at least 1.

    Returns:
        float64 [2]: the sums of (value - mean before)^2 and of value^2.

    Raises:
        InputError: shapes differ, a tensor is not floating-point or not contiguous, or count is below 1.
    """
    if count < 1:
        raise InputError(f"welford_update_: count must be at least 1, the number of values with this one, got {count}.")
    _same_shape("welford_update_", mean=mean, squares=squares)
    _listed("welford_update_", mean=mean, squares=squares)
    _check_wide("welford_update_", "mean", mean)
    if value.shape != mean.shape or not value.is_floating_point():
        raise InputError(
            f"welford_update_: value must be a float tensor of shape {tuple(mean.shape)}, got {value.dtype} "
            f"{tuple(value.shape)}."
        )
    with torch.no_grad():
        return _implementation("welford_update_", mean.device)(mean, squares, value, count)
