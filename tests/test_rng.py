"""The noise is a fixed function of (seed, stream, step, index): these tests hold its bits, its values and its laws."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdu_fast.rng import (
    Stream,
    batch_indices,
    permutation,
    philox4x32_10,
    randint,
    random_words,
    standard_normal,
)

VECTORS = json.loads((Path(__file__).parent / "data" / "philox4x32_10.json").read_text())["rows"]
WORD = 2**32 - 1
MILLION = 1_000_000


def philox_in_python_integers(counter: list[int], key: list[int]) -> list[int]:
    """The definition in integers that cannot overflow, for what is not in the table."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def expected_word(index: int, seed: int, step: int, stream: int) -> int:
    group, lane = divmod(index, 4)
    counter = [group & WORD, group >> 32 & WORD, stream, step & WORD]
    return philox_in_python_integers(counter, [seed & WORD, seed >> 32 & WORD])[lane]


def box_muller_float64(words: torch.Tensor) -> np.ndarray:
    """The normals of groups of four words, by the library's logarithm, sine and cosine in float64."""
    r = words.reshape(-1, 4).numpy()

    def pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        radius = np.sqrt(-2 * np.log(((a >> 9) + 0.5) * 2.0**-23))
        angle = 2 * np.pi * ((b >> 8) - 2.0**21) / 2**24
        return radius * np.cos(angle), radius * np.sin(angle)

    return np.stack([*pair(r[:, 0], r[:, 1]), *pair(r[:, 2], r[:, 3])], axis=1).reshape(-1)


@pytest.mark.parametrize("row", VECTORS, ids=lambda row: "-".join(f"{word:x}" for word in row["counter"]))
def test_philox_gives_the_known_answers(row):
    counter = tuple(torch.tensor([word]) for word in row["counter"])
    assert [int(word) for word in philox4x32_10(counter, tuple(row["key"]))] == row["output"]


def test_the_known_answers_are_six():
    assert len(VECTORS) == 6  # a shortened table would pass the test above


@given(
    index=st.integers(0, 2**62),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**40),
    stream=st.sampled_from(Stream),
)
def test_words_follow_the_counter_layout_for_every_index_seed_and_step(index, seed, step, stream):
    word = random_words(1, seed, step, stream=stream, offset=index)
    assert int(word) == expected_word(index, seed, step, stream)


def test_an_index_beyond_2_to_34_uses_the_high_word_of_the_counter():
    index = 2**34 + 5
    assert int(random_words(1, 7, offset=index)) == expected_word(index, 7, 0, 0)
    # Without the high word, index 2^34 + 5 would repeat index 5.
    assert int(random_words(1, 7, offset=index)) != int(random_words(1, 7, offset=5))


def test_a_seed_of_64_bits_is_used_whole():
    low, high = random_words(64, 3), random_words(64, 3 + (1 << 32))
    assert (low != high).all()


def test_a_seed_tensor_draws_the_same_as_its_integer():
    seed, step = 2**40 + 17, 12
    as_tensors = standard_normal(100, torch.tensor(seed), torch.tensor(step))
    assert torch.equal(as_tensors, standard_normal(100, seed, step))


@settings(max_examples=60)
@given(offset=st.integers(0, 40), sizes=st.lists(st.integers(0, 17), min_size=1, max_size=6))
def test_bits_do_not_depend_on_how_a_range_is_cut(offset, sizes):
    whole = standard_normal(sum(sizes), 11, 2, offset=offset)
    starts = [offset + sum(sizes[:i]) for i in range(len(sizes))]
    parts = [standard_normal(size, 11, 2, offset=start) for start, size in zip(starts, sizes, strict=True)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(whole, standard_normal(offset + sum(sizes), 11, 2)[offset:])


def test_the_shape_only_folds_the_flat_draw():
    assert torch.equal(standard_normal((3, 5, 7), 1).flatten(), standard_normal(105, 1))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2)])
def test_an_empty_shape_draws_nothing(shape):
    assert standard_normal(shape, 0).shape == shape
    assert random_words(0, 0).shape == (0,)


def test_every_dtype_sees_the_same_noise():
    noise = standard_normal(1000, 5)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(standard_normal(1000, 5, dtype=dtype), noise.to(dtype))


def test_normals_are_box_muller_to_a_millionth():
    normals = standard_normal(MILLION, 2024, 3, stream=Stream.SAMPLER)
    exact = box_muller_float64(random_words(MILLION, 2024, 3, stream=Stream.SAMPLER))
    assert np.abs(normals.numpy() - exact).max() < 1e-6


