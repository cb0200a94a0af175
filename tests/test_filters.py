"""The filter drops from the bank what looks like the forget images, and says how much like them the rest looks."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from tiny import build_tiny
from torch import Tensor, nn

from vdu_fast import filters
from vdu_fast.errors import InputError
from vdu_fast.filters import classifier_filter, examples, positive_unlabelled_filter
from vdu_fast.pipelines import Denoiser

SHAPE = (1, 8, 8)


def bars(count: int, column: float, seed: int) -> Tensor:
    """Grey pictures with a bright upright bar around a column, each at another brightness and with some noise."""
    generator = torch.Generator().manual_seed(seed)
    bar = torch.exp(-((torch.arange(8.0) - column) ** 2) / 2)
    brightness = 0.6 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = 0.1 * torch.randn(count, *SHAPE, generator=generator)
    return (brightness * bar + noise - 0.5).clamp(-1, 1)


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser(build_tiny(hidden=32), DDPMScheduler(50), SHAPE)


@pytest.fixture(scope="module")
def bank() -> Tensor:
    """20 pictures of what must go (column 1), then 60 that are near it (column 3), then 120 that are not (column 6)."""
    return torch.cat([bars(20, 1, 0), bars(60, 3, 1), bars(120, 6, 2)])


FORGET, NEAR, FAR = slice(0, 20), slice(20, 80), slice(80, 200)


def test_what_looks_like_the_forget_images_goes_and_nothing_else(denoiser, bank):
    found = positive_unlabelled_filter(denoiser, bank, bars(40, 1, 3), feature_module="encode")
    assert not found.keep[FORGET].any()
    assert found.keep[FAR].all()
    assert found.keep[NEAR].float().mean() > 0.9
    assert found.report.dropped == int((~found.keep).sum())
    assert found.report.total == 200
    assert not found.report.limited
    assert found.report.estimated_share == pytest.approx(0.1, abs=0.05)


def test_likeness_ranks_near_before_far(denoiser, bank):
    likeness = positive_unlabelled_filter(denoiser, bank, bars(40, 1, 3), feature_module="encode").likeness
    assert likeness is not None
    assert likeness[FORGET].min() > likeness[NEAR].median() > likeness[FAR].max()


def test_what_is_unwanted_is_told_by_a_probability(denoiser, bank):
    found = positive_unlabelled_filter(denoiser, bank, bars(40, 1, 3), feature_module="encode")
    assert found.unwanted.min() >= 0
    assert found.unwanted.max() <= 1
    assert found.unwanted[FORGET].mean() > 0.9
    assert found.unwanted[NEAR].mean() < 0.1
    assert not found.unwanted[FAR].any()
    by_likeness = found.unwanted[found.likeness.argsort()]
    assert (by_likeness.diff() >= 0).all()


def test_the_probability_is_the_share_times_the_ratio_of_densities():
    scores = torch.arange(8).double().repeat(25)
    # Of 200 drawn images a tenth are unwanted. Half of their like score 7 and half 6: 10 of the 25 that score so.
    held_out = torch.tensor([6.0, 7.0], dtype=torch.float64).repeat(20)
    probability = filters._probability(scores, held_out, 0.1)
    torch.testing.assert_close(probability, torch.where(scores >= 6, 0.4, 0.0).double())


def test_no_more_is_dropped_than_allowed_the_most_like_first(denoiser, bank):
    how = {"feature_module": "encode", "max_dropped": 0.05}
    found = positive_unlabelled_filter(denoiser, bank, bars(40, 1, 3), **how)
    assert found.report.limited
    assert found.report.dropped == 10
    assert set((~found.keep).nonzero().flatten().tolist()) == set(found.likeness.topk(10).indices.tolist())
    assert "max_dropped" in found.report.describe()


def test_too_few_forget_images_are_refused(denoiser, bank):
    with pytest.raises(InputError, match="at least 8 forget images, got 7"):
        positive_unlabelled_filter(denoiser, bank, bars(7, 1, 3), feature_module="encode")


def test_of_many_forget_images_evenly_spaced_ones_are_looked_at(denoiser, bank, monkeypatch):
    assert torch.equal(examples(torch.arange(7)), torch.arange(7))
    monkeypatch.setattr(filters, "MOST_FORGET_IMAGES", 40)
    assert torch.equal(examples(torch.arange(100))[:5], torch.tensor([0, 2, 5, 7, 10]))
    forget, other = bars(40, 1, 3), bars(40, 6, 4)
    few, many = (
        positive_unlabelled_filter(denoiser, bank, images, feature_module="encode")
        for images in (forget, torch.stack((forget, other), dim=1).flatten(0, 1))
    )
    assert torch.equal(few.likeness, many.likeness)


def test_many_forget_images_show_themselves_how_far_down_they_reach(denoiser, bank):
    # One in twenty is fainter than the others: too few to widen their middle, too many to be given up.
    plain, faint = bars(570, 1, 3), 0.5 * bars(30, 1, 4) - 0.25
    drawn = torch.cat((bank, faint))

    def faint_left(forget: Tensor) -> int:
        found = positive_unlabelled_filter(denoiser, drawn, forget, feature_module="encode")
        assert not found.keep[FORGET].any()
        assert found.keep[NEAR].all()
        assert found.keep[FAR].all()
        return int(found.keep[len(bank) :].sum())

    assert faint_left(torch.cat((plain, faint))) < 10 < 20 < faint_left(plain)


def test_a_few_forget_images_do_not_say_how_far_down_the_others_reach():
    scores = torch.linspace(-1, 1, filters.ENOUGH, dtype=torch.float64)
    scores[::20] = -9.0
    assert filters._threshold(scores) == -9.0
    assert -4.0 < filters._threshold(scores[1:]) < -2.0


class Left(nn.Module):
    """Two classes by which half of the picture is brighter."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: Tensor) -> Tensor:
        left, right = images[..., :4].mean(dim=(1, 2, 3)), images[..., 4:].mean(dim=(1, 2, 3))
        return self.sharpness * torch.stack((left, right), dim=1)


def test_a_classifier_drops_its_class_and_its_probability_is_the_likeness(bank):
    found = classifier_filter(bank, Left(), 0)
    with torch.no_grad():
        probability = Left()(bank).softmax(dim=1)[:, 0]
    assert found.likeness is not None
    torch.testing.assert_close(found.likeness, probability)
    torch.testing.assert_close(found.unwanted, probability)
    assert torch.equal(found.keep, probability < 0.05)
    assert not found.keep[FORGET].any()
    assert found.keep[FAR].all()


def test_a_label_that_the_classifier_has_not_is_refused(bank):
    with pytest.raises(InputError, match=r"forget_label must be in \[0, 2\)"):
        classifier_filter(bank, Left(), 2)
