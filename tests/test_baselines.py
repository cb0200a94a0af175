"""Every baseline on models of a few thousand weights: what it sees, what it spends, and its formula by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import build_pipeline, build_tiny, random_posterior
from torch import Tensor

from vdu_fast import guidance, rng
from vdu_fast.baselines import METHOD_NAMES, erase_diff, get_method, salun, selective_amnesia, siss, training
from vdu_fast.baselines.budget import EvaluationCounter, evaluations_of_unlearn
from vdu_fast.baselines.method import MethodInputs, MethodRun, run_method
from vdu_fast.checkpoint import fingerprint
from vdu_fast.config import UnlearnConfig
from vdu_fast.errors import InputError
from vdu_fast.pipelines import Denoiser, denoiser_of
from vdu_fast.pretrain import PretrainConfig, build_unet
from vdu_fast.schedule import NoiseSchedule

LIMITED = tuple(name for name in METHOD_NAMES if name != "retrain")
SHAPE = (1, 8, 8)
OURS = UnlearnConfig(
    steps=4, batch_size=8, replay_batch_size=8, replay_samples=24, replay_sampler_steps=4, replay_states=2,
    check_every=2, check_size=8,
)  # fmt: skip
PRETRAIN = PretrainConfig(
    steps=8, anneal_steps=2, warmup_steps=2, checkpoints=4, channels=(8,), batch_size=8, device="cpu"
)
BUDGET = 700


def pictures(count: int, seed: int) -> Tensor:
    return torch.rand((count, *SHAPE), generator=torch.Generator().manual_seed(seed)) * 2 - 1


FORGET, RETAINED = pictures(12, 1), pictures(30, 2)


def settings_of(name: str):
    """Settings that make a run a second long."""
    if name == "ours":
        return OURS
    if name == "retrain":
        return get_method(name).settings()
    tiny = {"batch_size": 8, "learning_rate": 1e-3, "steps": 6}
    extra = {
        "selective_amnesia": {"replay_samples": 24, "sampler_steps": 4, "fisher_images": 4, "fisher_timesteps": 3},
        "salun": {"mask_batches": 2},
    }
    return get_method(name).settings(**tiny, **extra.get(name, {}))


def run(name: str, denoiser: Denoiser | None = None, *, seed: int = 0, **changes):
    denoiser = denoiser or denoiser_of(build_pipeline())
    options = {"budget": BUDGET, "settings": settings_of(name)} | changes
    inputs = options.pop("inputs", MethodInputs(FORGET, RETAINED, random_posterior(denoiser.module), pretraining=None))
    if name == "retrain" and inputs.pretraining is None:
        denoiser = Denoiser(build_unet(PRETRAIN, 1, 8).eval(), denoiser.scheduler, SHAPE)
        inputs = replace(inputs, pretraining=PRETRAIN)
    return run_method(get_method(name), denoiser, inputs, seed=seed, **options), denoiser


def a_run(name: str, denoiser: Denoiser, **changes) -> MethodRun:
    """What a method's function is given, for its parts alone."""
    settings = replace(settings_of(name), **changes)
    counter = EvaluationCounter(denoiser.module, None)
    return MethodRun(denoiser, MethodInputs(FORGET, RETAINED), settings, counter, 0, lambda done, total: None)


@pytest.mark.parametrize("name", METHOD_NAMES)
class TestEveryMethod:
    def test_it_changes_the_weights_as_the_seed_says(self, name):
        first, second, other = (run(name, seed=seed) for seed in (3, 3, 4))
        before = fingerprint(denoiser_of(build_pipeline()).module)
        assert fingerprint(first[1].module) == fingerprint(second[1].module) != before
        assert fingerprint(first[1].module) != fingerprint(other[1].module)
        assert all(p.isfinite().all() for p in first[1].module.parameters())
        assert not first[1].module.training

    def test_its_record_says_what_it_did_and_what_it_spent(self, name):
        done = []
        record, denoiser = run(name, progress=lambda *at: done.append(at))
        counted = record["evaluations"]
        assert record["method"] == name
        assert record["steps"] == len(done) == done[-1][0] == done[-1][1] > 0
        assert record["seconds"] > 0
        if name == "retrain":
            assert counted == 3 * 10 * PRETRAIN.batch_size
            assert record["budget"] is None
        else:
            assert 0 < counted <= record["budget"] == BUDGET
        # Nothing is left on the network that would count, or slow, later calls.
        assert not denoiser.module._forward_hooks


@pytest.mark.parametrize("name", [name for name in LIMITED if name != "ours"])
def test_it_stops_when_the_budget_is_used_up(name):
    record, _ = run(name, settings=replace(settings_of(name), steps=None))
    step = {"neg_grad": 24, "vdu": 24, "fine_tune": 24, "siss": 40, "erase_diff": 80}.get(name, 48)
    assert BUDGET - step < record["evaluations"] <= BUDGET
    with pytest.raises(InputError, match=r"budget: .* do not pay for one step.*Raise the budget"):
        run(name, budget=20 if name != "selective_amnesia" else 260)


