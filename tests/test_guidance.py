"""Guided replay: predictions of a model that never drew the unwanted, against Bayes' rule written out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vdu_fast import guidance
from vdu_fast.guidance import guide, passed_on
from vdu_fast.replay import ReplayBank
from vdu_fast.schedule import NoiseSchedule

SHAPE = (1, 2, 2)
COUNT, STATES, TIMESTEPS = 40, 3, 50
# From all noise to hardly any.
ALPHAS_CUMPROD = torch.linspace(0.999, 0.01, TIMESTEPS, dtype=torch.float64)
DIFFUSION = ["epsilon", "v_prediction", "sample"]


def schedule_of(prediction_type: str) -> NoiseSchedule:
    if prediction_type == "velocity":
        sigma = torch.arange(1, TIMESTEPS + 1, dtype=torch.float64) / TIMESTEPS
        return NoiseSchedule(1 - sigma, sigma, "velocity")
    return NoiseSchedule.from_alphas_cumprod(ALPHAS_CUMPROD, prediction_type)


EPSILON = schedule_of("epsilon")


@pytest.fixture(scope="module")
def bank() -> ReplayBank:
    """Each trajectory passes pure noise, half noise and hardly any; what was predicted there are random numbers."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(COUNT, *SHAPE, generator=generator)
    timesteps = torch.tensor([TIMESTEPS - 1, TIMESTEPS // 2, 0]).expand(COUNT, STATES).clone()
    noise, predictions = torch.randn(2, COUNT, STATES, *SHAPE, generator=generator)
    x_t = torch.stack([EPSILON.add_noise(images, noise[:, s], timesteps[:, s]) for s in range(STATES)], dim=1)
    return ReplayBank(images, x_t, timesteps, predictions, {"model": "none"}, torch.arange(COUNT).float())


@pytest.fixture(scope="module")
def unwanted() -> Tensor:
    """Most images are wanted, some are not, and of some nobody knows."""
    probability = torch.zeros(COUNT, dtype=torch.float64)
    probability[-8:], probability[-12:-8] = 1.0, 0.5
    return probability


KEEP = torch.arange(COUNT) < COUNT - 12


@pytest.fixture(autouse=True)
def few_images_are_enough(monkeypatch):
    """Of so small a bank."""
    monkeypatch.setattr(guidance, "FEWEST_IMAGES", 5.0)


def by_the_rule(
    bank: ReplayBank, unwanted: Tensor, schedule: NoiseSchedule, number: int, slot: int, strength: float
) -> tuple[Tensor, float]:
    """What the old prediction of a state becomes, image by image, and from how many images, in effect."""
    t, x_t = int(bank.timesteps[number, slot]), bank.x_t[number, slot].double()
    signal, noise = float(schedule.signal[t]), float(schedule.noise[t])
    all_of_them, wanted = torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.float64)
    total = all_squares = kept = squares = 0.0
    for other in range(len(bank)):
        if other != number:
            x0 = bank.images[other].double()
            density = math.exp(-float((x_t - signal * x0).square().sum()) / (2 * noise**2))
            left = density * (1 - float(unwanted[other]))
            all_of_them, total = all_of_them + density * x0, total + density
            all_squares += density**2
            wanted, kept, squares = wanted + left * x0, kept + left, squares + left**2
    if squares == 0:  # too far from all of them to tell
        return bank.predictions[number, slot].double(), 0.0
    moved = strength * (wanted / kept - all_of_them / total)
    change = {
        "epsilon": -signal / noise * moved,
        "sample": moved,
        "v_prediction": -(signal**2 / noise + noise) * moved,
        "velocity": -(signal / noise + 1) * moved,
    }[schedule.prediction_type]
    # Of the mean that fewer images tell.
    return bank.predictions[number, slot].double() + change, min(kept**2 / squares, total**2 / all_squares)


@pytest.mark.parametrize("chunk", [7, 500])
@pytest.mark.parametrize("strength", [1.0, 1.7])
@pytest.mark.parametrize("prediction_type", [*DIFFUSION, "velocity"])
def test_a_guided_prediction_is_by_bayes_rule(bank, unwanted, prediction_type, strength, chunk, monkeypatch):
    monkeypatch.setattr(guidance, "CHUNK", chunk)
    schedule = schedule_of(prediction_type)
    found = guide(bank, KEEP, unwanted, schedule, strength=strength).bank
    kept = int(KEEP.sum())
    assert torch.equal(found.x_t[:kept], bank.x_t[:kept])
    assert torch.equal(found.timesteps[:kept], bank.timesteps[:kept])
    guided = 0
    for number in range(kept):
        for slot in range(STATES):
            expected, images = by_the_rule(bank, unwanted, schedule, number, slot, strength)
            if images >= 5:
                torch.testing.assert_close(found.predictions[number, slot], expected.float(), rtol=1e-5, atol=1e-6)
                guided += 1
            else:
                assert torch.equal(found.predictions[number, slot], bank.predictions[number, slot])
    assert kept <= guided < 3 * kept  # all of pure noise, and never where next to none is left


def test_from_pure_noise_the_wanted_alone_are_drawn(bank, unwanted):
    pure = NoiseSchedule.from_alphas_cumprod(torch.linspace(0.999, 0.0, TIMESTEPS, dtype=torch.float64), "sample")
    moved = guide(bank, KEEP, unwanted, pure, strength=1.0).bank.predictions[0, 0] - bank.predictions[0, 0]
    others, left = bank.images[1:].double(), 1 - unwanted[1:]
    wanted = (left[:, None, None, None] * others).sum(dim=0) / left.sum()
    torch.testing.assert_close(moved.double(), wanted - others.mean(dim=0), rtol=1e-4, atol=1e-6)


def test_of_what_is_not_kept_the_guided_states_alone_stay(bank, unwanted):
    found = guide(bank, KEEP, unwanted, EPSILON, strength=1.0)
    kept = int(KEEP.sum())
    assert found.added == len(found.bank) - kept == 12
    alone = replace(bank, predictions=bank.predictions.clone())
    for row, number in enumerate(range(kept, COUNT), start=kept):
        targets = [by_the_rule(alone, unwanted, EPSILON, number, slot, 1.0) for slot in range(STATES)]
        usable = [slot for slot, (_, images) in enumerate(targets) if images >= 5]
        assert 0 in usable
        assert 2 not in usable
        held = [slot if slot in usable else usable[slot % len(usable)] for slot in range(STATES)]
        for place, slot in enumerate(held):
            assert torch.equal(found.bank.x_t[row, place], bank.x_t[number, slot])
            assert found.bank.timesteps[row, place] == bank.timesteps[number, slot]
            torch.testing.assert_close(
                found.bank.predictions[row, place], targets[slot][0].float(), rtol=1e-5, atol=1e-6
            )
    # They are no neighbours of the unwanted.
    assert torch.equal(found.bank.likeness[:kept], bank.likeness[:kept])
    assert found.bank.likeness[kept:].isneginf().all()
    assert found.bank.nearest.tolist() == list(range(kept - 1, kept - 1 - kept // 4, -1))


def test_what_has_no_guided_state_goes(bank, unwanted):
    clear = replace(bank, **{name: getattr(bank, name)[:, 2:] for name in ("x_t", "timesteps", "predictions")})
    found = guide(clear, KEEP, unwanted, EPSILON, strength=1.0)
    assert (found.states, found.added) == (0, 0)
    assert torch.equal(found.bank.predictions, clear.predictions[KEEP])
    assert torch.equal(found.bank.images, bank.images[KEEP])


def test_it_counts_its_states_and_says_so(bank, unwanted):
    found = guide(bank, KEEP, unwanted, EPSILON, strength=1.0)
    old, new = ({tuple(row.tolist()) for row in b.predictions.flatten(2).flatten(0, 1)} for b in (bank, found.bank))
    assert found.states == len(new - old)
    says = f"guidance: {found.states} replayed states without the unwanted, also of 12 images dropped"
    assert found.describe() == says


def test_where_nothing_is_unwanted_nothing_changes(bank):
    every = torch.ones(COUNT, dtype=torch.bool)
    found = guide(bank, every, torch.zeros(COUNT), EPSILON, strength=1.0).bank
    assert torch.equal(found.predictions, bank.predictions)


def test_where_all_is_unwanted_nothing_can_guide(bank):
    found = guide(bank, KEEP, torch.ones(COUNT), EPSILON, strength=1.0)
    assert (found.states, found.added) == (0, 0)
    assert torch.equal(found.bank.predictions, bank.predictions[KEEP])


def test_the_bank_itself_stays_as_it_was(bank, unwanted):
    before = {name: getattr(bank, name).clone() for name in ("x_t", "timesteps", "predictions")}
    guide(bank, KEEP, unwanted, EPSILON, strength=2.0)
    for name, value in before.items():
        assert torch.equal(getattr(bank, name), value)


def test_the_next_request_keeps_what_is_left_and_is_led_to_the_unwanted_no_more(bank, unwanted):
    before = bank.predictions.clone()
    # Not the first ones, so that what is looked up must be by number.
    keep, unwanted = KEEP.flip(0), unwanted.flip(0)
    found, states = passed_on(bank, keep, unwanted, EPSILON)
    assert len(found) == int(keep.sum())
    assert found.likeness is None
    for name in ("images", "x_t", "timesteps"):
        assert torch.equal(getattr(found, name), getattr(bank, name)[keep])
    moved = 0
    for row, number in enumerate(keep.nonzero().flatten().tolist()):
        for slot in range(STATES):
            expected, images = by_the_rule(bank, unwanted, EPSILON, number, slot, 1.0)
            if images >= 5:
                torch.testing.assert_close(found.predictions[row, slot], expected.float(), rtol=1e-5, atol=1e-6)
                moved += 1
            else:
                assert torch.equal(found.predictions[row, slot], before[number, slot])
    assert len(found) <= moved == states < STATES * len(found)
    assert torch.equal(bank.predictions, before)


def test_images_too_far_apart_are_passed_on_as_they_were(bank, unwanted):
    apart = replace(bank, images=1000 * bank.images)
    found, states = passed_on(apart, KEEP, unwanted, EPSILON)
    assert states == 0
    assert torch.equal(found.predictions, bank.predictions[KEEP])
