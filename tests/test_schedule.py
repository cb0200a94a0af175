"""The forward process agrees with diffusers' own schedulers, and C_t with the variational bound."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from vdu_fast.errors import InputError
from vdu_fast.schedule import NoiseSchedule

TIMESTEPS = torch.tensor([0, 1, 9, 500, 998, 999])


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn((len(TIMESTEPS), 2, 3, 3), generator=generator) for _ in range(2))


def test_elbo_weights_are_those_of_the_linear_schedule_of_ho_et_al():
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02))
    weights = schedule.timestep_weights("elbo")
    assert weights.dtype == torch.float64
    for t, expected in ((1, 0.50), (10, 0.074), (100, 0.0101), (1000, 0.0102)):
        assert float(weights[t - 1]) == pytest.approx(expected, rel=0.01)
    assert float(weights.sum()) == pytest.approx(9.86, abs=0.005)


def test_elbo_weights_are_the_formula_from_the_betas():
    scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    beta, alpha = scheduler.betas.double(), 1 - scheduler.betas.double()
    expected = (1 - alpha) ** 2 / (2 * beta * alpha * (1 - alpha.cumprod(0)))
    # float32 alphas_cumprod, of which the weights are differences, are all that a scheduler holds.
    torch.testing.assert_close(
        NoiseSchedule.from_scheduler(scheduler).timestep_weights("elbo"), expected, rtol=2e-2, atol=1e-4
    )


def test_simple_weights_are_one():
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(10, prediction_type="v_prediction"))
    assert torch.equal(schedule.timestep_weights("simple"), torch.ones(10, dtype=torch.float64))


@pytest.mark.parametrize("weighting", ["simple", "elbo"])
def test_there_is_one_weight_per_timestep(weighting):
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(37))
    assert len(schedule) == 37
    assert schedule.timestep_weights(weighting).shape == (37,)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_add_noise_is_the_schedulers(scheduler_class):
    scheduler = scheduler_class(num_train_timesteps=1000)
    x0, eps = batch()
    got = NoiseSchedule.from_scheduler(scheduler).add_noise(x0, eps, TIMESTEPS)
    if scheduler_class is DPMSolverMultistepScheduler:
        scheduler = DDPMScheduler(1000)  # the solver's own add_noise counts in its sampling steps
    torch.testing.assert_close(got, scheduler.add_noise(x0, eps, TIMESTEPS))


def test_the_target_of_every_prediction_type_is_the_schedulers():
    x0, eps = batch()
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        scheduler = DDPMScheduler(1000, prediction_type=prediction_type)
        target = NoiseSchedule.from_scheduler(scheduler).target(x0, eps, TIMESTEPS)
        expected = {"epsilon": eps, "sample": x0, "v_prediction": scheduler.get_velocity(x0, eps, TIMESTEPS)}
        torch.testing.assert_close(target, expected[prediction_type])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_prediction_lets_the_diffusers_sampler_find_x0(prediction_type):
    # Ties target, add_noise and the sampler together: a wrong sign or swapped coefficients cannot pass.
    scheduler = DDIMScheduler(1000, prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    x0, eps = batch()
    for i, t in enumerate(TIMESTEPS[:-1]):
        one = slice(i, i + 1)
        x_t = schedule.add_noise(x0[one], eps[one], t[None])
        found = scheduler.step(schedule.target(x0[one], eps[one], t[None]), t, x_t).pred_original_sample
        torch.testing.assert_close(found, x0[one], rtol=1e-3, atol=5e-3)


def test_flow_matching_noise_and_timesteps_are_the_schedulers():
    scheduler = FlowMatchEulerDiscreteScheduler(1000)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    x0, eps = batch()
    x_t = schedule.add_noise(x0, eps, TIMESTEPS)
    torch.testing.assert_close(x_t, scheduler.scale_noise(x0, schedule.model_timesteps(TIMESTEPS).float(), eps))
    assert schedule.prediction_type == "velocity"
    torch.testing.assert_close(schedule.target(x0, eps, TIMESTEPS), eps - x0)


def test_one_euler_step_of_the_true_velocity_reaches_x0():
    scheduler = FlowMatchEulerDiscreteScheduler(1000)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    scheduler.set_timesteps(1)
    x0, eps = batch()
    x_t = schedule.add_noise(x0, eps, torch.full((len(x0),), 999))
    found = scheduler.step(schedule.target(x0, eps, TIMESTEPS), scheduler.timesteps[0], x_t).prev_sample
    torch.testing.assert_close(found, x0, rtol=1e-4, atol=1e-5)


def test_only_flow_matching_shifts_the_timesteps_of_the_network():
    flow = NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(1000))
    ddpm = NoiseSchedule.from_scheduler(DDPMScheduler(1000))
    assert torch.equal(flow.model_timesteps(TIMESTEPS), TIMESTEPS + 1)
    assert torch.equal(ddpm.model_timesteps(TIMESTEPS), TIMESTEPS)


def test_elbo_gives_one_function_the_same_error_in_every_prediction_type():
    """The error of a network in eps, rewritten as an error in x_0 or v, keeps its weighted value."""
    abar = DDPMScheduler(1000).alphas_cumprod
    schedules = {p: NoiseSchedule.from_alphas_cumprod(abar, p) for p in ("epsilon", "sample", "v_prediction")}
    x0, eps = (tensor.double() for tensor in batch(1))
    wrong_eps = eps + 0.1 * batch(2)[0].double()
    signal, noise = schedules["epsilon"].coefficients(TIMESTEPS, x0)
    x_t = schedules["epsilon"].add_noise(x0, eps, TIMESTEPS)
    # x_t stays what it was; what x_0 must then be follows from x_t = signal x_0 + noise eps.
    wrong_x0 = (x_t - noise * wrong_eps) / signal
    weighted = {}
    for name, schedule in schedules.items():
        error = schedule.target(wrong_x0, wrong_eps, TIMESTEPS) - schedule.target(x0, eps, TIMESTEPS)
        weighted[name] = schedule.timestep_weights("elbo")[TIMESTEPS] * error.square().flatten(1).sum(1)
    torch.testing.assert_close(weighted["sample"], weighted["epsilon"], rtol=1e-9, atol=0)
    torch.testing.assert_close(weighted["v_prediction"], weighted["epsilon"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_noising_keeps_the_dtype_of_the_images(dtype):
    x0, eps = (tensor.to(dtype) for tensor in batch())
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler(1000, prediction_type="v_prediction"))
    assert schedule.add_noise(x0, eps, TIMESTEPS).dtype == dtype
    assert schedule.target(x0, eps, TIMESTEPS).dtype == dtype


def test_an_unknown_scheduler_is_refused_with_what_is_supported():
    with pytest.raises(InputError, match=r"EDMEulerScheduler is not supported.*alphas_cumprod.*FlowMatchEuler"):
        NoiseSchedule.from_scheduler(EDMEulerScheduler())


def test_an_unknown_prediction_type_is_refused_with_those_accepted():
    with pytest.raises(InputError, match=r"'score' is unknown; accepted: epsilon, v_prediction, sample, velocity"):
        NoiseSchedule.from_alphas_cumprod(torch.tensor([0.9]), "score")


def test_velocity_does_not_go_with_alphas_cumprod():
    # It would train on a DDPM's states and sample with the Euler steps of flow matching.
    with pytest.raises(InputError, match="'velocity' is flow matching"):
        NoiseSchedule.from_alphas_cumprod(torch.tensor([0.9]), "velocity")


def test_elbo_is_refused_for_flow_matching():
    with pytest.raises(InputError, match=r"not defined for flow matching; use weighting 'simple'"):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(10)).timestep_weights("elbo")


def test_an_unknown_weighting_is_refused():
    with pytest.raises(InputError, match=r"'min_snr' is not known; accepted: simple, elbo"):
        NoiseSchedule.from_scheduler(DDPMScheduler(10)).timestep_weights("min_snr")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_elbo_is_refused_where_the_last_step_has_no_signal(prediction_type):
    scheduler = DDIMScheduler(10, prediction_type=prediction_type, rescale_betas_zero_snr=True)
    with pytest.raises(InputError, match=r"infinite at timestep 9.*use weighting 'simple'"):
        NoiseSchedule.from_scheduler(scheduler).timestep_weights("elbo")