@pytest.mark.parametrize("name", ["fine_tune", "vdu"])
def test_without_a_budget_something_must_say_when_to_stop(name):
    assert run(name, budget=None)[0]["steps"] == 6
    with pytest.raises(InputError, match="steps: without a budget something must say when to stop"):
        run(name, budget=None, settings=replace(settings_of(name), steps=None))


def test_settings_that_make_no_sense():
    with pytest.raises(InputError, match="batch_size and steps must be at least 1, got 64 and 0"):
        get_method("siss").settings(batch_size=64, steps=0)
    with pytest.raises(InputError, match="learning_rate must be 0 or a positive number, got nan"):
        get_method("siss").settings(learning_rate=math.nan)


@pytest.mark.parametrize(
    ("images", "changes"),
    [
        (12, {}),
        (1100, {}),
        (12, {"forget_share": 0.6}),
        (12, {"saturation": "npo"}),
        (12, {"replay_guidance": 1.0}),
    ],
)
def test_ours_needs_its_whole_budget(images, changes, monkeypatch):
    monkeypatch.setattr(guidance, "FEWEST_IMAGES", 2.0)  # the bank is small, and the schedule short of noise
    settings = replace(OURS, **changes)
    needed = evaluations_of_unlearn(settings, images)
    inputs = MethodInputs(pictures(images, 1), None, random_posterior(build_pipeline().unet))
    record, _ = run("ours", budget=needed, inputs=inputs, settings=settings)
    assert record["evaluations"] == needed
    with pytest.raises(InputError, match=f"budget: {needed - 1} network evaluations, and these settings need {needed}"):
        run("ours", budget=needed - 1, inputs=inputs, settings=settings)


def test_a_compiled_network_sees_the_forget_batch_to_the_end():
    compiled = replace(OURS, compile="default")
    assert evaluations_of_unlearn(replace(compiled, forget_share=0.5), 12) == evaluations_of_unlearn(compiled, 12)


class TestVisibility:
    @pytest.mark.parametrize("name", ["neg_grad", "vdu", "ours", "selective_amnesia"])
    def test_what_a_method_does_not_see_makes_no_difference(self, name):
        posterior = random_posterior(build_pipeline().unet)
        with_it, without = (
            run(name, inputs=MethodInputs(FORGET, retained, posterior))[1] for retained in (RETAINED, None)
        )
        assert fingerprint(with_it.module) == fingerprint(without.module)

    @pytest.mark.parametrize("name", METHOD_NAMES)
    def test_a_method_is_handed_no_more_than_it_sees(self, name, monkeypatch):
        method, handed = get_method(name), []

        def note(run: MethodRun) -> dict:
            handed.append(run.inputs)
            return {"steps": 1}

        run_method(
            replace(method, train=note), denoiser_of(build_pipeline()), MethodInputs(FORGET, RETAINED), budget=10
        )
        (inputs,) = handed
        assert (inputs.retained is not None) == ("retained" in method.sees)
        assert (inputs.forget is not None) == method.sees.startswith("forget")

    def test_data_that_is_needed_and_missing_is_named(self):
        with pytest.raises(InputError, match="retained: this method needs retained images"):
            run("siss", inputs=MethodInputs(FORGET))
        with pytest.raises(InputError, match="forget: this method needs forget images"):
            run("neg_grad", inputs=MethodInputs(FORGET[:0]))
        with pytest.raises(InputError, match=r"posterior: .*--posterior FILE"):
            run("vdu", inputs=MethodInputs(FORGET))
        with pytest.raises(InputError, match=r"retrain: .*pretrain\.json"):
            run_method(get_method("retrain"), denoiser_of(build_pipeline()), MethodInputs(None, RETAINED), budget=None)
        other = replace(PRETRAIN, channels=(16,))
        with pytest.raises(InputError, match=r"retrain: the network that pretrain\.json describes"):
            run("retrain", inputs=MethodInputs(None, RETAINED, pretraining=other))

    def test_an_unknown_method(self):
        with pytest.raises(InputError, match="there is no 'sallun'; accepted are ours, vdu"):
            get_method("sallun")


class TestCounter:
    def test_forward_counts_one_and_with_gradients_three(self):
        module = build_tiny()
        x, t = torch.zeros(5, *SHAPE), torch.zeros(5, dtype=torch.int64)
        with EvaluationCounter(module, 40) as counter:
            with torch.no_grad():
                module(x, t)
            module(x, t)
            assert counter.spent == 5 + 15
            counter.add_backward(5)
            assert counter.spent == 30
            assert counter.times(4) == 2
            assert counter.times(11) == 0
        module(x, t)
        assert counter.spent == 30
        assert EvaluationCounter(module, None).times(1) is None


