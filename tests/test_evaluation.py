"""Evaluation on models whose samples are known: ideal denoisers of a finite set of images draw those images."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from vdu_fast import evaluation
from vdu_fast.classifier import ImageClassifier, frechet_distance, train_classifier
from vdu_fast.data import ImageSet
from vdu_fast.distances import kernel_distance, nearest_neighbours
from vdu_fast.errors import InputError
from vdu_fast.evaluation import EvaluationConfig, evaluate, percentage_unlearned
from vdu_fast.pipelines import Denoiser
from vdu_fast.prediction_errors import noise_prediction_errors
from vdu_fast.sampling import sample_images
from vdu_fast.schedule import NoiseSchedule

CLASSES, FORGET, SHAPE = 4, 1, (1, 8, 8)
CONFIG = EvaluationConfig(samples=90, sampler_steps=8, batch_size=40, loss_images=8, loss_timesteps=3)
SCHEDULE = NoiseSchedule.from_alphas_cumprod(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0))


class IdealNetwork(nn.Module):
    """The exact noise predictor of the uniform distribution over the given images."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = nn.Parameter(images.flatten(1))

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        signal, noise = SCHEDULE.coefficients(timesteps, x_t.flatten(1))
        distance = torch.cdist(x_t.flatten(1), signal[0] * self.images) ** 2
        x0 = (-distance / (2 * noise**2)).softmax(dim=1) @ self.images
        return ((x_t.flatten(1) - signal * x0) / noise).view_as(x_t)


def draws(images: Tensor) -> Denoiser:
    return Denoiser(IdealNetwork(images), SCHEDULE, SHAPE)


