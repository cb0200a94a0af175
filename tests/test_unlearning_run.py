"""One run: its step against the objective written out anew, its guards, and its restart."""

from __future__ import annotations

import copy
import math
import signal

import pytest
import torch
from diffusers import DDPMScheduler
from tiny import TinyDenoiser, build_tiny, random_posterior
from torch import Tensor, nn

from vdu_fast.config import UnlearnConfig
from vdu_fast.errors import InputError
from vdu_fast.pipelines import Denoiser
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.replay import ReplayBank, build_bank
from vdu_fast.rng import Stream, batch_indices, randint, standard_normal
from vdu_fast.unlearning_run import UnlearningRun

SHAPE = (1, 8, 8)
T = 50
D = sum(p.numel() for p in build_tiny().parameters())


def denoiser_of_tiny(prediction_type: str = "epsilon", dtype: torch.dtype = torch.float32) -> Denoiser:
    return Denoiser(
        build_tiny().to(dtype), DDPMScheduler(num_train_timesteps=T, prediction_type=prediction_type), SHAPE
    )


def small(**settings) -> UnlearnConfig:
    defaults = {"batch_size": 6, "replay_weight": 0.0, "steps": 10, "check_every": 5, "check_size": 32, "save_every": 3}
    return UnlearnConfig(**(defaults | settings))


def start(
    images: Tensor, bank: ReplayBank | None = None, denoiser: Denoiser | None = None, **settings
) -> UnlearningRun:
    denoiser, config = denoiser or denoiser_of_tiny(), small(**settings)
    denoiser.execution = config.execution
    return UnlearningRun(denoiser, images, random_posterior(denoiser.module), bank, config)


def finish(run: UnlearningRun) -> UnlearningRun:
    reason = None
    while reason is None:
        run.step()
        reason = run.stop_reason()
    run.finish()
    return run


@pytest.fixture(scope="module")
def bank() -> ReplayBank:
    return build_bank(denoiser_of_tiny(), 20, sampler_steps=10, states=4)


