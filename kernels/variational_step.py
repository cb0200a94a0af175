"""variational_step_: everything after backward in one pass; and the two small ops around it.

One launch updates a tensor, one more adds up what all of them left. The formulas are those of csrc/core/variational.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdu_fast.errors import InputError
from vdu_fast.kernels.access import groups, is_whole, place, read, total, within, write
from vdu_fast.kernels.elementary import exponential, natural_log
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
from vdu_fast.kernels.sample_weights import whitened_weight
from vdu_fast.kernels.sums import CHUNK, CHUNK_WARPS, chunks_of, fold, partials_of
from vdu_fast.reference import RULES, StepConstants

Tensors = Sequence[Tensor]

NATURAL_SIGN = tl.constexpr(RULES.index("natural_sign"))
NATURAL_ADAM = tl.constexpr(RULES.index("natural_adam"))
ADAM = tl.constexpr(RULES.index("adam"))

LEARNING_RATE = tl.constexpr(StepConstants._fields.index("learning_rate"))
STD_LEARNING_RATE = tl.constexpr(StepConstants._fields.index("std_learning_rate"))
MOMENTUM = tl.constexpr(StepConstants._fields.index("momentum"))
ONE_MINUS_BETA1 = tl.constexpr(StepConstants._fields.index("one_minus_beta1"))
BETA2 = tl.constexpr(StepConstants._fields.index("beta2"))
ONE_MINUS_BETA2 = tl.constexpr(StepConstants._fields.index("one_minus_beta2"))
EPS = tl.constexpr(StepConstants._fields.index("eps"))
BIAS_CORRECTION = tl.constexpr(StepConstants._fields.index("bias_correction"))
KL_WEIGHT = tl.constexpr(StepConstants._fields.index("kl_weight"))
GRADIENT_SCALE = tl.constexpr(StepConstants._fields.index("gradient_scale"))
CLIP = tl.constexpr(StepConstants._fields.index("clip"))
NOISE_SCALE = tl.constexpr(StepConstants._fields.index("noise_scale"))


@triton.jit
def constant(values, on_device, INDEX: tl.constexpr):
    """One of the step's constants: from the arguments, or from float64 [13] in device memory."""
    if on_device is None:
        return values[INDEX]
    else:
        return tl.load(on_device + INDEX).to(tl.float32)


@triton.jit
def mean_gradient(values, on_device, grad, z, prior_std, RULE: tl.constexpr):
    """The gradient in the coordinate that the rule moves: the weights for adam, z for the others."""
    scaled = constant(values, on_device, GRADIENT_SCALE) * grad
    g = prior_std * scaled + constant(values, on_device, KL_WEIGHT) * z
    if RULE == ADAM:
        g = tl.div_rn(g, prior_std)
    return g


@triton.jit
def _adam(values, on_device, g, first, second, at, inside):
    """Adam's direction; moves the two running averages."""
    m, v = read(first, at, inside), read(second, at, inside)
    m = m + constant(values, on_device, ONE_MINUS_BETA1) * (g - m)
    v = constant(values, on_device, BETA2) * v + constant(values, on_device, ONE_MINUS_BETA2) * (g * g)
    write(first, at, inside, m)
    write(second, at, inside, v)
    corrected = constant(values, on_device, BIAS_CORRECTION) * m
    return tl.div_rn(corrected, tl.sqrt_rn(v) + constant(values, on_device, EPS))


@triton.jit
def _direction(values, on_device, g, prior_std, first, second, at, inside, RULE: tl.constexpr):
    """What z moves along, from the clipped gradient."""
    if RULE == NATURAL_ADAM:
        g = _adam(values, on_device, g, first, second, at, inside)
    elif RULE == ADAM:
        g = tl.div_rn(_adam(values, on_device, g, first, second, at, inside), prior_std)
    else:
        if first is not None:
            g = constant(values, on_device, MOMENTUM) * read(first, at, inside) + g
            write(first, at, inside, g)
        if RULE == NATURAL_SIGN:
            g = tl.where(g > 0.0, 1.0, tl.where(g < 0.0, -1.0, g))  # 0 and NaN stay what they are
    return g


@triton.jit
def _move_log_std(values, on_device, noisy, log_std, prior_std, std_first, std_second, at, inside):
    """The next log_std, from noisy = n dL/dtheta; it moves by Adam under every rule."""
    rho = read(log_std, at, inside)
    std = exponential(rho)
    ratio = tl.div_rn(std, prior_std)
    pull = constant(values, on_device, KL_WEIGHT) * (ratio * ratio - 1.0)
    g = (constant(values, on_device, GRADIENT_SCALE) * noisy) * std + pull
    direction = _adam(values, on_device, g, std_first, std_second, at, inside)
    rho = rho - constant(values, on_device, STD_LEARNING_RATE) * direction
    write(log_std, at, inside, rho)
    return rho


