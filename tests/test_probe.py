"""Two measurements on the fixed batch differ only by the weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from tiny import TinyDenoiser
from torch import nn

from vdu_fast.pipelines import Denoiser
from vdu_fast.probe import NoisePredictionProbe, ReplayProbe, error_curve
from vdu_fast.replay import build_bank


def probe(denoiser: Denoiser, images: torch.Tensor, **options) -> NoisePredictionProbe:
    defaults = {"size": 40, "seed": 1, "weights": denoiser.schedule.timestep_weights("simple")}
    return NoisePredictionProbe(denoiser, images, **(defaults | options))


def test_the_error_is_the_weighted_mean_squared_error(tiny_denoiser, images):
    weights = tiny_denoiser.schedule.timestep_weights("elbo")
    p = probe(tiny_denoiser, images, weights=weights)
    with torch.no_grad():
        prediction = tiny_denoiser.module(p.x_t, p.timesteps)
    # For eps: x_t = signal x_0 + noise eps gives back an x_0 that is one of the images.
    signal, noise = tiny_denoiser.schedule.coefficients(p.timesteps, p.x_t)
    x0 = (p.x_t - noise * p.target) / signal
    assert all(float((images - x).abs().amax(dim=(1, 2, 3)).min()) < 1e-4 for x in x0)
    expected = weights[p.timesteps].float() * (prediction - p.target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(p.error(), expected)


def test_the_error_changes_with_the_weights_and_comes_back_with_them(tiny_denoiser, images):
    p = probe(tiny_denoiser, images)
    start = p.error()
    assert torch.equal(p.error(), start)
    with torch.no_grad():
        tiny_denoiser.module.decode.bias.add_(1)
    assert float((p.error() - start).abs().min()) > 0
    with torch.no_grad():
        tiny_denoiser.module.decode.bias.sub_(1)
    torch.testing.assert_close(p.error(), start)


@pytest.mark.parametrize("window", [None, (10, 30)])
def test_timesteps_spread_evenly_over_the_window(tiny_denoiser, images, window):
    timesteps = probe(tiny_denoiser, images, size=200, window=window).timesteps
    low, high = window or (0, 50)
    counts = torch.bincount(timesteps - low, minlength=high - low)
    assert len(counts) == high - low
    assert (counts == 200 // (high - low)).all()


def test_every_image_is_used_before_any_again(tiny_denoiser, images):
    p = probe(tiny_denoiser, images, size=24)
    signal, noise = tiny_denoiser.schedule.coefficients(p.timesteps, p.x_t)
    x0 = (p.x_t - noise * p.target) / signal
    used = [int((images - x).abs().amax(dim=(1, 2, 3)).argmin()) for x in x0]
    assert sorted(used) == sorted(list(range(12)) * 2)


@pytest.mark.parametrize(("batch_size", "calls"), [(250, [40]), (40, [40]), (39, [20, 20]), (16, [14, 13, 13])])
def test_a_large_batch_passes_through_the_network_in_parts(tiny_denoiser, images, batch_size, calls):
    seen = []
    tiny_denoiser.module.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    weights = torch.linspace(0, 1, 50)
    whole = probe(tiny_denoiser, images, weights=weights).error()
    seen.clear()
    torch.testing.assert_close(probe(tiny_denoiser, images, weights=weights, batch_size=batch_size).error(), whole)
    assert seen == calls


def test_measuring_needs_no_gradient_and_puts_the_mode_back(tiny_denoiser, images):
    tiny_denoiser.module.train()
    assert not probe(tiny_denoiser, images).error().requires_grad
    assert tiny_denoiser.module.training


def test_a_module_in_bfloat16_is_measured_in_float32(scheduler, images):
    denoiser = Denoiser(TinyDenoiser().bfloat16(), scheduler, (1, 8, 8))
    error = probe(denoiser, images).error()
    assert error.dtype == torch.float32
    assert error.isfinite().all()


def test_the_replay_distance_is_zero_for_the_old_model_and_grows(tiny_denoiser):
    bank = build_bank(tiny_denoiser, 6, sampler_steps=5, states=2)
    weights = tiny_denoiser.schedule.timestep_weights("simple")
    p = ReplayProbe(tiny_denoiser, bank, size=256, seed=0, weights=weights)
    assert p.error().shape == (6,)  # no trajectory twice
    assert float(p.error().max()) < 1e-9
    with torch.no_grad():
        tiny_denoiser.module.decode.bias.add_(0.5)
    torch.testing.assert_close(p.error(), torch.full((6,), 0.25), rtol=1e-3, atol=1e-4)


class Silent(nn.Module):
    """Predicts zero, so that its error is that of the target itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return 0 * x_t * self.weight


@pytest.mark.parametrize("weighting", ["simple", "elbo"])
def test_the_error_curve_follows_the_error_over_the_timesteps(weighting):
    scheduler = DDPMScheduler(num_train_timesteps=1000, prediction_type="v_prediction")
    denoiser = Denoiser(Silent(), scheduler, (1, 8, 8))
    images = torch.full((5, 1, 8, 8), 0.3)
    weights = denoiser.schedule.timestep_weights(weighting)
    curve = error_curve(denoiser, images, size=1024, seed=0, weights=weights)
    assert curve.shape == (1000,)
    assert curve.dtype == torch.float32
    # v = signal eps - noise x_0 has the mean square signal^2 + noise^2 x_0^2.
    expected = weights * (denoiser.schedule.signal**2 + denoiser.schedule.noise**2 * 0.09)
    # Away from the first timesteps, where C_t falls faster than the curve can follow.
    ratio = (curve.double() / expected)[50:]
    assert float((ratio - 1).abs().max()) < 0.15
