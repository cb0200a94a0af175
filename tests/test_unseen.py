"""What a model would predict that never saw the unwanted: where that can be worked out by hand, and where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vdu_fast.data import load_images
from vdu_fast.demo import shipped_model
from vdu_fast.filters import positive_unlabelled_filter
from vdu_fast.pipelines import denoiser_of, load_pipeline
from vdu_fast.replay import build_bank
from vdu_fast.rng import standard_normal
from vdu_fast.schedule import NoiseSchedule
from vdu_fast.unseen import Unseen

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "digits"
SCHEDULE = NoiseSchedule.from_alphas_cumprod(torch.linspace(0.9999, 0.0001, 50, dtype=torch.float64), "sample")
# Five images at +1, of which two are unwanted, and five at -1.
IMAGES = torch.tensor([1.0] * 5 + [-1.0] * 5).reshape(10, 1, 1, 1).expand(10, 1, 2, 2).contiguous()
UNWANTED = torch.tensor([1.0, 1.0] + [0.0] * 8)
CLEAN, NOISE = torch.tensor([0]), torch.tensor([49])


def test_in_pure_noise_the_unwanted_are_missing_from_the_mean():
    change, over = Unseen(IMAGES, UNWANTED, SCHEDULE).change(torch.zeros(1, 1, 2, 2), NOISE)
    # The mean of all is 0, that of the others (3 - 5) / 8.
    torch.testing.assert_close(change, torch.full((1, 1, 2, 2), -0.25, dtype=torch.float64))
    assert over.item() == pytest.approx(8)


def test_where_a_state_shows_what_it_will_be_nothing_else_counts():
    change, over = Unseen(IMAGES, UNWANTED, SCHEDULE).change(torch.ones(1, 1, 2, 2), CLEAN)
    assert change.abs().max() < 1e-9
    assert over.item() == pytest.approx(3)


def test_without_its_own_image_a_state_of_it_is_led_to_the_others():
    images = torch.cat([torch.full((1, 1, 2, 2), 3.0), IMAGES])
    unwanted = torch.cat([torch.ones(1), UNWANTED])
    states = images[:1].clone()
    among, without = (
        Unseen(images, unwanted, SCHEDULE).change(states, CLEAN, own=own)[0] for own in (None, torch.tensor([0]))
    )
    assert without.abs().max() < 1e-9  # three of the five next to it are wanted, and all are equal
    assert among.allclose(torch.tensor(-2.0, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("digit", [3, 5])
def test_it_tells_what_the_retrained_model_gets_wrong(digit):
    """Of the shipped model, by its bank and filter, against the protocol's model that never saw the digit."""
    records = (json.loads(line)["record"] for line in (RESULTS / "runs.jsonl").read_text().splitlines())
    retrained = next(r for r in records if r.get("method") == "retrain" and r["label"] == digit and "persistence" in r)
    errors = retrained["persistence"]["errors"]
    denoiser = denoiser_of(load_pipeline(shipped_model()))
    images = load_images("digits", split="train").only(digit).images
    bank = build_bank(denoiser, 1000, sampler_steps=20, states=1)
    unwanted = positive_unlabelled_filter(denoiser, bank.images, images).unwanted
    unseen = Unseen(bank.images, unwanted, denoiser.schedule)
    compared = 0
    columns = (errors["timesteps"], errors["forget_train"]["before"], errors["forget_train"]["after"])
    for timestep, old, new in zip(*columns, strict=True):
        if timestep < 325:
            continue  # there the images of the bank lie too far apart
        timesteps, eps = torch.full((len(images),), timestep), standard_normal(images.shape, timestep)
        x_t = denoiser.schedule.add_noise(images, eps, timesteps)
        with torch.no_grad():
            prediction = denoiser.predict(x_t, timesteps)
        changed = prediction + unseen.change(x_t, timesteps)[0]
        told = float((changed - eps).square().mean() / (prediction - eps).square().mean())
        assert told == pytest.approx(new / old, abs=0.12), timestep
        compared += 1
    assert compared == 14
