"""Samples of the original model in a file: drawn once, and used for nothing that would draw others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_evaluation import CONFIG, FORGET, HELDOUT, TRAIN, classifier, draws, of_classes  # noqa: F401

from vdu_fast import evaluation
from vdu_fast.checkpoint import save_tensors
from vdu_fast.drawn import load_samples, save_samples
from vdu_fast.errors import InputError
from vdu_fast.evaluation import evaluate


def judged(classifier, **options):  # noqa: F811
    models = draws(of_classes(0, 1, 2, 3)), draws(of_classes(0, 2, 3))
    how = {"train": TRAIN, "heldout": HELDOUT, "forget": FORGET, "config": CONFIG, "classifier": classifier}
    return evaluate(*models, **how, **options)


@pytest.fixture
def first_numbers(monkeypatch):
    """The numbers of the first image of every batch of samples that is drawn."""
    seen = []
    draw = evaluation.sample_images

    def noted(denoiser, count, **options):
        seen.append((options["first"], count))
        return draw(denoiser, count, **options)

    monkeypatch.setattr(evaluation, "sample_images", noted)
    return seen


def test_samples_once_drawn_give_the_same_numbers_and_are_not_drawn_again(classifier, tmp_path, first_numbers):  # noqa: F811
    before = draws(of_classes(0, 1, 2, 3))
    once = judged(classifier)
    assert len(once.original_samples) > CONFIG.samples  # with those of the oracle
    torch.testing.assert_close(once.original_samples[: CONFIG.samples], once.before, rtol=0, atol=0)
    save_samples(tmp_path / "samples.safetensors", once.original_samples, before, CONFIG)
    first_numbers.clear()
    again = judged(classifier, original_samples=load_samples(tmp_path / "samples.safetensors", before, CONFIG))
    assert [(first, count) for first, count in first_numbers if count] == [(0, CONFIG.samples)]  # of the new model
    assert again.metrics == once.metrics
    assert torch.equal(again.original_samples, once.original_samples)


def test_samples_that_are_missing_are_drawn(classifier, first_numbers):  # noqa: F811
    whole = judged(classifier)
    first_numbers.clear()
    again = judged(classifier, original_samples=whole.original_samples[:40])
    assert first_numbers[0] == (40, CONFIG.samples - 40)
    torch.testing.assert_close(again.original_samples, whole.original_samples, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed"), ({"sampler_steps": 9}, "sampler_steps"), ({"precision": "bfloat16"}, "precision")],
)
def test_samples_of_other_settings_are_refused(tmp_path, change, named):
    before = draws(of_classes(0, 1))
    save_samples(tmp_path / "samples.safetensors", torch.zeros(2, 1, 8, 8), before, CONFIG)
    with pytest.raises(InputError, match=f"was drawn with {named} "):
        load_samples(tmp_path / "samples.safetensors", before, replace(CONFIG, **change))


def test_samples_of_another_model_and_other_files_are_refused(tmp_path):
    save_samples(tmp_path / "samples.safetensors", torch.zeros(2, 1, 8, 8), draws(of_classes(0, 1)), CONFIG)
    with pytest.raises(InputError, match="was drawn with model "):
        load_samples(tmp_path / "samples.safetensors", draws(of_classes(0)), CONFIG)
    save_tensors(tmp_path / "other.safetensors", {"images": torch.zeros(2, 1, 8, 8)})
    with pytest.raises(InputError, match="holds no samples"):
        load_samples(tmp_path / "other.safetensors", draws(of_classes(0)), CONFIG)


def test_what_was_drawn_is_handed_out_before_anything_later_can_fail(classifier):  # noqa: F811
    kept = []
    damaged = draws(of_classes(0, 2, 3))
    with torch.no_grad():
        damaged.module.images.fill_(float("nan"))
    how = {"train": TRAIN, "heldout": HELDOUT, "forget": FORGET, "config": CONFIG, "classifier": classifier}
    with pytest.raises(InputError, match="draws NaN"):
        evaluate(draws(of_classes(0, 1, 2, 3)), damaged, on_original=kept.append, **how)
    assert [len(images) for images in kept] == [CONFIG.samples]
    whole = judged(classifier, on_original=kept.append)
    assert torch.equal(kept[-1], whole.original_samples)
    count = len(kept)
    judged(classifier, on_original=kept.append, original_samples=whole.original_samples)
    assert len(kept) == count  # nothing new, nothing to write
