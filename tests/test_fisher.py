"""The diagonal Fisher against a linear model, where it can be written down."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from vdu_fast.errors import InputError
from vdu_fast.fisher import fisher_posterior
from vdu_fast.pipelines import Denoiser
from vdu_fast.rng import Stream, randint, standard_normal
from vdu_fast.sampling import sample_images

SHAPE = (1, 2, 2)


class Affine(nn.Module):
    """prediction = scale * x_t + shift, elementwise: its gradients are known."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full(SHAPE, 0.3))
        self.shift = nn.Parameter(torch.linspace(-0.2, 0.2, 4).reshape(SHAPE))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x_t, timesteps):
        return self.scale * x_t + self.shift


def affine_denoiser(prediction_type: str = "epsilon") -> Denoiser:
    return Denoiser(Affine(), DDPMScheduler(20, prediction_type=prediction_type), SHAPE)


@pytest.mark.parametrize("weighting", ["simple", "elbo"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_fisher_of_an_affine_model_is_the_one_on_paper(weighting, prediction_type):
    denoiser, draws = affine_denoiser(prediction_type), 24
    posterior = fisher_posterior(
        denoiser, draws=draws, dataset_size=500, prior_precision=10.0, sampler_steps=5, weighting=weighting, seed=3
    )
    images = sample_images(denoiser, draws, steps=5, seed=3).double()
    weights = denoiser.schedule.timestep_weights(weighting)
    fisher = {"scale": torch.zeros(SHAPE).double(), "shift": torch.zeros(SHAPE).double()}
    for draw in range(draws):
        t = randint(20, 1, 3, draw, stream=Stream.FISHER)
        eps = standard_normal((1, *SHAPE), 3, draw, stream=Stream.FISHER).double()
        x0 = images[draw : draw + 1]
        x_t = denoiser.schedule.add_noise(x0, eps, t)
        error = 0.3 * x_t + denoiser.module.shift.detach() - denoiser.schedule.target(x0, eps, t)
        # d/dshift of C/2 error^2 is C error; d/dscale is C error x_t.
        fisher["shift"] += (float(weights[t]) * error[0]) ** 2 / draws
        fisher["scale"] += (float(weights[t]) * error[0] * x_t[0]) ** 2 / draws
    for name, value in fisher.items():
        torch.testing.assert_close(posterior.std[name].double(), (500 * value + 10) ** -0.5, rtol=1e-4, atol=0)
        assert torch.equal(posterior.mean[name], dict(denoiser.module.named_parameters())[name])


def test_what_the_data_do_not_see_keeps_the_priors_std():
    class Blind(Affine):
        def forward(self, x_t, timesteps):
            return 0 * self.scale * x_t + self.shift

    posterior = fisher_posterior(
        Denoiser(Blind(), DDPMScheduler(20), SHAPE), draws=4, prior_precision=25.0, sampler_steps=2
    )
    torch.testing.assert_close(posterior.std["scale"], torch.full(SHAPE, 0.2))
    assert (posterior.std["shift"] < 0.2).all()


def test_it_leaves_the_module_as_it_was_and_says_what_it_did():
    denoiser, seen = affine_denoiser(), []
    denoiser.module.train()
    posterior = fisher_posterior(denoiser, draws=6, sampler_steps=2, progress=seen.append)
    assert denoiser.module.training
    assert all(p.grad is None for p in denoiser.module.parameters())
    assert sum(seen) == 6
    assert posterior.source["kind"] == "fisher"
    assert posterior.source["draws"] == "6"
    assert set(posterior.std) == {"scale", "shift"}


def test_the_same_seed_gives_the_same_posterior():
    first, second, other = (fisher_posterior(affine_denoiser(), draws=5, sampler_steps=2, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.std["shift"], second.std["shift"])
    assert not torch.equal(first.std["shift"], other.std["shift"])


@pytest.mark.parametrize("name", ["draws", "dataset_size", "prior_precision"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_settings_that_are_not_positive_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"{name} must be a positive number"):
        fisher_posterior(affine_denoiser(), **{name: value})