@triton.jit
def _step(
    theta, grad, center, prior_std, z, first, second, log_std, std_first, std_second, noise_grad, values, on_device,
    now, after, at, inside, RULE: tl.constexpr,
):  # fmt: skip
    g_theta, prior, at_z = read(grad, at, inside), read(prior_std, at, inside), read(z, at, inside)
    g = mean_gradient(values, on_device, g_theta, at_z, prior, RULE)
    squared = total(g * g, inside)
    g = constant(values, on_device, CLIP) * g
    g = _direction(values, on_device, g, prior, first, second, at, inside, RULE)
    at_z = at_z - constant(values, on_device, LEARNING_RATE) * g
    write(z, at, inside, at_z)
    kl = 0.5 * at_z * at_z
    std = None
    if log_std is not None:
        noisy = read(noise_grad, at, inside) if noise_grad is not None else g_theta * now
        rho = _move_log_std(values, on_device, noisy, log_std, prior, std_first, std_second, at, inside)
        ratio = rho - natural_log(prior)
        kl = kl + (0.5 * exponential(2.0 * ratio) - ratio - 0.5)
        std = exponential(rho)
    scale = constant(values, on_device, NOISE_SCALE)
    write(theta, at, inside, whitened_weight(read(center, at, inside), prior, at_z, std, after, scale))
    return total(kl, inside), squared


