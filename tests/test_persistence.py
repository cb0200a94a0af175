"""Does it stay forgotten: on models that never forgot, that never knew, and on errors that are known."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from test_evaluation import CONFIG as EVALUATION
from test_evaluation import FORGET, HELDOUT, SHAPE, TRAIN, draws, of_classes
from tiny import build_pipeline, build_tiny
from torch import Tensor

from vdu_fast.checkpoint import fingerprint
from vdu_fast.classifier import ImageClassifier, train_classifier
from vdu_fast.errors import InputError
from vdu_fast.evaluation import fixed_subset
from vdu_fast.inversion import invert_images
from vdu_fast.persistence import PersistenceConfig, half_life, measure_persistence, relearn
from vdu_fast.persistence_report import persistence_rows
from vdu_fast.pipelines import Denoiser, denoiser_of
from vdu_fast.prediction_errors import auc_spread, membership_auc, noise_prediction_errors
from vdu_fast.rng import Stream, standard_normal
from vdu_fast.sampling import decode_noise, sample_images

CONFIG = replace(EVALUATION, samples=40)
QUICK = PersistenceConfig(
    relearn_steps=(0, 2, 4), relearn_samples=40, relearn_images=4, relearn_batch_size=8, inverted_images=12,
    membership_images=20, membership_timesteps=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def classifier() -> ImageClassifier:
    return train_classifier(TRAIN, seed=5, max_steps=25)


@pytest.fixture(scope="module")
def measure(classifier):
    def call(before: Denoiser, after: Denoiser, **changes):
        how = {"train": TRAIN, "heldout": HELDOUT, "forget": FORGET, "config": CONFIG, "persistence": QUICK}
        return measure_persistence(before, after, classifier=classifier, **(how | changes))

    return call


def original() -> Denoiser:
    return draws(of_classes(0, 1, 2, 3))


@pytest.fixture(scope="module")
def forgotten(measure):
    """What the ideal model of the other classes answers."""
    return measure(original(), draws(of_classes(0, 2, 3)))


class TestHalfLife:
    @pytest.mark.parametrize(
        ("counts", "expected"),
        [
            ([0, 2, 10, 20], 10 + 10 * 3 / 8),  # half of 10 is 5, between 2 at step 10 and 10 at step 20
            ([0, 5, 0, 0], 10.0),
            ([5, 0, 0, 0], 0.0),
            ([30, 30, 30, 30], 0.0),
            ([0, 1, 4, 4], None),
            ([0, 0, 0, 5], 40.0),
        ],
    )
    def test_it_is_where_the_count_passes_half(self, counts, expected):
        assert half_life([0, 10, 20, 40], counts, 10) == expected

    def test_half_of_an_odd_count_is_no_whole_number(self):
        assert half_life([0, 10], [0, 4], 9) is None
        assert half_life([0, 10], [0, 5], 9) == pytest.approx(9.0)


class TestRelearning:
    def test_a_model_that_never_forgot_has_it_at_once(self, measure):
        found = measure(original(), original())
        for kind in ("forget", "unrelated"):
            assert found["relearning"][kind]["half_life"] == 0.0
            assert found["relearning"][kind]["counts"][0] == found["relearning"]["before"] > 0
        assert found["inversion"]["after"] == found["inversion"]["before"]
        assert found["membership"]["after"] == found["membership"]["before"]

    def test_a_model_that_does_not_learn_stays_as_it_is(self, measure):
        slow = replace(QUICK, relearn_learning_rate=1e-12)
        found = measure(original(), draws(of_classes(0, 2, 3)), persistence=slow)["relearning"]
        assert found["forget"]["counts"] == found["unrelated"]["counts"] == [0, 0, 0]
        assert found["forget"]["half_life"] is None

    def test_images_of_the_class_bring_it_back_and_others_do_not(self, measure):
        fast = replace(QUICK, relearn_learning_rate=0.1, relearn_steps=(0, 20, 60))
        found = measure(original(), draws(of_classes(0, 2, 3)), persistence=fast)["relearning"]
        assert 0 < found["forget"]["half_life"] <= 60
        assert found["unrelated"]["half_life"] is None

    def test_it_is_adam_on_the_ddpm_loss_of_seed_and_step(self, tiny_denoiser, images):
        settings = replace(QUICK, relearn_steps=(0, 1, 3))
        weights = tiny_denoiser.module.encode.weight.detach().clone()

        def after(seed: int, steps: tuple[int, ...] = (0, 1, 3)) -> list[tuple[int, Tensor]]:
            runs = relearn(tiny_denoiser, images, replace(settings, relearn_steps=steps), seed=seed)
            return [(step, model.module.encode.weight.detach().clone()) for step, model in runs]

        first = after(1)
        assert [step for step, _ in first] == [0, 1, 3]
        assert torch.equal(first[0][1], weights)
        # Adam's first step is the learning rate, whatever the gradient.
        moved = (first[1][1] - weights).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, settings.relearn_learning_rate), rtol=1e-2, atol=0)
        assert torch.equal(first[2][1], after(1, (0, 3))[1][1])
        assert not torch.equal(first[2][1], after(2)[2][1])
        assert torch.equal(tiny_denoiser.module.encode.weight, weights)

    def test_what_unlearning_froze_is_relearned_too(self, tiny_denoiser, images):
        tiny_denoiser.module.encode.requires_grad_(False)
        *_, (_, model) = relearn(tiny_denoiser, images, QUICK, seed=0)
        assert not torch.equal(model.module.encode.weight, tiny_denoiser.module.encode.weight)
        assert not tiny_denoiser.module.encode.weight.requires_grad


class TestInversion:
    def test_the_original_draws_its_images_again_and_the_other_model_does_not(self, forgotten):
        assert forgotten["inversion"] == {"images": 12, "steps": CONFIG.sampler_steps, "before": 1.0, "after": 0.0}

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
    def test_it_is_the_loop_of_diffusers(self, prediction_type, images):
        denoiser = denoiser_of(build_pipeline(prediction_type))
        inverse = DDIMInverseScheduler(50, prediction_type=prediction_type, clip_sample=False)
        inverse.set_timesteps(10)
        x_t = images
        with torch.no_grad():
            for t in inverse.timesteps:
                x_t = inverse.step(denoiser.predict(x_t, t.expand(len(x_t))), int(t), x_t).prev_sample
        torch.testing.assert_close(invert_images(denoiser, images, steps=10, batch_size=5), x_t, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "velocity"])
    def test_decoding_brings_the_images_back(self, prediction_type, spacing, images):
        if prediction_type == "velocity":
            scheduler = FlowMatchEulerDiscreteScheduler(200, shift=2.0)
        else:
            scheduler = DDPMScheduler(200, prediction_type=prediction_type, timestep_spacing=spacing, clip_sample=False)
        module = build_tiny(timesteps=200)
        module.decode.weight.data.mul_(0.1)  # a field that bends little between two steps
        denoiser = Denoiser(module, scheduler, SHAPE)
        # What the model can draw: from a constant prediction of x_0 no other image comes back.
        drawn = sample_images(denoiser, 6, steps=40) if prediction_type == "sample" else 0.8 * images
        noise = invert_images(denoiser, drawn, steps=40)
        assert noise.isfinite().all()
        torch.testing.assert_close(decode_noise(denoiser, noise, steps=40), drawn, rtol=0, atol=0.05)

    def test_decoding_the_starting_noise_is_sampling(self, tiny_denoiser):
        noise = standard_normal((5, *SHAPE), 3, stream=Stream.SAMPLER)
        images = decode_noise(tiny_denoiser, noise, steps=7, batch_size=2)
        torch.testing.assert_close(images, sample_images(tiny_denoiser, 5, steps=7, seed=3), rtol=1e-4, atol=1e-5)


class TestMembership:
    def test_identical_sets_tell_nothing_and_separated_ones_all(self):
        errors = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)).double()
        assert membership_auc(errors, errors) == pytest.approx([0.5, 0.5])
        assert membership_auc(errors, errors + 2) == pytest.approx([1.0, 1.0])
        assert membership_auc(torch.stack([errors[0], errors[1] + 2]), errors) == pytest.approx([0.5, 0.0])

    def test_spread_by_chance(self):
        draws_of = torch.rand(300, 50, generator=torch.Generator().manual_seed(1))
        aucs = torch.tensor(membership_auc(draws_of[:, :30], draws_of[:, 30:]))
        assert float(aucs.std()) == pytest.approx(auc_spread(30, 20), rel=0.1)

    def test_an_ideal_model_gives_its_own_images_away(self, forgotten):
        # It knows its training images by heart, and those of the forgotten class no better than any others.
        assert forgotten["membership"]["before"]["worst"] > 0.9
        assert forgotten["membership"]["after"]["highest"] < 0.9
        for side in ("before", "after"):
            found = forgotten["membership"][side]
            assert found["worst"] == max(max(found["auc"]), 1 - min(found["auc"]))

    def test_errors_are_means_over_the_images_of_a_kind(self, forgotten):
        curves = forgotten["errors"]
        timesteps = torch.tensor(curves["timesteps"])
        assert timesteps.tolist() == list(range(50, 1000, 100))
        images = fixed_subset(TRAIN.images[TRAIN.labels == FORGET], 20, CONFIG.seed)
        errors = noise_prediction_errors(original(), images, timesteps=timesteps, seed=CONFIG.seed)
        assert curves["forget_train"]["before"] == pytest.approx(errors.mean(dim=1).tolist())
        assert curves["forget_train"]["images"] == 20
        before, after = (torch.tensor(curves["forget_heldout"][side]) for side in ("before", "after"))
        assert float((after / before).max()) > 2
        assert curves["retained_heldout"]["after"] == pytest.approx(curves["retained_heldout"]["before"], rel=0.5)


class TestMeasuring:
    def test_models_come_back_as_they_were_and_the_answers_are_the_same_again(self, measure, forgotten):
        models = original(), draws(of_classes(0, 2, 3))
        prints, state = [fingerprint(model.module) for model in models], torch.get_rng_state()
        again = measure(*models)
        assert [fingerprint(model.module) for model in models] == prints
        assert all(p.grad is None and p.requires_grad for model in models for p in model.module.parameters())
        assert torch.equal(torch.get_rng_state(), state)
        assert again == forgotten
        assert json.loads(json.dumps(again, allow_nan=False))["relearning"] == again["relearning"]
        assert not again["omitted"]

    def test_known_samples_of_the_original_are_not_drawn_again(self, measure, forgotten):
        known = sample_images(original(), 60, steps=CONFIG.sampler_steps, seed=CONFIG.seed)
        broken = draws(torch.full((2, *SHAPE), torch.nan))
        found = measure(broken, draws(of_classes(0, 2, 3)), original_samples=known)
        assert found["relearning"] == forgotten["relearning"]
        part = measure(original(), draws(of_classes(0, 2, 3)), original_samples=known[:15])
        assert part["relearning"] == forgotten["relearning"]

    def test_a_model_that_draws_nan_draws_nothing_of_the_class(self, measure):
        found = measure(original(), draws(torch.full((2, *SHAPE), torch.nan)))
        assert found["relearning"]["forget"]["counts"] == [0, 0, 0]
        assert found["inversion"]["after"] == 0
        assert "not finite" in found["omitted"]["errors.forget_train"]
        assert "membership" not in found

    def test_without_held_out_images_of_the_class_there_is_no_membership(self, measure):
        found = measure(original(), original(), heldout=HELDOUT.without(FORGET))
        assert "membership" not in found
        assert set(found["omitted"]) == {"errors.forget_heldout", "membership"}
        assert [name for name, *_ in persistence_rows(found)] == ["half is back", "by itself", "drawn from its noise"]

    def test_progress_ends_where_it_should(self, measure):
        reports = []
        measure(original(), original(), progress=lambda *at: reports.append(at))
        last = {stage: (done, total) for stage, done, total in reports}
        assert len(last) == 4
        assert all(done == total for done, total in last.values())

    def test_bad_input(self, measure):
        with pytest.raises(InputError, match=r"drew no image of class 'ne' in 40 samples.*--relearn_samples"):
            measure(draws(of_classes(0, 2)), original())
        with pytest.raises(InputError, match="train: quadrants has no image of class ne"):
            measure(original(), original(), train=TRAIN.without(FORGET))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"relearn_steps": (5, 10)}, r"relearn_steps: got \[5, 10\]; accepted are 0 and then"),
        ({"relearn_steps": (0, 10, 10)}, r"relearn_steps: got \[0, 10, 10\]"),
        ({"relearn_steps": ()}, r"relearn_steps: got \[\]"),
        ({"relearn_learning_rate": 0.0}, r"relearn_learning_rate: got 0.0; accepted are positive"),
        ({"relearn_learning_rate": float("nan")}, "relearn_learning_rate: got nan"),
        ({"relearn_samples": 0}, "relearn_samples: got 0; accepted are whole numbers from 1 up"),
        ({"membership_timesteps": 0}, "membership_timesteps: got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        PersistenceConfig(**setting)


def test_steps_may_come_as_a_list():
    assert PersistenceConfig(relearn_steps=[0, 3]).relearn_steps == (0, 3)  # type: ignore[arg-type]