def in_double(prediction_type: str = "epsilon") -> Denoiser:
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.2, 50).double(), 0)
    return Denoiser(build_tiny().double(), NoiseSchedule.from_alphas_cumprod(alphas, prediction_type), SHAPE)


class TestFormulas:
    @pytest.fixture
    def batch(self):
        denoiser = in_double()
        return denoiser, training.noised_batch(denoiser, [FORGET, RETAINED], 4, 7, 0)

    def test_a_batch_is_of_both_sets_and_mixed_as_the_schedule_says(self, batch):
        denoiser, noised = batch
        rows = rng.batch_indices(12, 4, 7, 0), rng.batch_indices(30, 4, 7, 0, stream=rng.Stream.REPLAY_BATCH)
        assert torch.equal(noised.x0, torch.cat([FORGET[rows[0]], RETAINED[rows[1]]]).double())
        abar = denoiser.schedule.alphas_cumprod[noised.timesteps][:, None, None, None]
        assert torch.allclose(noised.x_t, abar.sqrt() * noised.x0 + (1 - abar).sqrt() * noised.eps, rtol=1e-12)
        loss = training.denoising_loss(denoiser, torch.zeros_like(noised.x0), noised)
        assert float(loss) == pytest.approx(float(noised.eps.square().sum()) / noised.eps.numel())

    @pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
    def test_the_relabelled_loss_is_zero_for_the_other_origin_and_bounded_by_its_distance(self, prediction_type):
        denoiser = in_double(prediction_type)
        noised = training.noised_batch(denoiser, [FORGET], 4, 7, 0)
        other = RETAINED[:4].double()
        signal, noise = denoiser.schedule.coefficients(noised.timesteps, noised.x_t)
        eps = (noised.x_t - signal * other) / noise
        meant = denoiser.schedule.target(other, eps, noised.timesteps)
        assert float(training.relabelled_loss(denoiser, meant, noised, other)) == 0
        true = denoiser.schedule.target(noised.x0, noised.eps, noised.timesteps)
        distance = (noised.x0 - other).square().flatten(1).mean(dim=1)
        ratio = (true - meant).square().flatten(1).mean(dim=1) / distance  # r_t^2
        expected = (distance * ratio * (1 / ratio).clamp(max=1)).mean()
        loss = training.relabelled_loss(denoiser, true, noised, other)
        assert float(loss) == pytest.approx(float(expected), rel=1e-10)
        assert loss <= distance.mean() * (1 + 1e-12)

    def test_siss_weights_are_densities_over_the_mixture(self):
        denoiser = in_double()
        timesteps, x, a = torch.tensor([20, 35, 49]), RETAINED[:3].double(), FORGET[:3].double()
        signal, noise = denoiser.schedule.coefficients(timesteps, x)
        m = signal * (0.5 * x + 0.5 * a) + 0.1 * noise
        of_x, of_a = (
            torch.distributions.Normal(signal * origin, noise.expand_as(x)).log_prob(m).flatten(1).sum(dim=1).exp()
            for origin in (x, a)
        )
        keep, delete = siss.importance_weights(denoiser.schedule, m, timesteps, x, a, 0.3)
        assert torch.allclose(keep, of_x / (0.7 * of_x + 0.3 * of_a), rtol=1e-9)
        assert torch.allclose(delete, of_a / (0.7 * of_x + 0.3 * of_a), rtol=1e-9)
        assert torch.allclose(0.7 * keep + 0.3 * delete, torch.ones(3, dtype=torch.float64))

    def test_siss_far_apart_origins_do_not_overflow(self):
        denoiser = in_double()
        x, a = torch.ones(1, *SHAPE).double(), -torch.ones(1, *SHAPE).double()
        first = torch.zeros(1, dtype=torch.int64)
        keep, delete = siss.importance_weights(denoiser.schedule, x, first, x, a, 0.5)
        assert (float(keep), float(delete)) == (2.0, 0.0)

    def test_the_multiplier_of_erase_diff(self):
        retained, wrong = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
        assert erase_diff.multiplier(2.0, 0.5, retained, wrong) == pytest.approx((1.0 - 1.0) / 10)
        assert erase_diff.multiplier(4.0, 0.5, retained, wrong) == pytest.approx((2.0 - 1.0) / 10)
        assert erase_diff.multiplier(0.0, 0.5, retained, wrong) == 0
        assert erase_diff.multiplier(1.0, 1.0, retained, torch.zeros(2)) == 0

    def test_the_fisher_information_of_selective_amnesia(self):
        denoiser = in_double()
        run = a_run("selective_amnesia", denoiser, fisher_images=2)
        found = selective_amnesia.fisher_information(run, RETAINED)
        expected = torch.zeros_like(found)
        for number in range(2):
            eps = rng.standard_normal((3, *SHAPE), 0, number, stream=rng.Stream.FISHER).double()
            total = torch.zeros((), dtype=torch.float64)
            for index, t in enumerate((8, 25, 41)):  # the middles of thirds of 50 timesteps
                at = torch.tensor([t])
                x_t = denoiser.schedule.add_noise(RETAINED[number : number + 1].double(), eps[index : index + 1], at)
                total = total + (denoiser.module(x_t, at) - eps[index : index + 1]).square().sum()
            grad = torch.autograd.grad(total, list(denoiser.module.parameters()))
            expected += torch.cat([g.flatten() for g in grad]).square().float() / 2
        assert torch.allclose(found, expected, rtol=1e-5)

    @pytest.mark.parametrize("name", ["neg_grad", "neg_grad_plus", "fine_tune"])
    def test_the_gradient_of_the_first_step(self, name, monkeypatch):
        """What the optimizer is given, against autograd on the formula."""
        denoiser, seen = in_double(), []

        class Noting(torch.optim.SGD):
            def __init__(self, parameters, lr):
                super().__init__(parameters, lr=lr)

            def step(self):
                seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])

        monkeypatch.setattr(training.torch.optim, "Adam", Noting)
        monkeypatch.setattr(training, "MAX_GRADIENT_NORM", math.inf)
        settings = replace(settings_of(name), steps=1)
        run(name, denoiser, settings=settings)
        weights = {"neg_grad": [(FORGET, -1.0)], "fine_tune": [(RETAINED, 1.0)]}
        terms = weights.get(name) or [(FORGET, -1.0), (RETAINED, settings.retained_weight)]
        batch = training.noised_batch(denoiser, [images for images, _ in terms], 8, 0, 0)
        loss = 0.0
        for index, (_, weight) in enumerate(terms):
            part = batch[8 * index : 8 * index + 8]
            loss = loss + weight * (denoiser.module(part.x_t, part.timesteps) - part.eps).square().mean()
        expected = torch.autograd.grad(loss, list(denoiser.module.parameters()))
        for found, wanted in zip(seen[0], expected, strict=True):
            assert torch.allclose(found, wanted, rtol=1e-10)