def bright_quadrants(count: int, seed: int) -> ImageSet:
    """Noisy images of four classes, told apart by the quadrant that is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = 0.15 * torch.randn(count, *SHAPE, generator=generator) - 0.6
    for quadrant in range(CLASSES):
        top, left = 4 * (quadrant // 2), 4 * (quadrant % 2)
        images[labels == quadrant, :, top : top + 4, left : left + 4] += 1.2
    return ImageSet(images.clamp(-1, 1), labels, ("nw", "ne", "sw", "se"), "quadrants")


TRAIN, HELDOUT = bright_quadrants(360, 0), bright_quadrants(120, 1)


def of_classes(*classes: int) -> Tensor:
    assert TRAIN.labels is not None
    return TRAIN.images[torch.isin(TRAIN.labels, torch.tensor(classes))]


@pytest.fixture(scope="module")
def classifier() -> ImageClassifier:
    return train_classifier(TRAIN, seed=5, max_steps=25)


@pytest.fixture(scope="module")
def result(classifier: ImageClassifier) -> evaluation.Evaluation:
    models = draws(of_classes(0, 1, 2, 3)), draws(of_classes(0, 2, 3))
    return evaluate(*models, train=TRAIN, heldout=HELDOUT, forget=FORGET, config=CONFIG, classifier=classifier)


def test_percentage_unlearned() -> None:
    assert percentage_unlearned(80, 20, samples=1000, class_name="x") == 75
    assert percentage_unlearned(80, 0, samples=1000, class_name="x") == 100
    assert percentage_unlearned(80, 100, samples=1000, class_name="x") == -25
    with pytest.raises(InputError, match=r"no image of class 'x' in 1000 samples.*--samples"):
        percentage_unlearned(0, 0, samples=1000, class_name="x")


def test_counts_shares_and_pul(result: evaluation.Evaluation) -> None:
    metrics = result.metrics
    n_before = int((result.labels_before == FORGET).sum())
    assert 5 < n_before < 60
    assert metrics["counts"]["forgotten_before"] == n_before
    assert metrics["counts"]["forgotten_after"] == int((result.labels_after == FORGET).sum()) == 0
    assert metrics["pul"] == 100
    for side, labels in (("before", result.labels_before), ("after", result.labels_after)):
        assert metrics["shares"][side]["sw"] == pytest.approx(float((labels == 2).double().mean()))
        assert sum(metrics["shares"][side].values()) == pytest.approx(1)
    ratios = metrics["shares"]["kept_ratio"]
    assert set(ratios) == {"nw", "sw", "se"}
    assert (
        metrics["shares"]["kept_ratio_min"] == ratios[metrics["shares"]["kept_ratio_min_class"]] == min(ratios.values())
    )
    assert metrics["forgotten_class"] == {"index": FORGET, "name": "ne"}


def test_pul_of_held_out_images_is_what_the_classifier_mistakes(result: evaluation.Evaluation) -> None:
    assert HELDOUT.labels is not None
    others = HELDOUT.images[HELDOUT.labels != FORGET]
    taken_for_it = int((result.classifier.embed_and_classify(others)[1] == FORGET).sum())
    share_before = result.metrics["counts"]["forgotten_before"] / CONFIG.samples
    assert result.metrics["pul_heldout"] == pytest.approx(100 * (1 - taken_for_it / len(others) / share_before))


def test_a_classifier_that_mistakes_others_lowers_the_pul_of_held_out_images(classifier: ImageClassifier) -> None:
    """A quarter of the held-out pictures of other classes are of the class, but for their label."""
    assert HELDOUT.labels is not None
    ours, others = HELDOUT.labels == FORGET, HELDOUT.labels != FORGET
    mislabelled = replace(
        HELDOUT,
        images=torch.cat([HELDOUT.images[others], HELDOUT.images[ours]]),
        labels=torch.cat([HELDOUT.labels[others], torch.zeros(int(ours.sum()), dtype=torch.int64)]),
    )
    models = draws(of_classes(0, 1, 2, 3)), draws(of_classes(0, 2, 3))
    how = {"train": TRAIN, "heldout": mislabelled, "forget": FORGET, "classifier": classifier}
    config = replace(CONFIG, samples=20, sampler_steps=3)
    metrics = evaluate(*models, **how, config=config).metrics
    before = metrics["counts"]["forgotten_before"] / config.samples
    # Hardly any of the others is mistaken.
    assert metrics["pul_heldout"] == pytest.approx(100 * (1 - 0.25 / before), abs=100 * 0.03 / before)


def test_u_fid_of_all_samples_against_real_images_without_the_class(
    result: evaluation.Evaluation, classifier: ImageClassifier
) -> None:
    reference, _ = classifier.embed_and_classify(of_classes(0, 2, 3))
    u_fid = result.metrics["u_fid"]
    for side, images in (("before", result.before), ("after", result.after)):
        assert u_fid[side] == pytest.approx(
            frechet_distance(classifier.embed_and_classify(images)[0], reference), rel=1e-9
        )
    assert HELDOUT.labels is not None
    unseen = HELDOUT.images[HELDOUT.labels != FORGET]
    floor = frechet_distance(classifier.embed_and_classify(unseen)[0], reference)
    assert u_fid["floor"] == pytest.approx(floor, rel=1e-9)
    assert u_fid["after"] < u_fid["before"]
    assert u_fid["oracle"] < u_fid["before"]


def test_the_neighbours_of_u_fid_compare_the_same_sets(
    result: evaluation.Evaluation, classifier: ImageClassifier
) -> None:
    reference, _ = classifier.embed_and_classify(of_classes(0, 2, 3))
    features, _ = classifier.embed_and_classify(result.after)
    metrics = result.metrics
    assert metrics["kid"]["after"] == pytest.approx(kernel_distance(features, reference, seed=CONFIG.seed), abs=1e-9)
    expected = nearest_neighbours(features, reference)
    for name in ("precision", "recall", "density", "coverage"):
        assert set(metrics[name]) == {"before", "after", "oracle", "floor"}
        assert metrics[name]["after"] == pytest.approx(getattr(expected, name))
    # A model that draws a class too many is less precise, and one that lost nothing else covers as much.
    assert metrics["precision"]["before"] < metrics["precision"]["after"]
    assert metrics["kid"]["before"] > metrics["kid"]["after"]


def test_oracle_is_topped_up_from_later_samples(result: evaluation.Evaluation, classifier: ImageClassifier) -> None:
    counts = result.metrics["counts"]
    assert counts["oracle"] == counts["samples"] == CONFIG.samples
    assert counts["oracle_extra_drawn"] >= counts["forgotten_before"]
    drawn = CONFIG.samples + counts["oracle_extra_drawn"]
    images = sample_images(draws(of_classes(0, 1, 2, 3)), drawn, steps=CONFIG.sampler_steps, seed=CONFIG.seed)
    features, labels = classifier.embed_and_classify(images)
    reference, _ = classifier.embed_and_classify(of_classes(0, 2, 3))
    expected = frechet_distance(features[labels != FORGET][: CONFIG.samples], reference)
    assert result.metrics["u_fid"]["oracle"] == pytest.approx(expected, rel=1e-3)


def test_oracle_of_a_model_that_draws_nothing_else(classifier: ImageClassifier) -> None:
    config = replace(CONFIG, samples=20)
    models = draws(of_classes(FORGET)), draws(of_classes(0, 2))
    metrics = evaluate(
        *models, train=TRAIN, heldout=HELDOUT, forget=FORGET, config=config, classifier=classifier
    ).metrics
    assert "oracle" not in metrics["u_fid"]
    assert "2 are needed" in metrics["omitted"]["u_fid.oracle"]
    assert "6 are needed" in metrics["omitted"]["recall.oracle"]
    assert metrics["counts"]["oracle_extra_drawn"] == 3 * config.samples
    assert "kept_ratio_min" not in metrics["shares"]
    assert any("too few for a covariance" in warning for warning in metrics["warnings"])


def test_losses(result: evaluation.Evaluation) -> None:
    forget, retained = result.metrics["forget_loss"], result.metrics["retained_loss"]
    assert forget["after"] > 1.2 * forget["before"]
    assert retained["ratio"] == pytest.approx(1, abs=0.05)
    assert (forget["images"], forget["timesteps"]) == (8, 3)


def test_noise_prediction_error_of_a_known_network() -> None:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
            return torch.zeros_like(x_t)

    images, timesteps = torch.rand(50, *SHAPE), torch.tensor([10, 500])
    predict_zero = Denoiser(Zero(), SCHEDULE, SHAPE)
    errors = [
        float(noise_prediction_errors(predict_zero, images, timesteps=timesteps, seed=0, batch_size=size).mean())
        for size in (50, 7)
    ]
    assert errors[0] == pytest.approx(errors[1])
    assert errors[0] == pytest.approx(1, abs=0.05)  # the mean square of standard normal noise
    predict_zero.schedule = NoiseSchedule(SCHEDULE.signal, SCHEDULE.noise, "sample", SCHEDULE.alphas_cumprod)
    error = float(noise_prediction_errors(predict_zero, images, timesteps=timesteps, seed=0).mean())
    assert error == pytest.approx(float(images.square().mean()), rel=1e-5)


def test_the_same_arguments_give_the_same_numbers(result: evaluation.Evaluation, classifier: ImageClassifier) -> None:
    state = torch.get_rng_state()
    models = draws(of_classes(0, 1, 2, 3)), draws(of_classes(0, 2, 3))
    again = evaluate(*models, train=TRAIN, heldout=HELDOUT, forget=FORGET, config=CONFIG, classifier=classifier)
    assert again.metrics == result.metrics
    assert torch.equal(again.after, result.after)
    assert torch.equal(torch.get_rng_state(), state)


def test_metrics_are_ready_for_json(result: evaluation.Evaluation) -> None:
    assert json.loads(json.dumps(result.metrics, allow_nan=False)) == result.metrics
    assert result.metrics["sampler"] == {"name": "DDIM (eta = 0)", "steps": 8, "seed": 1234}
    assert result.metrics["classifier"]["seed"] == 5
    assert result.metrics["classifier"]["accuracy"] > 0.9
    assert "penultimate layer" in result.metrics["feature_extractor"]


def test_a_classifier_is_trained_where_none_is_given(
    monkeypatch: pytest.MonkeyPatch, classifier: ImageClassifier
) -> None:
    seeds, stages = [], []

    def stand_in(train: ImageSet, *, seed: int, progress) -> ImageClassifier:
        seeds.append(seed)
        progress(1, 1)
        return classifier

    monkeypatch.setattr(evaluation, "train_classifier", stand_in)
    config = replace(CONFIG, samples=20, sampler_steps=3, classifier_seed=77)
    models = draws(of_classes(0, 1)), draws(of_classes(0))
    evaluate(
        *models,
        train=TRAIN,
        heldout=HELDOUT,
        forget=FORGET,
        config=config,
        progress=lambda *at: stages.append(at),
    )
    assert seeds == [77]
    assert {stage for stage, _, _ in stages} >= {"classifier", "samples before", "samples after", "distances", "losses"}
    assert all(0 <= done <= total for _, done, total in stages)


def test_held_out_images_without_the_class_leave_the_forget_loss_out(classifier: ImageClassifier) -> None:
    config = replace(CONFIG, samples=20, sampler_steps=3)
    models = draws(of_classes(0, 1)), draws(of_classes(0))
    heldout = HELDOUT.without(FORGET)
    metrics = evaluate(
        *models, train=TRAIN, heldout=heldout, forget=FORGET, config=config, classifier=classifier
    ).metrics
    assert "forget_loss" not in metrics
    assert "forget_loss" in metrics["omitted"]
    assert "retained_loss" in metrics


def test_bad_input(classifier: ImageClassifier) -> None:
    model = draws(of_classes(0, 2))

    def run(**changes):
        arguments = {"train": TRAIN, "heldout": HELDOUT, "forget": FORGET, "config": CONFIG, "classifier": classifier}
        models = changes.pop("before", model), changes.pop("after", model)
        return evaluate(*models, **{**arguments, **changes})

    with pytest.raises(InputError, match="drew no image of class 'ne' in 90 samples"):
        run()
    with pytest.raises(InputError, match=r"forget: got class 4.*0 to 3 \(nw, ne, sw, se\)"):
        run(forget=4)
    with pytest.raises(InputError, match="train: quadrants has no labels"):
        run(train=replace(TRAIN, labels=None))
    with pytest.raises(InputError, match="heldout: quadrants has no labels"):
        run(heldout=replace(HELDOUT, labels=None))
    with pytest.raises(InputError, match="heldout: quadrants has the classes a, b, c, d"):
        run(heldout=replace(HELDOUT, class_names=("a", "b", "c", "d")))
    for other in (ImageClassifier(1, (8, 8), ("a", "b")), ImageClassifier(1, (9, 8), TRAIN.class_names)):
        with pytest.raises(InputError, match="classifier: made for"):
            run(classifier=other)
    with pytest.raises(InputError, match=r"after: images are \(3, 8, 8\)"):
        run(after=Denoiser(model.module, SCHEDULE, (3, 8, 8)))
    with pytest.raises(InputError, match=r"train: images are \(1, 16, 16\).*--resize"):
        run(train=replace(TRAIN, images=torch.zeros(360, 1, 16, 16)))
    with pytest.raises(InputError, match="before: the model draws NaN"):
        run(before=draws(torch.full((2, *SHAPE), torch.nan)))
    with pytest.raises(InputError, match="samples: got 1"):
        EvaluationConfig(samples=1)
    with pytest.raises(InputError, match="sampler_steps: got 0"):
        EvaluationConfig(sampler_steps=0)
