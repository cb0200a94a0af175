"""Sampling weights: any finite input, what is not finite, any strides, and a named error for each misuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operands import BF16, F16, F32, F64, bits, needs_native
from torch import Tensor

from vdu_fast import _native, ops
from vdu_fast.errors import InputError

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
LOG_STD = st.one_of(st.floats(-100, 80, width=32), st.sampled_from([0.0, -0.0, -100.0, 80.0, -87.5, 1e-40]))
ROWS = st.lists(st.tuples(FLOATS, LOG_STD, st.floats(2**-126, 1e3, width=32)), max_size=40)
ONE = torch.ones(3)


def on_both(function) -> tuple[Tensor, Tensor]:
    results = []
    for backend in ("cpu", "reference"):
        with _native.use_backend(backend):
            results.append(function())
    return results[0], results[1]


def columns(rows: list, width: int) -> list[Tensor]:
    return list(torch.tensor(rows, dtype=F32).reshape(-1, width).t().contiguous())


@needs_native
@given(rows=ROWS, seed=st.integers(0, 2**63), dtype=st.sampled_from([F32, F16, BF16]))
def test_any_finite_values_have_the_bits_of_the_reference(rows, seed, dtype):
    mean, log_std, prior_std = (t.to(dtype) for t in columns(rows, 3))
    for function in (
        lambda: ops.sample_weights(mean, log_std, seed),
        lambda: ops.sample_whitened_weights(mean, prior_std, log_std, seed, noise_scale=0.5),
    ):
        got, expected = on_both(function)
        assert torch.equal(got.isnan(), expected.isnan())  # inf - inf and 0 inf, in half precision
        assert torch.equal(bits(got.nan_to_num(5.0)), bits(expected.nan_to_num(5.0)))


@needs_native
@given(rows=ROWS, seed=st.integers(0, 2**63))
def test_any_finite_values_are_sampled_as_in_float64(rows, seed):
    mean, log_std, _ = columns(rows, 3)
    got, exact = ops.sample_weights(mean, log_std, seed), ops.sample_weights(mean.double(), log_std.double(), seed)
    inside = exact.abs() < 3e38  # and no sum of two that cancel
    scale = mean.double().abs() + (exact - mean.double()).abs()
    assert bool(((got.double() - exact).abs() <= 1e-6 * scale + 1e-44)[inside].all())


@needs_native
def test_what_is_not_finite_is_carried_on():
    inf, nan = math.inf, math.nan
    mean = torch.tensor([nan, inf, -inf, 0.0, 0.0, 0.0, 1.0])
    log_std = torch.tensor([0.0, 0.0, 0.0, nan, inf, 200.0, -inf])
    got, expected = on_both(lambda: ops.sample_weights(mean, log_std, 1))
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert got.isnan().tolist() == [True, False, False, True, False, False, False]
    assert got[1:3].tolist() == [inf, -inf]
    assert got[4:6].isinf().all()
    assert got[6] == 1  # exp(-inf) is a point mass
    out = torch.empty(7, dtype=F16)
    ops.sample_weights_(out, mean, log_std, 1)
    torch.testing.assert_close(out, expected.half(), rtol=0, atol=0, equal_nan=True)


@needs_native
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[:, ::2],
        lambda t: t.flip(0),
        lambda t: t[:1].expand(4, -1),
        lambda t: t.flatten()[1:].unfold(0, 6, 3),
        lambda t: t.view(2, 2, 2, 3).to(memory_format=torch.channels_last),
        lambda t: t.view(4, 3, 2).permute(2, 0, 1),
    ],
    ids=["t", "step", "flip", "expand", "overlap", "channels_last", "permute"],
)
def test_strides_of_the_arguments_make_no_difference(view):
    mean, log_std, std = (view(torch.randn(4, 6, generator=torch.Generator().manual_seed(k))) for k in range(3))
    plain = [t.contiguous() for t in (mean, log_std, std)]
    for function in (
        lambda m, r, s: ops.sample_weights(m, r, 3, 1, offset=5),
        lambda m, r, s: ops.sample_whitened_weights(m, s, r, 3),
        lambda m, r, s: ops.mix_noise(m, r.flatten()[: len(m)], s.flatten()[: len(m)], 3),
        lambda m, r, s: ops.noise_prediction_loss(m, 3, target=r, weight=s.flatten()[: len(m)]),
        lambda m, r, s: ops.gaussian_kl(m, r, s, s.exp()),
        lambda m, r, s: ops.quadratic_penalty(m, r, s.exp()),
        lambda m, r, s: torch.stack(ops.variational_gradients(m, m, r, s, s.exp(), 3)[1:]),
    ):
        got = function(mean, log_std, std)
        assert torch.equal(got, function(*plain))
        assert got.is_contiguous()
    for function in (
        lambda m, r: ops.sample_weights(m, r, 3),
        lambda m, r: ops.gaussian_kl(m, r, m * 2, r.exp()),
        lambda m, r: ops.noise_prediction_loss(m * r, 3),
    ):
        leaves = [[t.clone().requires_grad_() for t in tensors[:2]] for tensors in ((mean, log_std), plain)]
        strided, flat = (torch.autograd.grad(function(*pair).square().sum(), pair) for pair in leaves)
        torch.testing.assert_close(strided, flat, rtol=1e-6, atol=1e-6)


@needs_native
def test_a_sample_of_one_dtype_is_stored_in_another_with_one_rounding():
    mean, log_std = torch.randn(1000), torch.randn(1000)
    theta = ops.sample_weights(mean, log_std, 4)
    for dtype in (F16, BF16, F32, F64):
        out = torch.empty(1000, dtype=dtype)
        ops.sample_weights_(out, mean, log_std, 4)
        assert torch.equal(out, theta.to(dtype))
        ops.sample_weights_(out, mean.double(), log_std.double(), 4)
        assert torch.equal(out, ops.sample_weights(mean.double(), log_std.double(), 4).to(dtype))


@needs_native
def test_weights_may_be_written_over_the_mean_they_come_from():
    mean, log_std = torch.randn(1000), torch.randn(1000)
    expected = ops.sample_weights(mean, log_std, 4)
    ops.sample_weights_(mean, mean, log_std, 4)
    assert torch.equal(mean, expected)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "reference"])
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: ops.sample_weights_(torch.ones(3, 2).t(), torch.ones(2, 3), torch.ones(2, 3), 0),
            r"sample_weights_: out must be contiguous, got strides \(1, 2\) for shape \(2, 3\); pass .contiguous\(\)",
        ),
        (lambda: ops.sample_weights_([ONE], [ONE, ONE], [ONE], 0), "mean must match out tensor by tensor"),
        (lambda: ops.sample_weights_([ONE], [], [ONE], 0), "mean must match out tensor by tensor"),
        (lambda: ops.sample_weights_(ONE, ONE[:2], ONE, 0), r"got \[\(2,\)\] beside \[\(3,\)\]"),
        (lambda: ops.sample_weights_(ONE.long(), ONE, ONE, 0), "out must be floating-point, got torch.int64"),
        (lambda: ops.sample_weights_(ONE, ONE, ONE.double(), 0), "log_std must have the dtype of mean, torch.float32"),
        (
            lambda: ops.sample_weights_([ONE, ONE.half()], [ONE, ONE], [ONE, ONE], 0),
            "tensors of out must have one dtype, got torch.float32 and torch.float16; call once per dtype",
        ),
        (lambda: ops.sample_whitened_weights(ONE, ONE.double(), ONE, 0), "all tensors must have one dtype"),
        (
            lambda: ops.sample_whitened_weights_(ONE, ONE.half(), ONE, ONE, 0),
            "center must have the dtype of z, torch.float32, got torch.float16",
        ),
        (
            lambda: ops.sample_whitened_weights_(ONE, ONE, ONE, ONE, 0, log_std=[ONE, ONE]),
            "log_std must match out tensor by tensor",
        ),
    ],
)
def test_misuse_is_an_error_that_names_op_and_argument(backend, call, says):
    with _native.use_backend(backend), pytest.raises(InputError, match=says):
        call()
