"""What each saturation pulls with, and what the reductions mean."""

from __future__ import annotations

import math

import pytest
import torch

from vdu_fast.objective import ascent_loss, forget_scale, per_sample_error, regularizer_scale

ERROR = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
LIMIT = torch.tensor([0.7, 0.4, 2.0, 0.7], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.2, 1.0, 1.0], dtype=torch.float64)


def gradient(saturation: str, **options) -> torch.Tensor:
    error = ERROR.clone().requires_grad_()
    defaults = {"limit": LIMIT, "beta": torch.tensor(2.0), "reference": REFERENCE}
    ascent_loss(error, saturation, **(defaults | options)).backward()
    return error.grad


def test_the_per_sample_error_is_the_weighted_mean_over_elements():
    prediction, target = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    weight = torch.tensor([1.0, 0.5, 4.0])
    expected = weight * (prediction - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(per_sample_error(prediction, target, weight), expected)


def test_the_per_sample_error_of_short_floats_is_taken_in_float32():
    prediction, target = torch.full((1, 1, 64, 64), 200.0, dtype=torch.float16), torch.zeros(1, 1, 64, 64)
    # 200^2 is within float16, the sum of 4,096 of them is not.
    error = per_sample_error(prediction, target, torch.ones(1))
    assert error.dtype == torch.float32
    assert float(error) == 40000


def test_the_per_sample_error_keeps_float64():
    wide = torch.full((1, 1, 2, 2), 1 + 1e-12, dtype=torch.float64)
    error = per_sample_error(wide, torch.ones_like(wide), torch.ones(1))
    assert error.dtype == torch.float64
    assert float(error) == pytest.approx(1e-24, rel=1e-2, abs=0)


def test_without_saturation_every_sample_pulls_alike():
    assert float(ascent_loss(ERROR, "none", limit=LIMIT, beta=torch.tensor(1.0), reference=None)) == pytest.approx(
        -1.15
    )
    torch.testing.assert_close(gradient("none"), torch.full_like(ERROR, -1 / 4))


def test_hinge_lets_go_of_samples_beyond_their_own_limit():
    value = ascent_loss(ERROR, "hinge", limit=LIMIT, beta=torch.tensor(1.0), reference=None)
    assert float(value) == pytest.approx(-(0.1 + 0.4 + 1.0 + 0.7) / 4)
    torch.testing.assert_close(gradient("hinge"), torch.tensor([-0.25, 0, -0.25, 0], dtype=torch.float64))


@pytest.mark.parametrize("beta", [0.3, 2.0, 10.0])
def test_npo_pulls_with_twice_the_sigmoid(beta):
    expected = -2 * torch.sigmoid(-beta * (ERROR - REFERENCE)) / 4
    torch.testing.assert_close(gradient("npo", beta=torch.tensor(beta)), expected)


def test_npo_is_its_formula_and_starts_as_plain_ascent():
    value = ascent_loss(ERROR, "npo", limit=LIMIT, beta=torch.tensor(2.0), reference=REFERENCE)
    expected = [2 / 2.0 * math.log1p(math.exp(-2.0 * float(e - r))) for e, r in zip(ERROR, REFERENCE, strict=True)]
    assert float(value) == pytest.approx(sum(expected) / 4)
    # Where the error is still the reference, the weight 2 sigmoid(0) is 1.
    torch.testing.assert_close(gradient("npo", reference=ERROR), gradient("none"))


def test_npo_does_not_move_the_reference():
    reference = REFERENCE.clone()
    ascent_loss(
        ERROR.clone().requires_grad_(), "npo", limit=LIMIT, beta=torch.tensor(2.0), reference=reference
    ).backward()
    assert torch.equal(reference, REFERENCE)


def test_sum_scales_the_batch_mean_to_all_images_timesteps_and_elements():
    assert forget_scale("sum", images=7, timesteps=100, elements=64) == 7 * 100 * 64
    assert forget_scale("mean", images=7, timesteps=100, elements=64) == 1


def test_the_regularizer_is_a_mean_over_parameters_or_the_whole_kl():
    assert regularizer_scale("mean", 250) == 1 / 250
    assert regularizer_scale("sum", 250) == 1
