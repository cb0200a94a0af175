"""The loss for batches of any shape and values, its saturations, and a named error for each misuse."""

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

SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=4)
X = torch.ones(3, 4)


def randn(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@needs_native
@given(
    shape=SHAPES,
    dtype=st.sampled_from([F32, F64, F16, BF16]),
    given_=st.sets(st.sampled_from(["target", "signal", "noise", "weight"])),
    saturation=st.sampled_from(["none", "hinge", "npo"]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    scale=st.sampled_from([0.0, 1e-20, 1.0, 100.0]),
)
def test_any_batch_has_the_loss_and_gradient_of_the_reference(shape, dtype, given_, saturation, reduction, scale):
    if "signal" in given_:
        given_ = given_ | {"target"}
    shapes = {"target": shape, "signal": shape[:1], "noise": shape[:1], "weight": shape[:1]}
    options = {name: randn(*shapes[name], seed=k, dtype=dtype) for k, name in enumerate(sorted(given_))}
    vectors = {name: randn(shape[0], seed=9 + k).abs() + 0.1 for k, name in enumerate(("limit", "beta", "before"))}
    results = []
    for backend in ("cpu", "reference"):
        prediction = (scale * randn(*shape, seed=8)).to(dtype).requires_grad_()
        with _native.use_backend(backend):
            loss = ops.noise_prediction_loss(
                prediction, 5, 2, reduction=reduction, saturation=saturation, **options, **vectors
            )
            (gradient,) = torch.autograd.grad(loss.sum(), prediction)
        results.append((loss.detach(), gradient))
    (loss, gradient), (expected_loss, expected) = results
    assert loss.dtype == torch.promote_types(dtype, F32)
    tolerance = {F64: 1e-9, F32: 2e-5}[loss.dtype]
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance, equal_nan=True)
    # The error's sum enters the gradient only through npo; without it nothing is rounded differently.
    rounding = {F64: 1e-9, F32: 1e-4, F16: 2**-9, BF16: 2**-6}[dtype] if saturation == "npo" else 0
    torch.testing.assert_close(gradient, expected, rtol=rounding, atol=rounding * 1e-2, equal_nan=True)


@needs_native
@pytest.mark.parametrize("elements", [1, 2, 255, 256, 257, 16_384, 16_385])
def test_a_sample_has_the_same_bits_alone_and_in_a_batch_of_any_size(elements):
    # Its target is given, so its place in the batch draws nothing.
    prediction, target = randn(5, elements, seed=1), randn(5, elements, seed=2)
    whole = ops.noise_prediction_loss(prediction, 0, target=target, reduction="none")
    alone = [
        ops.noise_prediction_loss(p[None], 0, target=t[None], reduction="none")
        for p, t in zip(prediction, target, strict=True)
    ]
    assert torch.equal(bits(whole), bits(torch.cat(alone)))


@needs_native
@pytest.mark.parametrize("elements", [5, 300])
def test_a_sample_that_the_hinge_let_go_of_has_no_gradient_even_where_it_is_not_finite(elements):
    prediction = torch.ones(3, elements)
    prediction[1, 2] = math.inf
    prediction.requires_grad_()
    limit, target = torch.tensor([1e9, 10.0, 1e9]), torch.zeros(3, elements)
    loss = ops.noise_prediction_loss(prediction, 0, target=target, saturation="hinge", limit=limit, reduction="none")
    loss.sum().backward()
    assert loss.tolist() == [elements, 10, elements]
    assert prediction.grad.tolist() == [[2.0] * elements, [0.0] * elements, [2.0] * elements]


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "reference"])
@pytest.mark.parametrize(("dtype", "wide"), [(BF16, F32), (F16, BF16), (F32, F64), (F64, F32)])
def test_a_prediction_and_a_target_of_two_dtypes_meet_in_the_wider_one(backend, dtype, wide):
    prediction, target = randn(3, 40, seed=1, dtype=dtype).requires_grad_(), randn(3, 40, seed=2, dtype=wide)
    both = torch.promote_types(dtype, wide)
    exact = prediction.detach().to(both).requires_grad_()
    with _native.use_backend(backend):
        loss = ops.noise_prediction_loss(prediction, 0, target=target)
        same = ops.noise_prediction_loss(exact, 0, target=target.to(both))
    assert loss.dtype == torch.promote_types(both, F32)
    assert torch.equal(bits(loss.detach()), bits(same.detach()))
    loss.backward()
    same.backward()
    assert prediction.grad.dtype == dtype
    assert torch.equal(prediction.grad, exact.grad.to(dtype))


@needs_native
def test_what_is_not_finite_stays_in_its_sample():
    for elements in (5, 300):
        prediction = torch.ones(4, elements)
        prediction[1, 2], prediction[2, 0] = math.nan, math.inf
        loss = ops.noise_prediction_loss(prediction, 0, reduction="none")
        assert loss.isfinite().tolist() == [True, False, False, True]
        assert math.isnan(loss[1])
        assert loss[2] == math.inf


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "reference"])
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ops.noise_prediction_loss(X, 0, saturation="clip"), "saturation must be one of .*got 'clip'"),
        (lambda: ops.noise_prediction_loss(X, 0, saturation="hinge"), r"saturation 'hinge' needs limit, float \[B\]"),
        (lambda: ops.noise_prediction_loss(X, 0, saturation="npo"), "saturation 'npo' needs beta and before"),
        (lambda: ops.noise_prediction_loss(X, 0, signal=torch.ones(3)), "signal multiplies target; give target = x_0"),
        (lambda: ops.noise_prediction_loss(X, 0, noise=torch.ones(4)), r"noise must be \[3\], got \[4\]"),
        (lambda: ops.noise_prediction_loss(X, 0, weight=torch.ones(3).long()), "weight must be a floating-point"),
        (lambda: ops.noise_prediction_loss(X, 0, target=X.long()), "target must be a floating-point tensor"),
        (lambda: ops.noise_prediction_loss(X, 0, target=X[:1]), "all tensors must have one shape"),
        (lambda: ops.noise_prediction_loss(torch.tensor(1.0), 0), r"prediction must be \[B, ...\], got a scalar"),
        (lambda: ops.mix_noise(torch.tensor(1.0), *[torch.tensor(1.0)] * 2, 0), r"x0 must be \[B, ...\], got a scalar"),
        (lambda: ops.mix_noise(X, torch.ones(3), torch.ones(3, 1), 0), r"noise must be \[3\], got \[3, 1\]"),
        (lambda: ops.mix_noise(X.int(), torch.ones(3), torch.ones(3), 0), "x0 must be a floating-point tensor"),
        (lambda: ops.mix_noise(X, torch.ones(3).int(), torch.ones(3), 0), "signal must be a floating-point tensor"),
    ],
)
def test_misuse_is_an_error_that_names_op_and_argument(backend, call, says):
    with _native.use_backend(backend), pytest.raises(InputError, match=says):
        call()