def objective(module: nn.Module, run: UnlearningRun, z: Tensor, step: int) -> Tensor:
    """L at the mean, from the formulas of the method and not from the library's code, in float64."""
    config, schedule = run.config, run.denoiser.schedule
    old = copy.deepcopy(module).double()
    theta = run.weights.center.double() + run.weights.prior_std.double() * z
    names = [name for name, _ in module.named_parameters()]
    pieces = theta.split([p.numel() for p in module.parameters()])
    new = {n: piece.view(p.shape) for (n, p), piece in zip(module.named_parameters(), pieces, strict=True)}
    assert names == run.arena.names

    low, high = config.timestep_window or (0, T)
    rows = batch_indices(len(run.images), config.batch_size, step, config.seed)
    t = randint(high, config.batch_size, config.seed, step, low=low, stream=Stream.TIMESTEPS)
    eps = standard_normal((len(rows), *SHAPE), config.seed, step, stream=Stream.IMAGE_NOISE).double()
    x0 = run.images[rows].double()
    abar = schedule.alphas_cumprod[t][:, None, None, None]
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    target = {"epsilon": eps, "sample": x0, "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * x0}
    c = schedule.timestep_weights(config.weighting)

    def error(function, x: Tensor, t: Tensor, target: Tensor) -> Tensor:
        return c[t] * (function(x, t) - target).square().mean(dim=(1, 2, 3))

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.func.functional_call(old, new, (x, t))

    forget = error(network, x_t, t, target[schedule.prediction_type])
    if config.saturation == "hinge":
        forget = torch.minimum(forget, config.hinge_ratio * run.start_curve[t].double())
    elif config.saturation == "npo":
        reference = error(old, x_t, t, target[schedule.prediction_type]).detach()
        beta = config.npo_beta / run.start_curve[t].double()
        forget = -2 / beta * torch.log1p(torch.exp(-beta * (forget - reference)))
    elements, total = math.prod(SHAPE), config.reduction == "sum"
    a = forget.mean() * (len(run.images) * (high - low) * elements if total else 1)
    b = 0.5 * z.square().sum() / (1 if total else z.numel())
    loss = -(1 - config.gamma) * a * (step < config.forget_steps) + config.gamma * b
    if run.bank is not None:
        x, s, old_prediction = run.bank.batch(config.replay_batch_size, step, config.seed, focus=config.replay_focus)
        distance = error(network, x.double(), s, old_prediction.double()).mean()
        loss = loss + config.replay_weight * distance * (T * elements if total else 1)
    return loss


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"saturation": "none", "gamma": 0.7},
        {"saturation": "hinge", "hinge_ratio": 1.0},
        {"saturation": "npo", "npo_beta": 3.0},
        {"weighting": "elbo"},
        {"weighting": "elbo", "prediction_type": "v_prediction"},
        {"prediction_type": "sample", "timestep_window": (10, 30)},
        {"reduction": "sum", "gamma": 0.5, "learning_rate": 0.05},
        {"replay_weight": 3.0, "replay_batch_size": 8},
        {"replay_weight": 3.0, "replay_batch_size": 8, "reduction": "sum", "weighting": "elbo", "learning_rate": 0.05},
        {"replay_weight": 2.0, "replay_batch_size": 4, "saturation": "npo", "timestep_window": (0, 20)},
        {"replay_weight": 3.0, "replay_batch_size": 8, "steps": 3, "anneal": 0.0, "forget_share": 0.5},
        {"replay_weight": 2.0, "steps": 3, "anneal": 0.0, "forget_share": 0.3, "saturation": "npo"},
    ],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()) or "defaults",
)
def test_three_steps_descend_the_objective_of_the_method(images, bank, settings):
    # Long steps, so that a term that acts only away from z = 0 cannot hide.
    settings = {"learning_rate": 2000.0, "gamma": 0.3} | settings
    denoiser = denoiser_of_tiny(settings.pop("prediction_type", "epsilon"))
    module = copy.deepcopy(denoiser.module)
    run = start(images, bank if "replay_weight" in settings else None, denoiser, optimizer="natural", **settings)
    z = torch.zeros(D, dtype=torch.float64)
    for step in range(3):
        variable = z.clone().requires_grad_()
        loss = objective(module, run, variable, step)
        gradient = torch.autograd.grad(loss, variable)[0]
        record = run.step()
        assert record["loss"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
        assert record["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-3)
        z = z - run.config.learning_rate * gradient
        torch.testing.assert_close(run.weights.z.double(), z, rtol=2e-3, atol=2e-3 * float(z.abs().max()))
    assert float(z.abs().max()) > 0.02


def test_a_run_that_cannot_begin_gives_the_module_back(images):
    denoiser = denoiser_of_tiny()
    module, posterior = denoiser.module.train(), random_posterior(denoiser.module)
    module.time.bias.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in module.named_parameters()}
    with pytest.raises(RuntimeError):
        UnlearningRun(denoiser, images, posterior, None, small(), retained_images=torch.zeros(4, 1, 3, 3))
    assert module.training
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
        assert parameter.untyped_storage().nbytes() == parameter.nbytes  # no view of a flat buffer


@pytest.mark.parametrize("optimizer", ["natural", "natural_sign", "natural_adam", "adam"])
@pytest.mark.parametrize("family", ["mean_only", "mean_field"])
def test_every_optimizer_and_family_raises_the_forget_loss(images, optimizer, family):
    rate = {"natural": 400.0, "natural_sign": 0.3, "natural_adam": 0.3, "adam": 3e-3}[optimizer]
    run = finish(start(images, optimizer=optimizer, learning_rate=rate, family=family, momentum=0.5))
    assert run.step_number == 10
    assert run.history[-1]["forget_ratio"] > 1.05
    assert [record["step"] for record in run.history] == list(range(1, 11))
    assert [record["step"] for record in run.history if "forget_ratio" in record] == [5, 10]


def test_learned_std_moves_and_samples_are_averaged(images):
    run = start(images, family="mean_field", learn_std=True, samples_per_step=3)
    before = run.weights.log_std.clone()
    run.step()
    assert float((run.weights.log_std - before).abs().min()) > 0
    assert run.history[0]["penalty"] == 0


def test_samples_of_one_step_use_different_noise_and_batches(images):
    seen = []
    run = start(images, family="mean_field", samples_per_step=2, accumulate=3)
    batch = run._forget_batch
    run._forget_batch = lambda draw: seen.append((draw, run._in_network)) or batch(draw)
    run.step()
    run.step()
    assert seen == [(draw, draw) for draw in range(12)]


def test_accumulated_batches_are_averaged(images):
    one = start(images, optimizer="natural", learning_rate=5.0, batch_size=12)
    three = start(images, optimizer="natural", learning_rate=5.0, batch_size=4, accumulate=3)
    # Timesteps and noise differ, so only the size of the step is comparable: a sum would be three times as long.
    ratio = three.step()["gradient_norm"] / one.step()["gradient_norm"]
    assert 0.5 < ratio < 2


def test_hinge_lets_go_of_everything_beyond_its_limit(images):
    run = start(images, saturation="hinge", hinge_ratio=1e-6)
    run.step()
    assert not run.weights.z.any()


def test_the_trust_region_switches_the_forget_term_off_while_the_penalty_is_above_it(images):
    run = start(images, optimizer="natural_sign", learning_rate=0.5, trust_region=0.1, gamma=0.0)
    first = run.step()
    assert first["penalty"] == 0
    assert first["gradient_norm"] > 0
    second = run.step()
    assert second["penalty"] == pytest.approx(0.125, rel=1e-3)
    assert second["gradient_norm"] == 0
    assert second["loss"] == 0
    wider = start(images, optimizer="natural_sign", learning_rate=0.5, trust_region=0.13, gamma=0.0)
    wider.step()
    assert wider.step()["gradient_norm"] > 0


def test_the_trust_region_leaves_the_bank_alone(images, bank):
    run = start(images, bank, replay_batch_size=8, optimizer="natural_sign", learning_rate=0.5, trust_region=0.1)
    assert {"forget_loss", "replay_loss"} <= run.step().keys()
    beyond = run.step()
    assert "replay_loss" in beyond
    assert "forget_loss" not in beyond


def test_after_its_share_of_the_steps_the_forget_term_costs_nothing(images, bank):
    run = start(images, bank, replay_weight=2.0, replay_batch_size=8, batch_size=4, steps=4, forget_share=0.5)
    sizes, predict = [], run.denoiser.predict
    run.denoiser.predict = lambda x_t, timesteps, **how: sizes.append(len(x_t)) or predict(x_t, timesteps, **how)
    records = [run._step() for _ in range(4)]
    run.release()
    assert [size for size in sizes if size in (8, 12)] == [12, 12, 8, 8]
    assert run.images_seen == 40
    assert ["forget_loss" in record for record in records] == [True, True, False, False]
    without_bank = start(images, steps=4, forget_share=0.5, replay_weight=0.0)
    assert all("forget_loss" in without_bank._step() for _ in range(4))


def test_a_run_stops_when_the_forget_loss_reaches_its_target(images):
    run = start(images, learning_rate=0.3, target_ratio=1.05, check_every=1, steps=100)
    finish(run)
    ratios = [record["forget_ratio"] for record in run.history]
    assert 1 < run.step_number < 100
    assert all(ratio < 1.05 for ratio in ratios[:-1])
    assert ratios[-1] >= 1.05
    assert run.stop_reason() == f"forget loss reached {ratios[-1]:.2f} x its start (target_ratio 1.05)"


def test_a_run_without_target_does_all_steps(images):
    run = finish(start(images, steps=3))
    assert run.step_number == 3
    assert run.stop_reason() == "all 3 steps done"


def test_annealing_lowers_the_rate_over_the_last_part_of_the_steps(images, bank):
    runs = [
        start(images, bank, optimizer="natural_sign", gamma=0.0, steps=4, anneal=anneal, learning_rate=0.1)
        for anneal in (0.0, 0.5, 1.0)
    ]
    moved = []
    for run in runs:
        lengths = []
        for _ in range(4):
            before = run.weights.z.clone()
            run.step()
            lengths.append(float((run.weights.z - before).abs().max()))
        moved.append(lengths)
        run.release()
    for lengths, factors in zip(moved, ([1, 1, 1, 1], [1, 1, 1, 0.5], [1, 0.75, 0.5, 0.25]), strict=True):
        assert lengths == pytest.approx([0.1 * factor for factor in factors], rel=1e-4)


def test_rollback_ends_with_the_checked_state_of_the_best_objective(images, bank):
    # A rate at which the run overshoots: the best state is neither the last nor the first.
    overshooting = {"learning_rate": 1.0, "anneal": 0.0, "hinge_ratio": 4.0, "steps": 12}
    run = start(images, bank, rollback=True, check_every=1, replay_weight=20.0, replay_batch_size=8, **overshooting)
    states = {}
    while run.stop_reason() is None if run.history else True:
        run.step()
        states[run.step_number] = run.weights.mean.clone()
    step = run.finish()
    objectives = {int(record["step"]): record["objective"] for record in run.history}
    assert step == min(objectives, key=objectives.get)
    assert step < 12
    got = torch.cat([p.detach().flatten() for p in run.denoiser.module.parameters()])
    assert torch.equal(got, states[step])


def test_without_rollback_the_last_state_is_kept(images):
    run = start(images, learning_rate=0.3)
    for _ in range(10):
        run.step()
    expected = run.weights.mean.clone()
    assert run.finish() == 10
    assert torch.equal(torch.cat([p.detach().flatten() for p in run.denoiser.module.parameters()]), expected)


def test_gradients_are_clipped_to_their_norm(images):
    free = start(images, optimizer="natural", learning_rate=1.0)
    norm = free.step()["gradient_norm"]
    clipped = start(images, optimizer="natural", learning_rate=1.0, max_gradient_norm=norm / 4)
    assert clipped.step()["gradient_norm"] == pytest.approx(norm)  # the record shows it before clipping
    torch.testing.assert_close(clipped.weights.z, free.weights.z / 4)
    loose = start(images, optimizer="natural", learning_rate=1.0, max_gradient_norm=norm * 4)
    loose.step()
    assert torch.equal(loose.weights.z, free.weights.z)


def test_only_the_trainable_subset_changes(images):
    denoiser = denoiser_of_tiny()
    before = copy.deepcopy(denoiser.module.state_dict())
    finish(start(images, denoiser=denoiser, trainable=["time.*", "decode.bias"], learning_rate=0.3))
    changed = {n for n, t in denoiser.module.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"time.weight", "time.bias", "decode.bias"}
    assert all(p.requires_grad and p.grad is None for p in denoiser.module.parameters())


def test_a_window_concentrates_the_forget_term(images):
    run = start(images, timestep_window=(10, 20))
    _, _, timesteps = run._forget_batch(0)
    seen = torch.cat([run._forget_batch(draw)[2] for draw in range(100)])
    assert len(timesteps) == 6
    assert set(seen.tolist()) == set(range(10, 20))
    assert int(run.forget_probe.timesteps.min()) >= 10
    assert int(run.forget_probe.timesteps.max()) < 20


def test_retained_images_are_measured_and_change_nothing(images):
    plain = finish(start(images, learning_rate=0.3))
    denoiser = denoiser_of_tiny()
    run = UnlearningRun(
        denoiser,
        images,
        random_posterior(denoiser.module),
        None,
        small(learning_rate=0.3),
        retained_images=images.flip(0) * 0.5,
    )
    finish(run)
    assert run.history[-1]["retained_ratio"] > 0
    assert "retained_ratio" not in plain.history[-1]
    assert torch.equal(run.weights.z, plain.weights.z)


@pytest.mark.parametrize("power", [0.0001, 1.0, 2.0])
def test_sharpening_raises_sigma_to_a_power_and_keeps_its_unit(images, power):
    run = start(images, sharpen=power)
    std = torch.cat([t.flatten() for t in random_posterior(build_tiny()).std.values()])
    rms = std.square().mean().sqrt()
    torch.testing.assert_close(run.weights.prior_std, std**power / rms ** (power - 1))


def test_the_centre_may_be_the_posteriors_mean(images):
    denoiser = denoiser_of_tiny()
    posterior = random_posterior(denoiser.module)
    posterior.mean = {name: t + 0.1 for name, t in posterior.mean.items()}
    run = UnlearningRun(denoiser, images, posterior, None, small(center="posterior"))
    torch.testing.assert_close(run.weights.center, torch.cat([t.flatten() for t in posterior.mean.values()]))
    # The network itself is put there, so that the forget loss starts from the centre.
    assert torch.equal(run.arena.theta, run.weights.center)
    without = GaussianPosterior(posterior.std)
    with pytest.raises(InputError, match="center 'posterior' needs a posterior with a mean"):
        UnlearningRun(denoiser_of_tiny(), images, without, None, small(center="posterior"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_modules_of_other_dtypes_keep_their_dtype_and_at_least_float32_state(images, dtype):
    denoiser = denoiser_of_tiny(dtype=dtype)
    run = finish(start(images, denoiser=denoiser, learning_rate=0.3))
    assert run.weights.z.dtype == torch.promote_types(dtype, torch.float32)
    assert all(p.dtype == dtype for p in denoiser.module.parameters())
    assert run.history[-1]["forget_ratio"] > 1


@pytest.mark.parametrize("saturation", ["hinge", "npo"])
def test_bfloat16_autocast_stays_close_to_float32(images, saturation):
    exact, short = (
        start(images, saturation=saturation, optimizer="natural", learning_rate=1.0, precision=p)
        for p in ("float32", "bfloat16")
    )
    exact.step()
    short.step()
    cosine = torch.nn.functional.cosine_similarity(exact.weights.z, short.weights.z, dim=0)
    assert not torch.equal(exact.weights.z, short.weights.z)
    assert float(cosine) > 0.99


def test_under_npo_the_reference_is_the_old_network_in_the_same_precision(images):
    run = start(images, saturation="npo", precision="bfloat16", learning_rate=0.3)
    # Before the first step new and old network are one, so each sample's pull is exactly that of softplus at 0.
    record = run.step()
    before = run.start_curve[run._forget_batch(0)[2]].double() / run.config.npo_beta
    assert record["loss"] == pytest.approx((1 - run.config.gamma) * 2 * math.log(2) * float(before.mean()), rel=1e-6)


class Dropping(TinyDenoiser):
    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x_t, 0.5, self.training), timesteps)


def test_dropout_is_off_while_unlearning_and_the_mode_comes_back(images):
    results = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            module = Dropping(timesteps=T).train()
        denoiser = Denoiser(module, DDPMScheduler(num_train_timesteps=T), SHAPE)
        results.append(finish(start(images, denoiser=denoiser)).weights.z)
        assert module.training
    assert torch.equal(*results)


class Overflowing(TinyDenoiser):
    """Gives NaN where its output bias has moved far: what an unbounded ascent ends in."""

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        out = super().forward(x_t, timesteps)
        far = (self.decode.bias.detach() - self.begin).abs().max() > 0.05 if hasattr(self, "begin") else False
        return out * math.nan if far else out


def overflowing() -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = Overflowing(timesteps=T)
    module.begin = module.decode.bias.detach().clone()
    return Denoiser(module, DDPMScheduler(num_train_timesteps=T), SHAPE)


@pytest.mark.parametrize(("check_every", "kept"), [(1, "[1-9][0-9]*"), (100, "0")])
def test_a_loss_that_is_not_finite_keeps_the_last_weights_that_were_measured(images, check_every, kept):
    denoiser = overflowing()
    run = start(
        images, denoiser=denoiser, optimizer="natural_sign", learning_rate=1.0, check_every=check_every, steps=50
    )
    with pytest.raises(InputError, match=rf"became nan at step \d+; the weights of step {kept}, the last that were"):
        finish(run)
    _, x_t, timesteps = run._forget_batch(0)
    with torch.no_grad():
        assert denoiser.module(x_t, timesteps).isfinite().all()
    assert bool(run.weights.z.any()) == (check_every == 1)  # they are the last ones, not the first
    assert torch.equal(run.arena.theta, run.weights.mean)


def test_a_run_whose_last_step_ruins_the_model_is_refused_too(images):
    # Nothing is evaluated after the last step but the fixed batch.
    run = start(images, denoiser=overflowing(), optimizer="natural_sign", learning_rate=50.0, steps=1)
    with pytest.raises(InputError, match="forget_ratio on the fixed batch became"):
        run.step()
    assert not run.weights.z.any()


def test_a_run_can_be_restored_bit_for_bit(images, bank):
    settings = {
        "family": "mean_field",
        "learn_std": True,
        "rollback": True,
        "check_every": 2,
        "replay_weight": 2.0,
        "replay_batch_size": 5,
        "momentum": 0.5,
    }
    whole = finish(start(images, bank, **settings))
    first = start(images, bank, **settings)
    for _ in range(5):
        first.step()
    state = {name: t.clone() for name, t in first.state_dict().items()}
    second = start(images, bank, **settings)
    second.load_state_dict(state)
    assert second.best[:2] == first.best[:2]
    assert torch.equal(second.best[2], first.best[2])
    finish(second)
    assert second.history == whole.history
    assert second.best[:2] == whole.best[:2]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


def test_ctrl_c_in_the_middle_of_a_step_comes_after_it(images, monkeypatch):
    # Half a step in the saved state would make the resumed run another one.
    whole, run = start(images, check_every=1), start(images, check_every=1)
    whole.step()
    check = run._check

    def interrupted_check() -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        return check()

    monkeypatch.setattr(run, "_check", interrupted_check)
    with pytest.raises(KeyboardInterrupt):
        run.step()
    assert run.history == whole.history
    assert torch.equal(run.weights.z, whole.weights.z)


@pytest.mark.parametrize(
    ("settings", "spoil", "says"),
    [
        ({"timestep_window": (10, 51)}, None, r"timestep_window \(10, 51\) goes beyond the model's 50 timesteps"),
        ({"trainable": ["nothing.*"]}, None, r"no parameter name matches \['nothing\.\*'\]"),
        ({}, "time.bias", r"absent from it \(first: time\.bias\)"),
    ],
)
def test_unusable_settings_are_refused_and_leave_the_module_alone(images, settings, spoil, says):
    denoiser = denoiser_of_tiny()
    denoiser.module.train()
    posterior = random_posterior(denoiser.module)
    if spoil:
        del posterior.std[spoil]
    before = copy.deepcopy(denoiser.module.state_dict())
    with pytest.raises(InputError, match=says):
        UnlearningRun(denoiser, images, posterior, None, small(**settings))
    assert denoiser.module.training
    assert all(torch.equal(t, before[n]) for n, t in denoiser.module.state_dict().items())
    storages = {p.untyped_storage().data_ptr() for p in denoiser.module.parameters()}
    assert len(storages) == 6
    assert all(p.requires_grad and p.grad is None for p in denoiser.module.parameters())
