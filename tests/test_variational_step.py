"""The step for any finite values, storage and state, and a named error for each misuse; Welford's update beside it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operands import BF16, CONSTANTS, DTYPES, F16, F32, F64, RULES, bits, needs_native
from torch import Tensor

from vdu_fast import _native, ops
from vdu_fast.errors import InputError

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = st.lists(
    st.tuples(
        FLOATS,  # grad
        st.floats(-1e3, 1e3, width=32),  # center
        st.floats(2**-100, 1e3, width=32),  # prior_std
        st.floats(-1e6, 1e6, width=32),  # z
        st.floats(-100, 80, width=32),  # log_std
        FLOATS,  # first, std_first
        st.floats(0, 2**126, width=32),  # second, std_second
    ),
    max_size=20,
)
ONE = torch.ones(3)


def state_of(rows: list, theta: torch.dtype = F32) -> dict[str, Tensor]:
    columns = torch.tensor(rows, dtype=F32).reshape(-1, 7).t().contiguous()
    names = ("grad", "center", "prior_std", "z", "log_std", "first", "second")
    state = dict(zip(names, columns, strict=True))
    state |= {"std_first": state["first"].clone(), "std_second": state["second"].clone()}
    return {"theta": torch.empty(len(rows), dtype=theta), **state}


def same(got: Tensor, expected: Tensor) -> bool:
    return torch.equal(got.isnan(), expected.isnan()) and torch.equal(
        bits(got.nan_to_num(5.0)), bits(expected.nan_to_num(5.0))
    )


@needs_native
@given(rows=ROWS, rule=st.sampled_from(RULES), learned=st.booleans(), theta=st.sampled_from(DTYPES), clip=FLOATS)
def test_any_finite_values_step_to_the_bits_of_the_reference(rows, rule, learned, theta, clip):
    results = []
    for backend in ("cpu", "reference"):
        state = state_of(rows, theta)
        options = dict(state)
        if not learned:
            options |= dict.fromkeys(("log_std", "std_first", "std_second"))
        with _native.use_backend(backend):
            sums = ops.variational_step_(
                **options, constants=CONSTANTS._replace(clip=clip), seed=3, draw=1, next_draw=2, rule=rule
            )
        assert sums.shape == (2,)
        results.append(state)
    for name, got in results[0].items():
        assert same(got, results[1][name]), name


@needs_native
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_moves_only_its_own_element(rule, value):
    moved = []
    for backend in ("cpu", "reference"):
        with _native.use_backend(backend):
            state = {name: torch.ones(600) for name in ("theta", "center", "prior_std", "z", "first", "second")}
            grad = torch.ones(600)
            grad[[0, 300, 599]] = value
            sums = ops.variational_step_(grad=grad, **state, constants=CONSTANTS, seed=0, rule=rule)
        assert not math.isfinite(sums[1])
        moved.append(state["z"])
        # The sign of infinity is a step like any other; that of NaN must not be 0, which would hide it.
        hit = torch.zeros(600, dtype=torch.bool)
        hit[[0, 300, 599]] = rule != "natural_sign" or math.isnan(value)
        assert torch.equal(~state["z"].isfinite(), hit)
        assert torch.equal(~state["theta"].isfinite(), hit)
    assert same(*moved)


@needs_native
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("theta_dtype", DTYPES)
def test_weights_and_gradient_may_be_of_any_dtype_beside_float32_state(theta_dtype, grad_dtype):
    make = torch.Generator().manual_seed(1)
    grad = torch.randn(1000, generator=make).to(grad_dtype)
    value = torch.randn(1000, generator=make).to(grad_dtype)
    for state in (F32, F64):
        results = []
        for backend in ("cpu", "reference"):
            with _native.use_backend(backend):
                theta = torch.empty(1000, dtype=theta_dtype)
                z, first, second = (torch.zeros(1000, dtype=state) for _ in range(3))
                one = torch.ones(1000, dtype=state)
                ops.variational_step_(
                    theta, grad, one, one, z, CONSTANTS, 1, 2, 3, first=first, second=second, rule="natural"
                )
                total, mean, squares = z.clone(), z.clone(), one.clone()
                ops.add_noise_gradient_(total, grad, 1)
                ops.welford_update_(mean, squares, value, 3)
                results.append([theta, z, first, total, mean, squares])
        for got, expected in zip(*results, strict=True):
            assert torch.equal(bits(got), bits(expected))
        assert torch.equal(results[0][0], (1 + (results[0][1] + noise(1000, state))).to(theta_dtype))


def noise(size: int, dtype: torch.dtype) -> Tensor:
    return ops.standard_normal(size, 1, 3, dtype=dtype)


def step(rule: str = "natural", **changes: object) -> Tensor:
    arguments = {"theta": ONE, "grad": ONE, "center": ONE, "prior_std": ONE, "z": ONE.clone()} | changes
    return ops.variational_step_(**arguments, constants=CONSTANTS, seed=0, rule=rule)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "reference"])
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: step("sgd"), "rule must be one of natural, natural_sign, natural_adam, adam, got 'sgd'"),
        (lambda: step("adam"), "rule 'adam' needs first and second, its two moments; start them as zeros"),
        (lambda: step("natural_adam", first=ONE.clone()), "needs first and second"),
        (lambda: step(log_std=ONE.clone()), "log_std, std_first and std_second go together; give all three or none"),
        (lambda: step(z=torch.ones(6)[::2]), r"z must be contiguous, got strides \(2,\)"),
        (lambda: step(theta=torch.ones(6)[::2]), "theta must be contiguous"),
        (lambda: step(grad=[ONE, ONE]), "grad must match theta tensor by tensor"),
        (lambda: step(first=torch.ones(4)), r"first must match theta tensor by tensor; got \[\(4,\)\] beside"),
        (lambda: step(center=ONE.double()), "center must have the dtype of z, torch.float32, got torch.float64"),
        (lambda: step(first=ONE.half()), "first must have the dtype of z"),
        (lambda: step(z=ONE.bfloat16(), center=ONE.bfloat16()), "z must be float32 or float64, got torch.bfloat16"),
        (lambda: step(grad=ONE.long()), "grad must be floating-point, got torch.int64"),
        (
            lambda: ops.variational_gradient_norm(ONE, ONE, ONE, CONSTANTS, rule="sgd"),
            "variational_gradient_norm: rule must be one of",
        ),
        (
            lambda: ops.variational_gradient_norm(ONE, ONE, ONE.double(), CONSTANTS),
            "prior_std must have the dtype of z",
        ),
        (lambda: ops.add_noise_gradient_(ONE.half(), ONE, 0), "sum must be float32 or float64, got torch.float16"),
        (lambda: ops.add_noise_gradient_(ONE, [ONE, ONE], 0), "grad must match sum tensor by tensor"),
        (lambda: ops.welford_update_(ONE, ONE, ONE, 0), "count must be at least 1, .* got 0"),
        (lambda: ops.welford_update_(ONE.half(), ONE.half(), ONE, 1), "mean must be float32 or float64"),
        (lambda: ops.welford_update_(ONE, ONE.double(), ONE, 1), "all tensors must have one dtype"),
        (lambda: ops.welford_update_(ONE, ONE, ONE[:2], 1), r"value must be a float tensor of shape \(3,\)"),
        (lambda: ops.welford_update_(ONE, torch.ones(6)[::2], ONE, 1), "squares must be contiguous"),
    ],
)
def test_misuse_is_an_error_that_names_op_and_argument(backend, call, says):
    with _native.use_backend(backend), pytest.raises(InputError, match=says):
        call()
    assert ONE.tolist() == [1, 1, 1]  # and nothing was written


@needs_native
def test_the_library_checks_what_would_be_read_out_of_bounds():
    # Reached only past the checks above, by callers of torch.ops.
    op, seed = torch.ops.vdu_fast.variational_step_, torch.tensor(0)
    constants = CONSTANTS.tensor()
    lists = [[ONE.clone()] for _ in range(5)]
    for arguments, says in (
        ((*lists[:4], [ONE[:2]], *[[]] * 6, constants, seed, seed, seed, 0), "z must have as many elements"),
        ((*lists, *[[]] * 6, constants, seed, seed, seed, 2), "need first and second"),
        ((*lists, *[[]] * 6, constants, seed, seed, seed, 4), "rule must be 0 to 3"),
        ((*lists, *[[]] * 6, constants[:3], seed, seed, seed, 0), "constants must be"),
        ((*lists, [], [], [ONE], [], [], [], constants, seed, seed, seed, 0), "go together"),
        ((*lists, *[[]] * 6, constants, seed.float(), seed, seed, 0), "seed must be"),
    ):
        with pytest.raises(RuntimeError, match=says):
            op(*arguments)
    with pytest.raises(RuntimeError, match="rule must be"):
        torch.ops.vdu_fast.variational_gradient_norm([ONE], [ONE], [ONE], constants, 4)
    with pytest.raises(RuntimeError, match="one element per sample"):
        torch.ops.vdu_fast.mix_noise(torch.ones(3, 2), ONE[:2], ONE, seed, seed)
    with pytest.raises(RuntimeError, match="must have the shape"):
        torch.ops.vdu_fast.sample_weights(ONE, ONE[:2], seed, seed)


@needs_native
def test_welford_gives_mean_and_squared_deviations_of_what_it_took():
    values = torch.randn(50, 300, generator=torch.Generator().manual_seed(2), dtype=F64)
    for dtype, tolerance in ((F64, 1e-12), (F32, 1e-5)):
        mean, squares = torch.zeros(300, dtype=dtype), torch.zeros(300, dtype=dtype)
        for count, value in enumerate(values, start=1):
            before = mean.double().clone()
            sums = ops.welford_update_(mean, squares, value.to(dtype), count)
            expected = torch.stack([(value - before).square().sum(), value.square().sum()])
            torch.testing.assert_close(sums, expected, rtol=tolerance, atol=0)
        torch.testing.assert_close(mean.double(), values.mean(0), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(squares.double(), values.var(0, correction=0) * 50, rtol=tolerance, atol=tolerance)


@needs_native
def test_narrow_values_are_taken_into_wide_averages():
    for dtype in (F16, BF16):
        mean, squares = torch.zeros(500), torch.zeros(500)
        value = torch.randn(500).to(dtype)
        ops.welford_update_(mean, squares, value.reshape(100, 5).t().reshape(5, 100).flatten(), 1)
        ops.welford_update_(mean, squares, torch.zeros(500, dtype=dtype), 2)
        torch.testing.assert_close(mean.sum(), value.float().sum() / 2)
