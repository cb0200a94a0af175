"""The checked front of the hot paths: the same values as the reference, and a named error for each misuse."""

from __future__ import annotations

import pytest
import torch

from vdu_fast import ops, reference, rng
from vdu_fast.errors import InputError

MEAN, STD = torch.linspace(-1, 1, 12), torch.linspace(0.1, 2, 12)
X0, T = torch.linspace(-1, 1, 12).reshape(3, 4), torch.tensor([0, 2, 1])
ABAR = torch.tensor([0.9, 0.5, 0.1])


def test_ops_give_what_the_reference_gives():
    assert torch.equal(
        ops.standard_normal((3, 4), 5, 2, stream=4, offset=3), rng.standard_normal((3, 4), 5, 2, stream=4, offset=3)
    )
    assert torch.equal(
        ops.sample_weights(MEAN, STD.log(), 5, 2, offset=9), reference.sample_weights(MEAN, STD.log(), 5, 2, offset=9)
    )
    assert torch.equal(ops.add_noise(X0, T, ABAR, 5, 2), reference.add_noise(X0, T, ABAR, 5, 2))
    for reduction in ("none", "sum", "mean"):
        weight = torch.tensor([1.0, 2.0, 3.0])
        for target in (None, X0.flip(0)):
            options = {"weight": weight, "reduction": reduction, "target": target}
            assert torch.equal(
                ops.noise_prediction_loss(X0, 5, 2, **options), reference.noise_prediction_loss(X0, 5, 2, **options)
            )
    torch.testing.assert_close(
        ops.gaussian_kl(MEAN, STD.log(), MEAN * 2, STD * 2), reference.gaussian_kl(MEAN, STD.log(), MEAN * 2, STD * 2)
    )
    torch.testing.assert_close(
        ops.quadratic_penalty(MEAN, MEAN * 2, STD), reference.quadratic_penalty(MEAN, MEAN * 2, STD)
    )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ops.sample_weights(MEAN, STD[:3], 0), r"sample_weights: .*'mean': \(12,\), 'log_std': \(3,\)"),
        (lambda: ops.sample_weights(MEAN.long(), STD, 0), "sample_weights: mean must be a floating-point tensor"),
        (lambda: ops.add_noise(X0, T.int(), ABAR, 0), r"add_noise: timesteps must be int64 \[3\], got torch.int32"),
        (lambda: ops.add_noise(X0, T[:2], ABAR, 0), r"timesteps must be int64 \[3\], got torch.int64 \[2\]"),
        (lambda: ops.add_noise(X0, T, ABAR[None], 0), r"alphas_cumprod must be \[T\], got \[1, 3\]"),
        # 8-bit images would be silently truncated to integers.
        (
            lambda: ops.add_noise(X0.byte(), T, ABAR, 0),
            "add_noise: x0 must be a floating-point tensor, got torch.uint8",
        ),
        (lambda: ops.noise_prediction_loss(X0, 0, reduction="max"), "reduction must be one of .*'none'.*got 'max'"),
        (lambda: ops.noise_prediction_loss(X0, 0, weight=torch.ones(4)), r"weight must be \[3\], got \[4\]"),
        (
            lambda: ops.noise_prediction_loss(X0, 0, target=X0[:2]),
            "noise_prediction_loss: all tensors must have one shape",
        ),
        (
            lambda: ops.noise_prediction_loss(X0.long(), 0),
            "prediction must be a floating-point tensor, got torch.int64",
        ),
        (lambda: ops.gaussian_kl(MEAN, STD, MEAN, STD[:2]), "gaussian_kl: all tensors must have one shape"),
        (lambda: ops.gaussian_kl(MEAN, STD, MEAN.long(), STD), "gaussian_kl: prior_mean must be a floating-point"),
        (lambda: ops.quadratic_penalty(MEAN, MEAN[:1], STD), "quadratic_penalty: all tensors must have one shape"),
    ],
)
def test_misuse_is_an_error_that_names_op_and_argument(call, says):
    with pytest.raises(InputError, match=says):
        call()
