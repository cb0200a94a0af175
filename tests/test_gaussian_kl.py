"""KL and penalty for any finite values, and for those that are not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operands import F16, F32, F64, needs_native
from torch import Tensor

from vdu_fast import _native, ops
from vdu_fast.errors import InputError

MEAN = st.floats(-1e6, 1e6, width=32)
ROWS = st.lists(st.tuples(MEAN, st.floats(-100, 80, width=32), MEAN, st.floats(2**-100, 1e6, width=32)), max_size=40)


def exact_terms(mean: Tensor, log_std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """The four terms of every element in float64, [4, n]."""
    mean, log_std, prior_mean, prior_std = (t.double() for t in (mean, log_std, prior_mean, prior_std))
    ratio = log_std - prior_std.log()
    half = torch.full_like(ratio, -0.5)
    return torch.stack([0.5 * torch.exp(2 * ratio), 0.5 * ((mean - prior_mean) / prior_std).square(), -ratio, half])


@needs_native
@given(rows=ROWS)
def test_the_kl_of_any_finite_values_is_that_of_float64_to_the_size_of_its_terms(rows):
    tensors = list(torch.tensor(rows, dtype=F32).reshape(-1, 4).t().contiguous())
    terms = exact_terms(*tensors)
    exact, size = float(terms.sum()), float(terms.abs().sum())
    for backend in ("cpu", "reference"):
        with _native.use_backend(backend):
            kl, penalty = ops.gaussian_kl(*tensors), ops.quadratic_penalty(tensors[0], *tensors[2:])
        if size > 1e38:  # beyond float32
            assert float(kl) == math.inf or float(kl) > 1e37
        else:
            # The exponent 2 (log_std - log prior_std) has an error of 2^-24 of its terms, up to 500.
            assert abs(float(kl) - exact) <= 1e-4 * size + 1e-6
            assert abs(float(penalty) - float(terms[1].sum())) <= 1e-5 * float(terms[1].sum()) + 1e-37


@needs_native
@given(rows=ROWS, needs=st.integers(0, 15))
def test_gradients_of_any_finite_values_have_the_bits_of_the_reference(rows, needs):
    tensors = torch.tensor(rows, dtype=F32).reshape(-1, 4).t().contiguous()
    grad = torch.tensor(0.3)
    results = []
    for backend in ("cpu", "reference"):
        with _native.use_backend(backend):
            op = ops._implementation("gaussian_kl_backward", torch.device("cpu"))
            results.append(op(grad, *tensors, needs))
    for k, (got, expected) in enumerate(zip(*results, strict=True)):
        assert got.shape == (tensors.shape[1:] if needs >> k & 1 else (0,))
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@needs_native
@given(
    rows=st.lists(st.tuples(MEAN, st.floats(-300, 300, width=32), MEAN, st.floats(0, width=32)), min_size=1),
    repeats=st.sampled_from([1, 300]),
)
def test_gradients_in_one_pass_of_any_values_have_the_bits_of_the_reference(rows, repeats):
    """Blocks of ordinary values are computed without the special cases of exp and log; the others with."""
    tensors = torch.tensor(rows, dtype=F32).reshape(-1, 4).repeat(repeats, 1).t().contiguous()
    results, d_mean, d_log_std = [], torch.empty_like(tensors[0]), torch.empty_like(tensors[0])
    for backend in ("cpu", "reference"):
        with _native.use_backend(backend):
            kl, *gradients = ops.variational_gradients(tensors[0], *tensors, 1, kl_weight=0.5)
            results.append([*gradients, ops.sample_weights(*tensors[:2], 1)])
            into = ops.variational_gradients_(d_mean, d_log_std, tensors[0], *tensors, 1, kl_weight=0.5)
        for got, expected in zip((into, d_mean, d_log_std), (kl, *gradients), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_gradients_go_only_where_they_fit():
    x = torch.ones(4, 3)
    with pytest.raises(InputError, match="d_mean must be contiguous"):
        ops.variational_gradients_(torch.ones(3, 4).t(), x, x, x, x, x, x, 1)
    with pytest.raises(InputError, match="one dtype"):
        ops.variational_gradients_(x, x.half(), x, x, x, x, x, 1)
    with pytest.raises(InputError, match="one shape"):
        ops.variational_gradients_(x[0], x, x, x, x, x, x, 1)


@needs_native
def test_what_is_not_finite_shows():
    one = torch.ones(300)
    for place in (0, 255, 299):
        for k in range(4):
            tensors = [one.clone() for _ in range(4)]
            tensors[k][place] = math.nan
            assert math.isnan(ops.gaussian_kl(*tensors)), (k, place)
            if k != 1:
                assert math.isnan(ops.quadratic_penalty(*(t for j, t in enumerate(tensors) if j != 1)))
    assert float(ops.gaussian_kl(one * math.inf, one, one, one)) == math.inf
    assert float(ops.gaussian_kl(one, one * -math.inf, one, one)) == math.inf
    assert float(ops.gaussian_kl(one, one * 200, one, one)) == math.inf
    assert not math.isfinite(ops.gaussian_kl(one, one, one, one * 0))


@needs_native
def test_a_kl_near_zero_is_near_zero():
    # The terms cancel; what is left is their rounding, 2^-24 each, and of no sign.
    log_std = torch.linspace(-5, 1, 10_000)
    mean = torch.linspace(-1, 1, 10_000)
    assert abs(float(ops.gaussian_kl(mean, log_std, mean, log_std.exp()))) < 1e-3
    assert float(ops.quadratic_penalty(mean, mean, log_std.exp())) == 0


@needs_native
def test_sums_of_half_precision_are_in_float32():
    mean, std = torch.full((5000,), 30.0, dtype=F16), torch.ones(5000, dtype=F16)
    total = ops.quadratic_penalty(mean, mean * 0, std)
    assert total.dtype == F32
    assert float(total) == 5000 * 450  # beyond the largest half
    assert ops.gaussian_kl(*(t.to(F64) for t in (mean, std, mean, std))).dtype == F64