def test_the_bits_of_the_normals_are_frozen():
    # Every backend has to give these, so a change of formula that no tolerance shows is still a change.
    normals = standard_normal(100_000, 2024, 3, stream=Stream.SAMPLER)
    digest = hashlib.sha256(normals.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "f280f18566ee912bd8301fcd26d7dd45625cc91da7dc50ac4e696de1490d7532"


@pytest.mark.parametrize("first", [0, 1 << 9, WORD - 511, WORD])
@pytest.mark.parametrize("second", [0, WORD, 1 << 30, (1 << 30) - 1, 1 << 31, 3 << 30, 0x3FFFFFFF, 0xBFFFFFFF])
def test_normals_hold_at_the_edges_of_radius_and_angle(monkeypatch, first, second):
    # The extremes of u and the seams between quadrants: random draws hardly ever land there.
    words = [torch.tensor([first]), torch.tensor([second])] * 2
    monkeypatch.setattr("vdu_fast.rng.philox4x32_10", lambda counter, key: tuple(words))
    normals = standard_normal(4, 0).numpy()
    assert np.isfinite(normals).all()
    assert np.abs(normals - box_muller_float64(torch.cat(words))).max() < 1e-6


def test_the_moments_of_a_million_normals_are_those_of_the_law():
    x = standard_normal(MILLION, 99).double()
    # Five standard errors of each: var x = 1, var x^2 = 2, var x^3 = 15, var x^4 = 96.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - moment) < 5 * math.sqrt(variance / MILLION)


def test_a_million_normals_pass_kolmogorov_smirnov():
    from scipy.stats import kstest

    assert kstest(standard_normal(MILLION, 4, 1).double().numpy(), "norm").pvalue > 1e-3


def test_draws_of_neighbours_streams_steps_and_seeds_are_uncorrelated():
    base = standard_normal(MILLION, 8, 5, stream=0).double()
    others = {
        "stream": standard_normal(MILLION, 8, 5, stream=1),
        "step": standard_normal(MILLION, 8, 6, stream=0),
        "seed": standard_normal(MILLION, 9, 5, stream=0),
        "high seed word": standard_normal(MILLION, 8 + (1 << 32), 5, stream=0),
    }
    others |= {f"lag {lag}": standard_normal(MILLION, 8, 5, stream=0, offset=lag) for lag in (1, 2, 3, 4, 64, 65536)}
    bound = 5 / math.sqrt(MILLION)
    for name, other in others.items():
        other = other.double()
        assert abs(float((base * other).mean())) < bound, name
        # Squares share the radius if lanes or words are reused where they should not be; their variance is 2 each.
        assert abs(float(((base**2 - 1) * (other**2 - 1)).mean())) < 2 * bound, name


@settings(max_examples=60)
@given(low=st.integers(-100, 100), span=st.integers(1, 2**31), step=st.integers(0, 1000))
def test_randint_stays_in_its_bounds(low, span, step):
    values = randint(low + span, 50, 1, step, low=low)
    assert values.dtype == torch.int64
    assert int(values.min()) >= low
    assert int(values.max()) < low + span


def test_randint_scales_the_word_to_the_range():
    words = random_words(1000, 5, 2, stream=3)
    expected = torch.tensor([-4 + (int(word) * 21 >> 32) for word in words])
    assert torch.equal(randint(17, 1000, 5, 2, low=-4, stream=3), expected)


def test_randint_is_uniform():
    counts = torch.bincount(randint(17, MILLION, 3, low=7) - 7, minlength=10).double()
    expected = MILLION / 10
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert len(counts) == 10
    assert chi_squared < 27.9  # 99.9% quantile for 9 degrees of freedom


@pytest.mark.parametrize(("low", "high"), [(0, 0), (5, 5), (5, 4), (0, 2**31 + 1)])
def test_randint_refuses_an_empty_or_too_wide_range(low, high):
    with pytest.raises(ValueError, match=f"low={low}, high={high}"):
        randint(high, 3, 0, low=low)


def test_a_permutation_holds_every_index_once_and_differs_by_step_and_seed():
    orders = [permutation(100, seed, step) for seed in (0, 1) for step in (0, 1)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(100))
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(permutation(100, torch.tensor(1), torch.tensor(1)), orders[3])


def test_changing_a_permutation_in_place_does_not_change_the_next_one():
    first = permutation(10, 6)
    expected = first.clone()
    first.zero_()
    assert torch.equal(permutation(10, 6), expected)


@settings(max_examples=60)
@given(n=st.integers(1, 23), batch_size=st.integers(1, 60), seed=st.integers(0, 5))
def test_batches_cover_every_epoch_exactly(n, batch_size, seed):
    steps = math.lcm(n, batch_size) // batch_size
    batches = [batch_indices(n, batch_size, step, seed) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    for epoch, rows in enumerate(torch.cat(batches).split(n)):
        assert torch.equal(rows.sort().values, torch.arange(n)), f"epoch {epoch}"


def test_epochs_are_shuffled_anew():
    first, second = batch_indices(50, 50, 0, 3), batch_indices(50, 50, 1, 3)
    assert not torch.equal(first, second)


def test_stream_numbers_are_frozen():
    # They are part of the noise: renumbering one would change every stored bank and every resumed run.
    frozen = {
        "WEIGHTS": 0,
        "IMAGE_NOISE": 1,
        "TIMESTEPS": 2,
        "BATCH": 3,
        "SAMPLER": 4,
        "REPLAY_NOISE": 5,
        "REPLAY_BATCH": 6,
        "FISHER": 7,
        "PROBE": 8,
        "SPLIT": 9,
        "BANK": 10,
        "SWEEP": 11,
        "REPLAY_FOCUS": 12,
    }
    assert frozen.items() <= {stream.name: int(stream) for stream in Stream}.items()
    assert len({int(stream) for stream in Stream}) == len(Stream.__members__)
