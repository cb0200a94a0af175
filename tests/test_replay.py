"""The bank holds states that the old model really went through, with what it really predicted there."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from tiny import build_pipeline, build_tiny

from vdu_fast import replay
from vdu_fast.errors import InputError
from vdu_fast.pipelines import Denoiser, denoiser_of
from vdu_fast.replay import ReplayBank, bank_bytes, build_bank, check_memory
from vdu_fast.rng import Stream, standard_normal
from vdu_fast.sampling import sample_images

SHAPE = (1, 8, 8)
FIELDS = ("images", "x_t", "timesteps", "predictions")


def denoiser_for(kind: str) -> Denoiser:
    if kind == "velocity":
        return Denoiser(build_tiny(), FlowMatchEulerDiscreteScheduler(50), SHAPE)
    return denoiser_of(build_pipeline(kind))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "velocity"])
def test_the_old_model_predicts_again_what_the_bank_says(kind):
    denoiser = denoiser_for(kind)
    bank = build_bank(denoiser, 4, sampler_steps=12, states=3, seed=1, batch_size=3)
    with denoiser.evaluating():
        again = denoiser.predict(bank.x_t.flatten(0, 1), bank.timesteps.flatten())
    torch.testing.assert_close(again, bank.predictions.flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert float(bank.predictions.std()) > 1e-3


@pytest.mark.parametrize("kind", ["epsilon", "velocity"])
def test_states_are_on_the_trajectory_of_their_image(kind):
    denoiser = denoiser_for(kind)
    bank = build_bank(denoiser, 5, sampler_steps=12, states=4, seed=1, batch_size=2)
    trajectories: dict[tuple[int, int], torch.Tensor] = {}

    def remember(rows, timesteps, x_t, prediction):
        for i, t in enumerate(timesteps.tolist()):
            trajectories[rows.start + i, t] = x_t[i].clone()

    images = sample_images(denoiser, 5, steps=12, seed=1, batch_size=2, stream=Stream.BANK, observer=remember)
    assert torch.equal(bank.images, images)
    for i in range(5):
        for s in range(4):
            assert torch.equal(bank.x_t[i, s], trajectories[i, int(bank.timesteps[i, s])])


def test_one_state_is_kept_of_every_stretch_and_not_always_the_same(tiny_denoiser):
    bank = build_bank(tiny_denoiser, 200, sampler_steps=10, states=5)
    assert (bank.timesteps.diff(dim=1) < 0).all()  # sampling runs down the timesteps
    # Sampler steps 0..9 of 50 timesteps are 45, 40, ..., 0; stretch s holds steps 2 s and 2 s + 1.
    for s in range(5):
        assert set(bank.timesteps[:, s].tolist()) == {45 - 10 * s, 40 - 10 * s}
        assert 60 < int((bank.timesteps[:, s] == 45 - 10 * s).sum()) < 140


def test_a_bank_does_not_start_from_the_noise_that_an_evaluation_of_the_same_seed_starts_from(tiny_denoiser):
    bank = build_bank(tiny_denoiser, 3, sampler_steps=5, states=5, seed=7)
    assert torch.equal(bank.x_t[:, 0], standard_normal((3, *SHAPE), 7, stream=Stream.BANK))
    drawn = sample_images(tiny_denoiser, 3, steps=5, seed=7)
    assert all(not torch.equal(a, b) for a in bank.images for b in drawn)


def test_keeping_every_state_is_allowed(tiny_denoiser):
    bank = build_bank(tiny_denoiser, 2, sampler_steps=5, states=5)
    assert bank.timesteps.tolist() == [[40, 30, 20, 10, 0]] * 2


def test_a_bank_can_be_drawn_in_parts(tiny_denoiser):
    whole = build_bank(tiny_denoiser, 6, sampler_steps=6, states=3, seed=4)
    first = build_bank(tiny_denoiser, 2, sampler_steps=6, states=3, seed=4)
    rest = build_bank(tiny_denoiser, 4, sampler_steps=6, states=3, seed=4, first=2, batch_size=3)
    for name in FIELDS:
        parts = torch.cat([getattr(first, name), getattr(rest, name)])
        torch.testing.assert_close(parts, getattr(whole, name), rtol=1e-4, atol=1e-5)


def test_the_size_of_a_bank_is_known_before_it_is_drawn(tiny_denoiser):
    bank = build_bank(tiny_denoiser, 3, sampler_steps=5, states=2)
    assert bank_bytes(SHAPE, 3, 2) == sum(t.nbytes for t in (bank.images, bank.x_t, bank.predictions))


GIB = 2**30
LARGE = (3, 256, 256), 1000, 10  # 15.4 GiB


@pytest.mark.parametrize("free", [15 * GIB, 0])
def test_a_bank_that_cannot_fit_is_refused_with_what_lowers_it(monkeypatch, free):
    monkeypatch.setattr(replay, "available_memory", lambda: free)
    says = r"1000 images \(3, 256, 256\) with 10 states each takes 15\.4 GiB.*--replay_samples.*--replay_states"
    with pytest.raises(InputError, match=says):
        check_memory(*LARGE)


@pytest.mark.parametrize(("free", "warned"), [(16 * GIB, True), (31 * GIB, False), (None, False)])
def test_a_bank_that_may_not_fit_twice_is_warned_of(monkeypatch, caplog, free, warned):
    monkeypatch.setattr(replay, "available_memory", lambda: free)
    check_memory(*LARGE)
    assert ["15.4 GiB" in record.getMessage() for record in caplog.records] == [True] * warned


def test_guiding_a_bank_takes_half_of_it_more(monkeypatch, caplog):
    monkeypatch.setattr(replay, "available_memory", lambda: 31 * GIB)
    check_memory(*LARGE, guided=True)
    assert "15.4 GiB of memory, up to 2.5 times that" in caplog.text


@pytest.mark.parametrize("states", [0, 6])
def test_more_states_than_steps_are_refused(tiny_denoiser, states):
    with pytest.raises(InputError, match=f"replay_states must be between 1 and the 5 sampler steps, got {states}"):
        build_bank(tiny_denoiser, 2, sampler_steps=5, states=states)


def numbered_bank(count: int = 7, states: int = 3, likeness: torch.Tensor | None = None) -> ReplayBank:
    """A bank whose values say where they come from: image i, state s is 10 i + s."""
    value = (torch.arange(count)[:, None] * 10 + torch.arange(states)).float()
    x_t = value[..., None, None, None].expand(count, states, *SHAPE).clone()
    images = torch.arange(count).float()[:, None, None, None].expand(count, *SHAPE).clone()
    return ReplayBank(images, x_t, value.long(), -x_t, {"model": "none"}, likeness)


def test_a_batch_keeps_state_timestep_and_prediction_together():
    x_t, timesteps, predictions = numbered_bank().batch(20, 3, 1)
    assert torch.equal(x_t[:, 0, 0, 0].long(), timesteps)
    assert torch.equal(predictions, -x_t)


def test_batches_use_every_trajectory_once_before_any_again():
    bank = numbered_bank()
    rows = torch.cat([bank.batch(2, step, 5)[1] // 10 for step in range(7)])
    for epoch in rows.split(7):
        assert sorted(epoch.tolist()) == list(range(7))


def test_batches_use_all_states_evenly():
    states = torch.cat([numbered_bank().batch(10, step, 5)[1] % 10 for step in range(300)])
    counts = torch.bincount(states, minlength=3)
    assert len(counts) == 3
    assert (counts - 1000).abs().max() < 5 * (3000 * 2 / 9) ** 0.5


def test_batches_are_a_function_of_seed_and_step():
    bank = numbered_bank()
    assert torch.equal(bank.batch(5, 2, 1)[1], bank.batch(5, 2, 1)[1])
    assert not torch.equal(bank.batch(5, 2, 1)[1], bank.batch(5, 3, 1)[1])
    assert not torch.equal(bank.batch(5, 2, 1)[1], bank.batch(5, 2, 2)[1])


def test_keep_takes_whole_trajectories_and_leaves_the_bank():
    bank = numbered_bank()
    kept = bank.keep(torch.tensor([True, False, False, True, False, False, True]))
    assert len(kept) == 3
    assert len(bank) == 7
    assert (kept.timesteps // 10)[:, 0].tolist() == [0, 3, 6]
    assert torch.equal(kept.images[:, 0, 0, 0], torch.tensor([0.0, 3.0, 6.0]))
    kept.made_from["model"] = "other"
    assert bank.made_from["model"] == "none"


def test_a_bank_comes_back_as_saved(tiny_denoiser, tmp_path):
    bank = build_bank(tiny_denoiser, 3, sampler_steps=5, states=2)
    bank.save(tmp_path / "bank.safetensors")
    loaded = ReplayBank.load(tmp_path / "bank.safetensors")
    assert loaded.made_from == bank.made_from
    for name in FIELDS:
        assert torch.equal(getattr(loaded, name), getattr(bank, name))
    loaded.check_fits(tiny_denoiser)


def test_a_bank_of_another_model_is_refused(tiny_denoiser):
    bank = build_bank(tiny_denoiser, 2, sampler_steps=5, states=2)
    with torch.no_grad():
        tiny_denoiser.module.time.bias[0] += 1e-6
    with pytest.raises(InputError, match=r"old\.bank was drawn from a model with other weights.*name another file"):
        bank.check_fits(tiny_denoiser, "old.bank")


def test_a_file_that_is_no_bank_is_refused(tmp_path):
    save_file({"images": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors is not a replay bank; remove it or name another"):
        ReplayBank.load(tmp_path / "x.safetensors")


class TestFocus:
    """A share of a batch comes from the quarter of the bank that is most like what must go."""

    LIKENESS = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2, 0.0, 0.4, 0.5])

    def images(self, step: int, focus: float, likeness: torch.Tensor | None = LIKENESS) -> torch.Tensor:
        bank = numbered_bank(8, likeness=likeness)
        x_t, timesteps, predictions = bank.batch(8, step, 5, focus=focus)
        assert torch.equal(predictions, -x_t)
        assert torch.equal(x_t[:, 0, 0, 0].long(), timesteps)
        return timesteps // 10

    def test_the_nearest_quarter_is_that_of_the_greatest_likeness(self):
        assert numbered_bank(8, likeness=self.LIKENESS).nearest.tolist() == [1, 3]
        assert numbered_bank(5, likeness=self.LIKENESS[:5]).nearest.tolist() == [1, 3]  # never fewer than a quarter

    @pytest.mark.parametrize(("focus", "near"), [(0.0, 0), (0.5, 4), (0.6, 5), (1.0, 8)])
    def test_the_share_comes_from_the_nearest_and_the_rest_from_all(self, focus, near):
        batches = torch.stack([self.images(step, focus) for step in range(8)])
        chosen, rest = batches[:, 8 - near :], batches[:, : 8 - near]
        assert set(chosen.flatten().tolist()) <= {1, 3}
        assert chosen.eq(1).sum() == chosen.eq(3).sum()  # all of them once before any comes again
        if near < 8:
            assert set(rest.flatten().tolist()) == set(range(8))

    def test_without_focus_or_likeness_all_are_alike(self):
        plain = numbered_bank(8).batch(8, 3, 5)[1] // 10
        assert torch.equal(self.images(3, 0.0), plain)
        assert torch.equal(self.images(3, 0.5, likeness=None), plain)
        assert sorted(plain.tolist()) == list(range(8))

    def test_what_is_kept_keeps_its_likeness(self):
        kept = numbered_bank(8, likeness=self.LIKENESS).keep(self.LIKENESS < 0.85)
        assert torch.equal(kept.likeness, self.LIKENESS[self.LIKENESS < 0.85])
        assert kept.images[kept.nearest].flatten(1)[:, 0].tolist() == [3.0, 7.0]

    def test_a_saved_bank_has_no_likeness_for_it_serves_every_request(self, tmp_path):
        numbered_bank(8, likeness=self.LIKENESS).save(tmp_path / "bank.safetensors")
        assert ReplayBank.load(tmp_path / "bank.safetensors").likeness is None
