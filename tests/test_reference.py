"""The reference formulas against float64, against torch.distributions and against the derivatives on paper."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from vdu_fast import reference
from vdu_fast.rng import Stream, standard_normal


def doubles(*shape: int, seed: int = 0, positive: bool = False) -> torch.Tensor:
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (values.abs() + 0.1 if positive else values).requires_grad_()


def test_sample_weights_is_mean_plus_std_times_the_noise_of_its_stream():
    mean, log_std = doubles(3, 5, seed=1), doubles(3, 5, seed=2)
    n = standard_normal((3, 5), 7, 4, stream=Stream.WEIGHTS, dtype=torch.float64)
    torch.testing.assert_close(reference.sample_weights(mean, log_std, 7, 4), mean + log_std.exp() * n)


def test_sample_weights_in_pieces_is_sample_weights_whole():
    mean, log_std = doubles(100, seed=1), doubles(100, seed=2)
    whole = reference.sample_weights(mean, log_std, 3)
    parts = [reference.sample_weights(mean[a:b], log_std[a:b], 3, offset=a) for a, b in ((0, 7), (7, 64), (64, 100))]
    assert torch.equal(torch.cat(parts), whole)


def test_gradients_of_sample_weights_are_g_and_g_n_sigma():
    mean, log_std = doubles(50, seed=1), doubles(50, seed=2)
    n = standard_normal(50, 5, 2, stream=Stream.WEIGHTS, dtype=torch.float64)
    theta = reference.sample_weights(mean, log_std, 5, 2)
    g = torch.autograd.grad((theta**3).sum(), theta, retain_graph=True)[0]
    grad_mean, grad_log_std = torch.autograd.grad((theta**3).sum(), (mean, log_std))
    torch.testing.assert_close(grad_mean, g)
    torch.testing.assert_close(grad_log_std, g * n * log_std.exp())


def test_add_noise_is_the_forward_process_per_sample():
    x0 = doubles(3, 2, 4, seed=1)
    abar = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    timesteps = torch.tensor([2, 0, 1])
    eps = standard_normal(x0.shape, 3, 1, stream=Stream.IMAGE_NOISE, dtype=torch.float64)
    expected = torch.stack(
        [abar[t] ** 0.5 * x + (1 - abar[t]) ** 0.5 * e for x, e, t in zip(x0, eps, timesteps, strict=True)]
    )
    torch.testing.assert_close(reference.add_noise(x0, timesteps, abar, 3, 1), expected)


def test_the_noise_that_is_added_is_the_noise_that_the_loss_compares_with():
    x0, abar = torch.zeros(4, 3, 2, 2), torch.tensor([0.0])
    # With abar = 0, x_t is eps itself: a network that returns its input is then perfect.
    x_t = reference.add_noise(x0, torch.zeros(4, dtype=torch.int64), abar, 11, 6)
    assert float(reference.noise_prediction_loss(x_t, 11, 6)) == 0
    assert float(reference.noise_prediction_loss(x_t, 11, 7)) > 0.5
    assert float(reference.noise_prediction_loss(x_t, 12, 6)) > 0.5


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (5, 7), (6,)])
def test_the_loss_is_the_weighted_squared_error_in_all_reductions(shape):
    prediction, target, weight = doubles(*shape, seed=1), doubles(*shape, seed=2), doubles(shape[0], seed=3)
    per_sample = torch.stack([w * ((t - p) ** 2).sum() for w, t, p in zip(weight, target, prediction, strict=True)])
    options = {"weight": weight, "target": target}
    none, total, mean = (
        reference.noise_prediction_loss(prediction, 0, reduction=reduction, **options)
        for reduction in ("none", "sum", "mean")
    )
    torch.testing.assert_close(none, per_sample)
    torch.testing.assert_close(total, per_sample.sum())
    torch.testing.assert_close(mean, per_sample.sum() / prediction.numel())


def test_the_unweighted_mean_is_mse_loss():
    prediction, target = doubles(4, 6, seed=1), doubles(4, 6, seed=2)
    expected = torch.nn.functional.mse_loss(prediction, target)
    torch.testing.assert_close(reference.noise_prediction_loss(prediction, 0, target=target), expected)


def test_an_empty_batch_has_no_loss():
    assert reference.noise_prediction_loss(torch.empty(0, 1, 8, 8), 0, reduction="none").shape == (0,)
    assert float(reference.noise_prediction_loss(torch.empty(0, 1, 8, 8), 0, reduction="sum")) == 0


@given(
    values=st.tuples(*[st.floats(-5, 5)] * 2, *[st.floats(-6, 3)] * 2),
)
def test_gaussian_kl_is_that_of_torch_distributions(values):
    mean, prior_mean, log_std, log_prior = (torch.tensor([v], dtype=torch.float64) for v in values)
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(prior_mean, log_prior.exp())).sum()
    got = reference.gaussian_kl(mean, log_std, prior_mean, log_prior.exp())
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_gradients_of_gaussian_kl_are_those_on_paper():
    mean, log_std, prior_mean = doubles(40, seed=1), doubles(40, seed=2), doubles(40, seed=3).detach()
    prior_std = doubles(40, seed=4, positive=True).detach()
    kl = reference.gaussian_kl(mean, log_std, prior_mean, prior_std)
    grad_mean, grad_log_std = torch.autograd.grad(kl, (mean, log_std))
    torch.testing.assert_close(grad_mean, (mean - prior_mean) / prior_std**2)
    torch.testing.assert_close(grad_log_std, log_std.exp() ** 2 / prior_std**2 - 1)


def test_gaussian_kl_of_a_distribution_with_itself_is_zero():
    mean, std = doubles(30, seed=1).detach(), doubles(30, seed=2, positive=True).detach()
    assert abs(float(reference.gaussian_kl(mean, std.log(), mean, std))) < 1e-12


def test_the_quadratic_penalty_is_the_kl_at_equal_variances():
    mean, prior_mean, std = doubles(30, seed=1), doubles(30, seed=2), doubles(30, seed=3, positive=True)
    expected = kl_divergence(Normal(mean, std), Normal(prior_mean, std)).sum()
    torch.testing.assert_close(reference.quadratic_penalty(mean, prior_mean, std), expected)
    torch.testing.assert_close(reference.gaussian_kl(mean, std.log(), prior_mean, std), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_functions_keep_the_dtype_of_their_inputs(dtype):
    mean, std = torch.randn(8, dtype=dtype), torch.rand(8).to(dtype) + 0.5
    assert reference.sample_weights(mean, std.log(), 0).dtype == dtype
    x0 = mean.reshape(2, 4)
    assert reference.add_noise(x0, torch.tensor([0, 0]), torch.tensor([0.5]), 0).dtype == dtype
    # Sums over elements keep at least the precision of float32.
    wide = torch.promote_types(dtype, torch.float32)
    assert reference.gaussian_kl(mean, std.log(), mean, std).dtype == wide
    assert reference.quadratic_penalty(mean, mean, std).dtype == wide
    assert reference.noise_prediction_loss(x0, 0, weight=torch.ones(2)).dtype == wide


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda m, r: reference.sample_weights(m, r, 3, 1, offset=5), (doubles(7, seed=1), doubles(7, seed=2))),
        (
            lambda x: reference.add_noise(x, torch.tensor([1, 0]), torch.tensor([0.7, 0.2]).double(), 3),
            (doubles(2, 3, seed=1),),
        ),
        (
            lambda p, w: reference.noise_prediction_loss(p, 3, weight=w, reduction="none"),
            (doubles(3, 4, seed=1), doubles(3, seed=2)),
        ),
        (
            lambda p, t: reference.noise_prediction_loss(p, 0, target=t),
            (doubles(3, 4, seed=1), doubles(3, 4, seed=2)),
        ),
        (
            reference.gaussian_kl,
            (doubles(5, seed=1), doubles(5, seed=2), doubles(5, seed=3), doubles(5, seed=4, positive=True)),
        ),
        (
            reference.quadratic_penalty,
            (doubles(5, seed=1), doubles(5, seed=3), doubles(5, seed=4, positive=True)),
        ),
    ],
    ids=["sample_weights", "add_noise", "loss_of_noise", "loss_of_target", "gaussian_kl", "quadratic_penalty"],
)
def test_gradcheck_in_float64(function, inputs):
    assert torch.autograd.gradcheck(function, [t.detach().clone().requires_grad_() for t in inputs])
