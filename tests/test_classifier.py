"""The classifier: accuracy on real digits, determinism, the Frechet distance against its closed form, bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from vdu_fast.checkpoint import save_tensors
from vdu_fast.classifier import ImageClassifier, frechet_distance, measure_accuracy, train_classifier
from vdu_fast.data import ImageSet, load_images
from vdu_fast.errors import InputError


def tiny_set(count: int = 40, channels: int = 1, size: tuple[int, int] = (8, 8), classes: int = 4) -> ImageSet:
    """Constant images whose brightness is their class."""
    labels = torch.arange(count) % classes
    images = (labels.float() / classes * 2 - 1)[:, None, None, None].expand(-1, channels, *size).clone()
    return ImageSet(images, labels, tuple(f"c{i}" for i in range(classes)), "tiny")


@pytest.fixture(scope="module")
def digits() -> tuple[ImageSet, ImageSet]:
    return load_images("digits", split="train"), load_images("digits", split="heldout")


@pytest.fixture(scope="module")
def trained(digits: tuple[ImageSet, ImageSet]) -> ImageClassifier:
    return train_classifier(digits[0], heldout=digits[1], seed=4321)


def test_digits_accuracy(trained: ImageClassifier, digits: tuple[ImageSet, ImageSet]) -> None:
    assert trained.accuracy is not None
    assert trained.accuracy >= 0.98
    assert measure_accuracy(trained, digits[1]) == trained.accuracy


def test_features_are_the_penultimate_layer(trained: ImageClassifier, digits: tuple[ImageSet, ImageSet]) -> None:
    images = digits[1].images[:30]
    with torch.no_grad():
        features = trained.features(images)
        assert features.shape == (30, trained.num_features)
        torch.testing.assert_close(trained.head(features), trained(images))
    embedded, labels = trained.embed_and_classify(images, batch_size=7)
    assert embedded.dtype == torch.float64
    torch.testing.assert_close(embedded, features.double(), atol=1e-4, rtol=1e-4)
    assert torch.equal(labels, trained(images).argmax(1))


def test_save_and_load(trained: ImageClassifier, digits: tuple[ImageSet, ImageSet], tmp_path) -> None:
    trained.save(tmp_path / "classifier.safetensors")
    loaded = ImageClassifier.load(tmp_path / "classifier.safetensors")
    assert (loaded.class_names, loaded.accuracy, loaded.seed) == (trained.class_names, trained.accuracy, 4321)
    assert not loaded.training
    images = digits[1].images[:20]
    assert torch.equal(loaded(images), trained(images))


def test_load_refuses_another_file(tmp_path) -> None:
    save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(InputError, match="is not a classifier"):
        ImageClassifier.load(tmp_path / "other.safetensors")


def test_training_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    steps: list[tuple[int, int]] = []
    first = train_classifier(tiny_set(), seed=3, max_steps=4, progress=lambda *at: steps.append(at))
    assert torch.equal(torch.get_rng_state(), state)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    torch.manual_seed(99)
    second, other = (train_classifier(tiny_set(), seed=seed, max_steps=4) for seed in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embed.weight, other.embed.weight)


@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (3, (9, 13)), (1, (28, 28)), (4, (64, 33))])
def test_any_size_and_channel_count(channels: int, size: tuple[int, int]) -> None:
    classifier = train_classifier(tiny_set(8, channels, size), max_steps=1)
    features, labels = classifier.embed_and_classify(torch.zeros(3, channels, *size))
    assert features.shape == (3, 64)
    assert labels.shape == (3,)
    assert classifier.embed_and_classify(torch.zeros(0, channels, *size))[0].shape == (0, 64)


def test_bad_input() -> None:
    data = tiny_set()
    with pytest.raises(InputError, match=r"no labels.*sub-folder"):
        train_classifier(replace(data, labels=None))
    with pytest.raises(InputError, match="no image of class c4"):
        train_classifier(replace(data, class_names=(*data.class_names, "c4")))
    with pytest.raises(InputError, match="accepted are 0 to 2"):
        train_classifier(replace(data, class_names=data.class_names[:3]))
    with pytest.raises(InputError, match="--resize 8"):
        train_classifier(tiny_set(size=(7, 8)))
    with pytest.raises(InputError, match="at least 2"):
        ImageClassifier(1, (8, 8), ("only",))
    with pytest.raises(InputError, match=r"got shape \(2, 3, 8, 8\)"):
        ImageClassifier(1, (8, 8), ("a", "b")).embed_and_classify(torch.zeros(2, 3, 8, 8))
    with pytest.raises(InputError, match="no labels"):
        measure_accuracy(ImageClassifier(1, (8, 8), ("a", "b")), replace(data, labels=None))


def closed_form(x: np.ndarray, y: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root))


@pytest.mark.parametrize(("n", "m", "width"), [(500, 300, 5), (200, 900, 64)])
def test_frechet_distance_is_the_closed_form(n: int, m: int, width: int) -> None:
    rng = np.random.default_rng(0)
    # Values far outside [0, 1] and [0, 255]: a rescaling or clipping on the way would show.
    x = 40 * rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + 300
    y = 25 * rng.normal(size=(m, width)) - 200
    expected = closed_form(x, y)
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_shifted_features_is_the_squared_shift() -> None:
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x + 2, x) == pytest.approx(24, abs=1e-6)


def test_frechet_distance_passes_the_reference_as_real(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchmetrics.image.fid as fid

    seen = {}
    update = fid.FrechetInceptionDistance.update

    def spy(self, imgs, real):
        seen[real] = len(imgs)
        return update(self, imgs, real)

    monkeypatch.setattr(fid.FrechetInceptionDistance, "update", spy)
    frechet_distance(torch.rand(11, 3), torch.rand(29, 3))
    assert seen == {True: 29, False: 11}


def test_frechet_distance_bad_input() -> None:
    with pytest.raises(InputError, match="samples: got 1 images"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(InputError, match="reference: features hold NaN"):
        frechet_distance(torch.zeros(5, 3), torch.full((5, 3), torch.nan))