@triton.jit(do_not_specialize=[*VARYING, "slot"])
def variational_step_kernel(
    theta, grad, center, prior_std, z, first, second, log_std, std_first, std_second, noise_grad, partials,
    values, on_device, seed, draw, next_draw, group, slot, slots, numel,
    RULE: tl.constexpr, NOISY: tl.constexpr, SKIP: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = place(SKIP, BLOCK)
    # A step waits for memory, and has no registers to spare for two roots at a time.
    now = None
    if log_std is not None and noise_grad is None:
        now = normals(seed, draw, WEIGHTS, groups(group, BLOCK), False)
    after = None
    if NOISY:
        after = normals(seed, next_draw, WEIGHTS, groups(group, BLOCK), False)
    if SPLIT:
        if is_whole(numel, BLOCK):
            kl, squared = _step(
                theta, grad, center, prior_std, z, first, second, log_std, std_first, std_second, noise_grad, values,
                on_device, now, after, at, None, RULE,
            )  # fmt: skip
        else:
            kl, squared = _step(
                theta, grad, center, prior_std, z, first, second, log_std, std_first, std_second, noise_grad, values,
                on_device, now, after, at, within(at, numel, SKIP), RULE,
            )  # fmt: skip
    else:
        kl, squared = _step(
            theta, grad, center, prior_std, z, first, second, log_std, std_first, std_second, noise_grad, values,
            on_device, now, after, at, within(at, numel, SKIP), RULE,
        )  # fmt: skip
    place_of_sums = partials + slot + tl.program_id(0)
    tl.store(place_of_sums, kl)
    tl.store(place_of_sums + slots, squared)


@triton.jit
def _squared_gradient(grad, z, prior_std, values, on_device, at, inside, RULE: tl.constexpr):
    gradient, at_z, prior = read(grad, at, inside), read(z, at, inside), read(prior_std, at, inside)
    g = mean_gradient(values, on_device, gradient, at_z, prior, RULE)
    return total(g * g, inside)


@triton.jit(do_not_specialize=["slot"])
def variational_gradient_norm_kernel(
    grad, z, prior_std, partials, values, on_device, slot, numel,
    RULE: tl.constexpr, SKIP: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = place(SKIP, BLOCK)
    if SPLIT:
        if is_whole(numel, BLOCK):
            squared = _squared_gradient(grad, z, prior_std, values, on_device, at, None, RULE)
        else:
            inside = within(at, numel, SKIP)
            squared = _squared_gradient(grad, z, prior_std, values, on_device, at, inside, RULE)
    else:
        squared = _squared_gradient(grad, z, prior_std, values, on_device, at, within(at, numel, SKIP), RULE)
    tl.store(partials + slot + tl.program_id(0), squared)


@triton.jit
def _add_noise_gradient(sum, grad, scale, n, at, inside):
    write(sum, at, inside, read(sum, at, inside) + scale * (read(grad, at, inside) * n))


@triton.jit(do_not_specialize=VARYING)
def add_noise_gradient_kernel(
    sum, grad, scale, seed, draw, group, numel, SKIP: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    at = place(SKIP, BLOCK)
    n = normals(seed, draw, WEIGHTS, groups(group, BLOCK))
    if SPLIT:
        if is_whole(numel, BLOCK):
            _add_noise_gradient(sum, grad, scale, n, at, None)
        else:
            _add_noise_gradient(sum, grad, scale, n, at, within(at, numel, SKIP))
    else:
        _add_noise_gradient(sum, grad, scale, n, at, within(at, numel, SKIP))


def _constants(constants: Tensor, like: Tensor) -> tuple[tuple[float, ...] | None, Tensor | None]:
    """The constants by value if they are on the CPU, or as the tensor that the kernel reads them from."""
    if constants.dtype != torch.float64 or constants.shape != (len(StepConstants._fields),):
        raise InputError(
            f"constants must be float64 [{len(StepConstants._fields)}], got {constants.dtype} {list(constants.shape)}."
        )
    if constants.device.type == "cpu":
        return tuple(constants.tolist()), None
    check_beside(like, constants=[constants])
    return None, constants


def _slots(tensors: Tensors, offset: int) -> list[int]:
    """Where the partial sums of every tensor begin, and how many there are in all."""
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + chunks_of(tensor.numel(), offset))
        offset += tensor.numel()
    return starts


@float32_only("z")
def variational_step_(
    theta: Tensors,
    grad: Tensors,
    center: Tensors,
    prior_std: Tensors,
    z: Tensors,
    first: Tensors,
    second: Tensors,
    log_std: Tensors,
    std_first: Tensors,
    std_second: Tensors,
    noise_grad: Tensors,
    constants: Tensor,
    seed: Tensor,
    draw: Tensor,
    next_draw: Tensor,
    rule: int,
    *,
    offset: int = 0,
) -> Tensor:
    """Returns float64 [2] on the device: the KL of the new q, and the squared norm of the gradient before clipping."""
    if not theta:
        return torch.zeros(2, dtype=torch.float64)
    lists = {
        "grad": grad, "center": center, "prior_std": prior_std, "z": z, "first": first, "second": second,
        "log_std": log_std, "std_first": std_first, "std_second": std_second, "noise_grad": noise_grad,
    }  # fmt: skip
    _check_step(theta, lists, rule)
    like = theta[0]
    values, on_device = _constants(constants, like)
    noisy = values is None or values[NOISE_SCALE.value] != 0
    draws = [integer(t, name, like) for t, name in ((seed, "seed"), (draw, "draw"), (next_draw, "next_draw"))]
    slots = _slots(theta, offset)
    partials = partials_of(like, 2, slots[-1])
    for j, target in enumerate(theta):
        operands = [tensors[j] if tensors else None for tensors in lists.values()]
        over_elements(
            variational_step_kernel, target.numel(), offset, target, *operands, partials, values, on_device, *draws,
            offset // 4, slots[j], slots[-1], RULE=rule, NOISY=noisy, BLOCK=CHUNK, num_warps=CHUNK_WARPS,
        )  # fmt: skip
        offset += target.numel()
    return fold(partials, torch.empty(2, dtype=torch.float64, device=like.device))


def _check_step(theta: Tensors, lists: dict[str, Tensors], rule: int) -> None:
    check_sizes(theta, **lists)
    check_beside(theta[0], theta=theta, **lists)
    if not 0 <= rule < len(RULES):
        raise InputError(f"rule must be 0 to {len(RULES) - 1}, got {rule}.")
    if RULES[rule] in ("natural_adam", "adam") and not (lists["first"] and lists["second"]):
        raise InputError(f"rule {RULES[rule]!r} needs first and second, its two moments; start them as zeros.")
    if len({len(lists[name]) for name in ("log_std", "std_first", "std_second")}) > 1:
        raise InputError("log_std, std_first and std_second go together; give all three or none.")


@float32_only("z")
def variational_gradient_norm(grad: Tensors, z: Tensors, prior_std: Tensors, constants: Tensor, rule: int) -> Tensor:
    """float64 [1] on the device: the squared norm that variational_step_ would report."""
    if not z:
        return torch.zeros(1, dtype=torch.float64)
    check_sizes(z, grad=grad, prior_std=prior_std)
    check_beside(z[0], grad=grad, z=z, prior_std=prior_std)
    values, on_device = _constants(constants, z[0])
    slots = _slots(z, 0)
    partials = partials_of(z[0], 1, slots[-1])
    offset = 0
    for j, target in enumerate(z):
        over_elements(
            variational_gradient_norm_kernel, target.numel(), offset, grad[j], target, prior_std[j], partials, values,
            on_device, slots[j], RULE=rule, BLOCK=CHUNK, num_warps=CHUNK_WARPS,
        )  # fmt: skip
        offset += target.numel()
    return fold(partials, torch.empty(1, dtype=torch.float64, device=z[0].device))


@float32_only("sum")
def add_noise_gradient_(
    sum: Tensors, grad: Tensors, seed: Tensor, draw: Tensor, *, scale: float = 1.0, offset: int = 0
) -> None:
    """sum += scale grad n, n of (seed, draw)."""
    check_sizes(sum, grad=grad)
    for total_, g in zip(sum, grad, strict=True):
        check_beside(total_, sum=[total_], grad=[g])
        over_elements(
            add_noise_gradient_kernel, total_.numel(), offset, total_, g, float(scale),
            integer(seed, "seed", total_), integer(draw, "draw", total_), offset // 4,
            **block("add_noise_gradient", total_, g),
        )  # fmt: skip
        offset += total_.numel()
