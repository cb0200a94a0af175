"""Every op on operands of any size, dtype and offset, with all that it returns or writes by name.

The same call under two backends, instruction sets or numbers of threads is then compared entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from vdu_fast import _native, ops
from vdu_fast.ops import StepConstants

HAVE_NATIVE = _native.ABSENCES["cpu"] is None
needs_native = pytest.mark.skipif(not HAVE_NATIVE, reason=f"no C++ backend: {_native.ABSENCES['cpu']}")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (F32, F64, BF16, F16)
SIZES = (0, 1, 3, 63, 1000)
OFFSETS = (0, 1, 2, 3, 4, 5, 2**34 + 3)
LARGE = 2**20 + 7
RULES = ("natural", "natural_sign", "natural_adam", "adam")
SEED, STEP = 2**40 + 17, 6

CONSTANTS = StepConstants(
    learning_rate=0.03,
    std_learning_rate=0.01,
    momentum=0.9,
    beta1=0.9,
    one_minus_beta1=0.1,
    beta2=0.99,
    one_minus_beta2=0.01,
    eps=1e-8,
    bias_correction=0.7,
    kl_weight=0.4,
    gradient_scale=1.3,
    clip=0.8,
    noise_scale=1.0,
)

_INT = {F16: torch.int16, BF16: torch.int16, F32: torch.int32, F64: torch.int64}


@dataclass
class Operands:
    """Makes the operands of a call.

    Attributes:
        size: elements per tensor, or per sample.
        dtype: of what may have any dtype.
        exact: give the same values in float64, for the reference that results are judged by.
    """

    size: int
    dtype: torch.dtype = F32
    exact: bool = False

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.size)

    def __call__(self, *shape: int, state: bool = False, positive: bool = False) -> Tensor:
        """Normal values; `state` is never narrower than float32."""
        values = torch.randn(shape or (self.size,), generator=self._generator, dtype=F64)
        values = values.abs() + 0.125 if positive else values
        values = values.to(torch.promote_types(self.dtype, F32) if state else self.dtype)
        return values.double() if self.exact else values

    def positive(self, *shape: int, state: bool = False) -> Tensor:
        return self(*shape, state=state, positive=True)


def backward(name: str, *arguments: object, **options: object):
    """The op that autograd calls, as the backend in use has it."""
    device = next(argument.device for argument in arguments[1:] if isinstance(argument, Tensor))
    return ops._implementation(name, device)(*arguments, **options)


Results = dict[str, Tensor]
Call = Callable[[Operands, int], Results]


def standard_normal(make: Operands, offset: int) -> Results:
    dtype = F64 if make.exact else make.dtype
    options = {"dtype": dtype, "device": make().device}
    return {"n": ops.standard_normal(make.size, SEED, STEP, stream=3, offset=offset, **options)}


def sample_weights(make: Operands, offset: int) -> Results:
    mean, log_std, grad = make(), make(), make()
    seed, step = torch.tensor(SEED), torch.tensor(STEP)
    return {
        "theta": ops.sample_weights(mean, log_std, SEED, STEP, offset=offset),
        "d_log_std": backward("sample_weights_backward", grad, log_std, seed, step, offset=offset),
    }


def sample_whitened_weights(make: Operands, offset: int, scale: float, learned: bool = False) -> Results:
    center, prior_std, z, log_std = make(), make.positive(), make(), make()
    out = make()
    options = {"log_std": log_std if learned else None, "noise_scale": scale, "offset": offset}
    ops.sample_whitened_weights_(out, center, prior_std, z, SEED, STEP, **options)
    if learned:
        return {"out": out}
    theta = ops.sample_whitened_weights(center, prior_std, z, SEED, STEP, noise_scale=scale, offset=offset)
    return {"out": out, "theta": theta}


def sample_into(make: Operands, offset: int) -> Results:
    """float32 (or float64) means into weights of another dtype."""
    out, mean, log_std = make(), make(state=True), make(state=True)
    ops.sample_weights_(out, mean, log_std, SEED, STEP, offset=offset)
    return {"out": out}


def mix_noise(make: Operands, offset: int, *, rows: bool = False) -> Results:
    shape = (make.size, 3) if rows else (3, make.size)
    x0, signal, noise = make(*shape), make(shape[0]), make(shape[0])
    return {"x_t": ops.mix_noise(x0, signal, noise, SEED, STEP + offset)}


def noise_prediction_loss(make: Operands, offset: int, form: str, *, rows: bool = False) -> Results:
    shape = (make.size, 3) if rows else (3, make.size)
    prediction = make(*shape)
    given = {
        "eps": {},
        "target": {"target": make(*shape)},
        "scaled eps": {"noise": make(shape[0])},
        "v": {"target": make(*shape), "signal": make(shape[0]), "noise": make(shape[0])},
        "x0": {"target": make(*shape), "signal": make(shape[0])},
    }[form]
    loss = ops.noise_prediction_loss(prediction, SEED, STEP + offset, reduction="none", **given)
    grad = torch.linspace(-1, 2, 4).repeat(shape[0])[: shape[0]].to(loss.dtype)
    grad[1::4] = 0  # a hinge has let go of these
    target, signal, noise = (given.get(name) for name in ("target", "signal", "noise"))
    seed, step = torch.tensor(SEED), torch.tensor(STEP + offset)
    d = backward("noise_prediction_error_backward", grad, prediction, target, signal, noise, seed, step)
    return {"sum": loss, "d_prediction": d}


def gaussian_kl(make: Operands, offset: int) -> Results:
    tensors = make(), make(), make(), make.positive()
    kl = ops.gaussian_kl(*tensors)
    gradients = backward("gaussian_kl_backward", torch.tensor(0.75, dtype=kl.dtype), *tensors, 0b1111)
    some = backward("gaussian_kl_backward", torch.tensor(0.75, dtype=kl.dtype), *tensors, 0b0110)
    return {"sum": kl, **{f"d{k}": g for k, g in enumerate(gradients)}, **{f"some{k}": g for k, g in enumerate(some)}}


def quadratic_penalty(make: Operands, offset: int) -> Results:
    tensors = make(), make(), make.positive()
    penalty = ops.quadratic_penalty(*tensors)
    gradients = backward("quadratic_penalty_backward", torch.tensor(0.75, dtype=penalty.dtype), *tensors, 0b1101)
    return {"sum": penalty, **{f"d{k}": g for k, g in enumerate(gradients)}}


def variational_gradients(make: Operands, offset: int) -> Results:
    tensors = make(), make(), make(), make(), make.positive()
    kl, d_mean, d_log_std = ops.variational_gradients(*tensors, SEED, STEP, kl_weight=0.3, offset=offset)
    return {"sum": kl, "d_mean": d_mean, "d_log_std": d_log_std}


def variational_gradients_into(make: Operands, offset: int) -> Results:
    d_mean, d_log_std = make(), make()
    tensors = make(), make(), make(), make(), make.positive()
    options = {"kl_weight": 0.3, "offset": offset}
    kl = ops.variational_gradients_(d_mean, d_log_std, *tensors, SEED, STEP, **options)
    return {"sum": kl, "d_mean": d_mean, "d_log_std": d_log_std}


def variational_step(
    make: Operands,
    offset: int,
    rule: str,
    *,
    momentum: bool = True,
    learned: bool = False,
    given: bool = False,
    noise_scale: float = 1.0,
) -> Results:
    theta, grad = make(), make()
    fixed = {"center": make(state=True), "prior_std": make.positive(state=True)}
    moved = {"z": make(state=True)}
    if momentum or rule in ("natural_adam", "adam"):
        moved |= {"first": make(state=True), "second": make.positive(state=True)}
    if learned:
        moved |= {
            "log_std": make(state=True), "std_first": make(state=True), "std_second": make.positive(state=True)
        }  # fmt: skip
    if given:
        fixed["noise_grad"] = make(state=True)
    constants = CONSTANTS._replace(noise_scale=noise_scale)
    norm = ops.variational_gradient_norm(grad, moved["z"], fixed["prior_std"], constants, rule=rule)
    sums = ops.variational_step_(
        theta, grad, constants=constants, seed=SEED, draw=STEP, next_draw=STEP + 1, rule=rule, offset=offset,
        **fixed, **moved,
    )  # fmt: skip
    return {"theta": theta, **moved, "sum": sums, "sum of squares": norm}


def add_noise_gradient(make: Operands, offset: int) -> Results:
    total, grad = make(state=True), make()
    ops.add_noise_gradient_(total, grad, SEED, STEP, scale=0.25, offset=offset)
    return {"total": total}


def welford_update(make: Operands, offset: int) -> Results:
    mean, squares, value = make(state=True), make.positive(state=True), make()
    sums = ops.welford_update_(mean, squares, value, 7)
    return {"mean": mean, "squares": squares, "sum": sums}


FORMS = ("eps", "target", "scaled eps", "v", "x0")
CALLS: dict[str, Call] = {
    "standard_normal": standard_normal,
    "sample_weights": sample_weights,
    "sample_weights_": sample_into,
    **{
        f"sample_whitened_weights, scale {scale}": partial(sample_whitened_weights, scale=scale)
        for scale in (0.0, 0.5, 1.0)
    },
    "sample_whitened_weights_, log_std": partial(sample_whitened_weights, scale=1.0, learned=True),
    "sample_whitened_weights_, log_std, scale 0": partial(sample_whitened_weights, scale=0.0, learned=True),
    "mix_noise": mix_noise,
    "mix_noise, small samples": partial(mix_noise, rows=True),
    **{f"noise_prediction_loss, {form}": partial(noise_prediction_loss, form=form) for form in FORMS},
    **{
        f"noise_prediction_loss, {form}, small samples": partial(noise_prediction_loss, form=form, rows=True)
        for form in FORMS
    },
    "gaussian_kl": gaussian_kl,
    "quadratic_penalty": quadratic_penalty,
    "variational_gradients": variational_gradients,
    "variational_gradients_": variational_gradients_into,
    **{f"variational_step_, {rule}": partial(variational_step, rule=rule) for rule in RULES},
    **{
        f"variational_step_, {rule}, no momentum": partial(variational_step, rule=rule, momentum=False)
        for rule in RULES[:2]
    },
    **{f"variational_step_, {rule}, learned std": partial(variational_step, rule=rule, learned=True) for rule in RULES},
    "variational_step_, given noise_grad": partial(variational_step, rule="adam", learned=True, given=True),
    **{
        f"variational_step_, noise_scale {scale}": partial(variational_step, rule="natural_adam", noise_scale=scale)
        for scale in (0.0, 0.5)
    },
    "variational_step_, learned std, noise_scale 0": partial(
        variational_step, rule="natural_adam", learned=True, noise_scale=0.0
    ),
    "add_noise_gradient_": add_noise_gradient,
    "welford_update_": welford_update,
}


def bits(tensor: Tensor) -> Tensor:
    """The bits of a float tensor as integers: unlike ==, they tell 0 from -0."""
    return tensor.contiguous().view(_INT[tensor.dtype]) if tensor.numel() else tensor


def assert_same_bits(got: Results, expected: Results, *, sums: bool) -> None:
    """Every entry in its bits; the sums too, or to the order of their additions."""
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        other = expected[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        if sums or not name.startswith("sum"):
            assert torch.equal(bits(tensor), bits(other)), name
        else:
            torch.testing.assert_close(
                tensor, other, rtol=1e-5, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    from vdu_fast import _C_cpu

    before = _C_cpu.build_info()["isa"]
    _C_cpu.choose_isa(name)
    try:
        yield
    finally:
        _C_cpu.choose_isa(before)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
