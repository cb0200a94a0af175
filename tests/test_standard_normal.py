"""The noise as C++ draws it: known answers, every index, seed and step, and a named error for what cannot be drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import F64, bits, needs_native

from vdu_fast import _native, ops, rng
from vdu_fast.errors import InputError

VECTORS = json.loads((Path(__file__).parent / "data" / "philox4x32_10.json").read_text())["rows"]
INT64 = st.integers(-(2**63), 2**63 - 1)


@needs_native
@pytest.mark.parametrize("row", VECTORS, ids=lambda row: "-".join(f"{word:x}" for word in row["counter"]))
def test_philox_gives_the_known_answers(row):
    from vdu_fast import _C_cpu

    assert _C_cpu.philox4x32_10(row["counter"], row["key"]) == row["output"]


@needs_native
@given(group=st.integers(0, 2**62 - 1), seed=INT64, step=st.integers(0, 2**32 - 1), stream=st.sampled_from(rng.Stream))
def test_four_normals_are_those_of_the_definition(group, seed, step, stream):
    from vdu_fast import _C_cpu

    expected = rng.standard_normal(4, seed, step, stream=stream, offset=4 * group)
    assert torch.equal(torch.tensor(_C_cpu.four_normals(group, seed, step, int(stream))), expected)


@needs_native
@settings(max_examples=60)
@given(
    size=st.sampled_from([1, 2, 3, 5, 255, 256, 257, 600]),
    offset=st.one_of(
        *(st.integers(max(0, at - 300), at + 9) for at in (0, 2**31, 2**32, 2**34)), st.integers(0, 2**62)
    ),
    seed=INT64,
    step=INT64,
    stream=st.integers(0, 2**31),
)
def test_every_range_has_the_bits_of_the_definition(size, offset, seed, step, stream):
    got = ops.standard_normal(size, seed, step, stream=stream, offset=offset)
    assert torch.equal(bits(got), bits(rng.standard_normal(size, seed, step, stream=stream, offset=offset)))


@needs_native
@given(starts=st.lists(st.integers(0, 2**40), min_size=1, max_size=8), data=st.data())
def test_an_element_is_found_in_its_tensor_beyond_32_bits(starts, data):
    from vdu_fast import _C_cpu

    lengths = [*starts, 2**33, 0, 5]
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    element = data.draw(st.one_of(st.integers(0, ends[-1] - 1), st.sampled_from([e for e in ends if e < ends[-1]])))
    found = _C_cpu.tensor_of(ends, element)
    assert ends[found] <= element < ends[found + 1]  # so it is no empty tensor either


@needs_native
def test_a_seed_is_64_bits_whatever_their_sign():
    for seed in (2**63, 2**64 - 1, 2**63 + 2**40 + 5):
        assert torch.equal(ops.standard_normal(9, seed), ops.standard_normal(9, seed - 2**64))
        assert torch.equal(ops.standard_normal(9, seed), rng.standard_normal(9, seed))
    assert torch.equal(ops.standard_normal(9, torch.tensor(-5)), ops.standard_normal(9, 2**64 - 5))
    assert not torch.equal(ops.standard_normal(9, 3), ops.standard_normal(9, 3 + 2**32))


@needs_native
def test_a_step_counts_modulo_2_to_32():
    assert torch.equal(ops.standard_normal(9, 1, 7), ops.standard_normal(9, 1, 7 + 2**32))
    assert torch.equal(ops.standard_normal(9, 1, -1), ops.standard_normal(9, 1, 2**32 - 1))
    assert not torch.equal(ops.standard_normal(9, 1, 7), ops.standard_normal(9, 1, 8))


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "reference"])
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ops.standard_normal(3, 1.5), "seed must be an int of at most 64 bits or an int64 tensor .* got 1.5"),
        (lambda: ops.standard_normal(3, 2**64), "seed must be an int of at most 64 bits.* got 18446744073709551616"),
        (lambda: ops.standard_normal(3, -(2**63) - 1), "seed must be"),
        (lambda: ops.standard_normal(3, 1, "2"), "step must be an int .* got '2'"),
        (lambda: ops.standard_normal(3, torch.tensor(1.0)), r"seed must be an int or an int64 tensor .* torch.float32"),
        (lambda: ops.standard_normal(3, torch.tensor([1, 2])), r"seed must be .* one element, got torch.int64 \[2\]"),
        (lambda: ops.standard_normal(3, 1, offset=-1), "offset must be the index of the first element.* got -1"),
        (lambda: ops.sample_weights(torch.ones(2), torch.ones(2), 1, offset=-4), "offset must be"),
        (lambda: ops.standard_normal(3, 1, stream=-1), r"stream must be at least 0 and below 2\^32, got -1"),
        (lambda: ops.standard_normal(3, 1, stream=2**32), "stream must be"),
        (lambda: ops.standard_normal(3, 1, dtype=torch.int64), "dtype must be floating-point, got torch.int64"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_an_error_on_every_backend(backend, call, says):
    with _native.use_backend(backend), pytest.raises(InputError, match=says):
        call()


def chunks(total: int, size: int = 2**24):
    for start in range(0, total, size):
        yield start, min(size, total - start)


@needs_native
@pytest.mark.slow
def test_the_law_of_a_hundred_million_normals():
    total = 10**8
    # The bins of the law's own quantiles hold equal shares: the histogram is flat, and Kolmogorov-Smirnov reads off it.
    bins = 4096
    edges = torch.special.ndtri(torch.arange(1, bins, dtype=F64) / bins).float()
    counts, moments = torch.zeros(bins, dtype=F64), torch.zeros(4, dtype=F64)
    for start, size in chunks(total):
        x = ops.standard_normal(size, 2024, 1, offset=start)
        counts += torch.bincount(torch.bucketize(x, edges), minlength=bins)
        wide = x.double()
        square = wide * wide
        moments += torch.stack([wide.sum(), square.sum(), (square * wide).sum(), (square * square).sum()])
    # Five standard errors of each: var x = 1, var x^2 = 2, var x^3 = 15, var x^4 = 96.
    for moment, exact, variance in zip((moments / total).tolist(), (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(moment - exact) < 5 * math.sqrt(variance / total)
    distance = float(((counts.cumsum(0) / total) - torch.arange(1, bins + 1) / bins).abs().max())
    assert distance < 2.0 / math.sqrt(total)  # p = 7e-4
    chi_squared = float(((counts - total / bins) ** 2 / (total / bins)).sum())
    assert abs(chi_squared - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))


@needs_native
@pytest.mark.slow
def test_a_hundred_million_normals_know_nothing_of_one_another():
    total = 10**8
    base = {"seed": 8, "step": 5, "stream": 0, "offset": 0}
    others = {
        "stream": base | {"stream": 1},
        "step": base | {"step": 6},
        "seed": base | {"seed": 9},
        "high word of the seed": base | {"seed": 8 + 2**32},
        "high word of the index": base | {"offset": 2**34},
        **{f"lag {lag}": base | {"offset": lag} for lag in (1, 2, 3, 4, 5, 256, 16_384, 65_536)},
    }
    products = {name: torch.zeros(2, dtype=F64) for name in others}
    for start, size in chunks(total):
        x, *ys = (
            ops.standard_normal(
                size, where["seed"], where["step"], stream=where["stream"], offset=where["offset"] + start
            )
            for where in (base, *others.values())
        )
        for name, y in zip(others, ys, strict=True):
            # Squares share the radius if lanes or words are used twice; their variance is 2 each.
            squares = torch.dot(x * x - 1, y * y - 1) / 2
            products[name] += torch.stack([torch.dot(x, y), squares]).double()
    for name, sums in products.items():
        assert float(sums.abs().max()) / total < 5 / math.sqrt(total), name
