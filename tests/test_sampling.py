"""Image i is a function of seed, i and sampler, and the loop is diffusers' own."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny import build_pipeline, build_tiny
from torch import nn

from vdu_fast.errors import InputError
from vdu_fast.pipelines import Denoiser, denoiser_of
from vdu_fast.rng import Stream, standard_normal
from vdu_fast.sampling import sample_images, sampler_for
from vdu_fast.schedule import NoiseSchedule

SHAPE = (1, 8, 8)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_images_are_those_of_the_diffusers_ddim_pipeline(prediction_type, monkeypatch):
    pipeline = build_pipeline(prediction_type)
    noise = standard_normal((3, *SHAPE), 7, stream=Stream.SAMPLER)
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: noise.clone())
    ddim = DDIMPipeline(copy.deepcopy(pipeline.unet), DDIMScheduler.from_config(pipeline.scheduler.config))
    ddim.set_progress_bar_config(disable=True)
    expected = ddim(batch_size=3, num_inference_steps=10, eta=0.0, output_type="np").images
    expected = torch.from_numpy(expected).permute(0, 3, 1, 2) * 2 - 1  # the pipeline maps [-1, 1] to [0, 1]
    got = sample_images(denoiser_of(pipeline), 3, steps=10, seed=7)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert float(got.std()) > 0.01


def test_flow_matching_images_are_those_of_a_plain_euler_loop():
    module = build_tiny()
    denoiser = Denoiser(module, FlowMatchEulerDiscreteScheduler(50), SHAPE)
    # 50 steps of 50 put every network call on an integer timestep, so that nothing is rounded.
    got = sample_images(denoiser, 2, steps=50, seed=3)
    x = standard_normal((2, *SHAPE), 3, stream=Stream.SAMPLER).double()
    module = copy.deepcopy(module).double()
    with torch.no_grad():
        for t in range(50, 0, -1):
            x = x - module(x, torch.full((2,), t)) / 50
    torch.testing.assert_close(got.double(), x.clamp(-1, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 250])
def test_an_image_does_not_depend_on_the_batch_size(unet_denoiser, batch_size):
    whole = sample_images(unet_denoiser, 5, steps=4, seed=2)
    torch.testing.assert_close(
        sample_images(unet_denoiser, 5, steps=4, seed=2, batch_size=batch_size), whole, rtol=1e-4, atol=1e-5
    )


def test_an_image_does_not_depend_on_count_or_first(unet_denoiser):
    whole = sample_images(unet_denoiser, 6, steps=4, seed=2)
    torch.testing.assert_close(sample_images(unet_denoiser, 3, steps=4, seed=2), whole[:3], rtol=1e-4, atol=1e-5)
    later = sample_images(unet_denoiser, 3, steps=4, seed=2, first=2, batch_size=2)
    torch.testing.assert_close(later, whole[2:5], rtol=1e-4, atol=1e-5)
    assert float((whole[0] - whole[1]).abs().max()) > 0.01


def test_seeds_give_other_images(tiny_denoiser):
    assert not torch.equal(
        sample_images(tiny_denoiser, 2, steps=4, seed=0), sample_images(tiny_denoiser, 2, steps=4, seed=1)
    )


def test_images_are_float32_in_minus_one_to_one_on_the_cpu(tiny_denoiser):
    tiny_denoiser.module.bfloat16()
    images = sample_images(tiny_denoiser, 4, steps=3)
    assert images.dtype == torch.float32
    assert images.shape == (4, *SHAPE)
    assert images.abs().max() <= 1


def test_no_images_are_an_empty_tensor(tiny_denoiser):
    assert sample_images(tiny_denoiser, 0).shape == (0, *SHAPE)


def test_the_observer_sees_every_step_of_every_batch_and_progress_the_counts(tiny_denoiser):
    calls, progress = [], []

    def observe(rows, timesteps, x_t, prediction):
        assert x_t.shape == prediction.shape == (rows.stop - rows.start, *SHAPE)
        assert timesteps.shape == (len(x_t),)
        calls.append((rows.start, rows.stop, int(timesteps[0])))

    sample_images(tiny_denoiser, 5, steps=5, batch_size=3, observer=observe, progress=progress.append)
    assert progress == [3, 2]
    expected = [(a, b, t) for a, b in ((0, 3), (3, 5)) for t in (40, 30, 20, 10, 0)]
    assert calls == expected


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x_t, timesteps):
        return self.dropout(x_t) * self.weight


def test_sampling_switches_dropout_off_and_back_on(scheduler):
    denoiser = Denoiser(Dropping().train(), scheduler, SHAPE)
    assert torch.equal(sample_images(denoiser, 2, steps=3), sample_images(denoiser, 2, steps=3))
    assert denoiser.module.training
    assert denoiser.module.weight.grad is None


@pytest.mark.parametrize("steps", [0, -1, 51])
def test_more_steps_than_the_model_has_are_refused(tiny_denoiser, steps):
    with pytest.raises(
        InputError, match=rf"between 1 and the model's 50 timesteps, got {steps}; change --sampler_steps"
    ):
        sample_images(tiny_denoiser, 1, steps=steps)


def test_a_schedule_of_alphas_cumprod_samples_as_its_scheduler_does():
    scheduler = DDPMScheduler(50, prediction_type="v_prediction")
    schedule = NoiseSchedule.from_scheduler(scheduler)
    images = [sample_images(Denoiser(build_tiny(), s, SHAPE), 2, steps=5) for s in (scheduler, schedule)]
    torch.testing.assert_close(images[0], images[1])


def test_a_schedule_that_no_sampler_follows_from_is_refused():
    schedule = NoiseSchedule(torch.ones(10), torch.linspace(0.1, 5, 10), "epsilon")
    with pytest.raises(InputError, match=r"sampling needs a diffusers scheduler or NoiseSchedule\.from_alphas_cumprod"):
        sampler_for(Denoiser(build_tiny(), schedule, SHAPE), 5)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_settings_given_to_a_scheduler_by_position_are_not_lost(set_alpha_to_one):
    # diffusers' from_config takes them for defaults and would go back to 1,000 linear steps.
    betas = (0.001, 0.03, "scaled_linear")
    by_position = DDIMScheduler(50, *betas, set_alpha_to_one=set_alpha_to_one)
    by_name = DDIMScheduler(
        num_train_timesteps=50,
        beta_start=0.001,
        beta_end=0.03,
        beta_schedule="scaled_linear",
        set_alpha_to_one=set_alpha_to_one,
    )
    images = [sample_images(Denoiser(build_tiny(), s, SHAPE), 2, steps=5) for s in (by_position, by_name)]
    assert torch.equal(images[0], images[1])
    by_name.set_timesteps(5)
    x = standard_normal((2, *SHAPE), 0, stream=Stream.SAMPLER)
    module = build_tiny()
    with torch.no_grad():
        for t in by_name.timesteps:
            x = by_name.step(module(x, t.expand(2)), t, x).prev_sample
    torch.testing.assert_close(images[0], x.clamp(-1, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [0.05, 1.0, 5.0])
def test_flow_matching_stays_within_its_timesteps_whatever_the_shift(shift):
    seen = []
    denoiser = Denoiser(build_tiny(), FlowMatchEulerDiscreteScheduler(50, shift), SHAPE)
    sample_images(denoiser, 1, steps=50, observer=lambda rows, timesteps, *_: seen.append(int(timesteps)))
    assert min(seen) >= 0
    assert max(seen) == 49
    assert seen == sorted(seen, reverse=True)


def test_flow_matching_keeps_its_shift():
    scheduler = FlowMatchEulerDiscreteScheduler(50, 3.0)
    sampler = sampler_for(Denoiser(build_tiny(), scheduler, SHAPE), 5)
    scheduler.set_timesteps(5)
    assert torch.equal(sampler.sigmas, scheduler.sigmas)
    assert sampler is not scheduler