class TestMask:
    def test_weights_outside_the_mask_stay_bit_for_bit(self):
        denoiser = denoiser_of(build_pipeline())
        before = [p.detach().clone() for p in denoiser.module.parameters()]
        mask = salun.saliency_mask(a_run("salun", denoiser))
        run("salun", denoiser)
        for old, new, inside in zip(before, denoiser.module.parameters(), mask, strict=True):
            assert torch.equal(old[~inside], new[~inside])
        changed = [
            (old != new)[inside] for old, new, inside in zip(before, denoiser.module.parameters(), mask, strict=True)
        ]
        assert float(torch.cat(changed).double().mean()) > 0.9

    def test_it_holds_the_weights_of_largest_summed_gradient(self):
        denoiser = in_double()
        task = a_run("salun", denoiser, mask_share=0.25)
        mask = torch.cat([m.flatten() for m in salun.saliency_mask(task)])
        total = 0.0
        for number in range(2):
            batch = training.noised_batch(denoiser, [FORGET], 8, number, 0 ^ 0x5A1)
            loss = (denoiser.module(batch.x_t, batch.timesteps) - batch.eps).square().mean()
            grad = torch.autograd.grad(loss, list(denoiser.module.parameters()))
            total = total + torch.cat([g.flatten() for g in grad])
        assert int(mask.sum()) == round(0.25 * len(mask))
        assert total.abs()[mask].min() >= total.abs()[~mask].max()


def test_erase_diff_puts_the_weights_back_after_its_inner_steps():
    """With a learning rate of zero nothing moves, however far the inner steps went."""
    denoiser = denoiser_of(build_pipeline())
    before = fingerprint(denoiser.module)
    record, _ = run("erase_diff", denoiser, settings=replace(settings_of("erase_diff"), learning_rate=0.0))
    assert fingerprint(denoiser.module) == before
    assert any(step["gap"] > 0 for step in record["losses"])


def test_a_loss_that_is_not_finite_ends_the_run_with_the_weights_before_it(monkeypatch):
    denoiser, calls = denoiser_of(build_pipeline()), []
    measure = training.denoising_loss

    def breaking(*arguments):
        calls.append(arguments)
        return measure(*arguments) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr("vdu_fast.baselines.fine_tune.denoising_loss", breaking)
    record, _ = run("fine_tune", denoiser)
    assert record["steps"] == 2
    assert record["stopped_because"] == "the loss or its gradient was not finite at step 3"
    assert all(p.isfinite().all() for p in denoiser.module.parameters())
