"""One result, whatever instruction set, number of threads or cutting of the parameters it was computed with."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from operands import (
    BF16,
    CALLS,
    CONSTANTS,
    DTYPES,
    F16,
    F32,
    F64,
    LARGE,
    RULES,
    Operands,
    assert_same_bits,
    bits,
    instruction_set,
    needs_native,
    threads,
)
from torch import Tensor

from vdu_fast import _native, ops

pytestmark = needs_native

# Lengths of a list: empty, single and odd tensors, ends within a block, at its end and beyond a chunk of 16,384.
LENGTHS = (0, 1, 3, 255, 0, 256, 257, 1, 1000, 64, 0, 17_001, 2)


def isas() -> list[str]:
    from vdu_fast import _C_cpu

    return _C_cpu.available_isas()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_every_instruction_set_gives_the_same_bits_sums_included(name, dtype):
    for size in (1, 63, 1000):
        results = []
        for isa in isas():
            with instruction_set(isa):
                results.append(CALLS[name](Operands(size, dtype), 3))
        for other in results[1:]:
            assert_same_bits(results[0], other, sums=True)


def test_conversions_of_every_half_precision_number_agree_on_every_instruction_set():
    # All 65,536 of them in, and all neighbours and midpoints of float32 out: ties, subnormals, overflow, NaN.
    words = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (F16, BF16):
        values = words.view(dtype)
        wide = values.float()
        between = torch.cat(
            [wide, (wide.double() + wide.double().roll(-1)).div(2).float(), wide * (1 + 2e-7), wide * 1e-3]
        )
        one = torch.ones_like(between)
        for isa in isas():
            with instruction_set(isa):
                # center + prior_std z with z = 0 and prior_std = 0 is the value itself, stored in the dtype of `out`.
                got, back = torch.empty_like(between), torch.empty(len(between), dtype=dtype)
                ops.sample_whitened_weights_(back, between, one, one * 0, 0, noise_scale=0.0)
                ops.add_noise_gradient_(got[: 2**16].zero_(), values, 0, scale=0.0)
                single = torch.zeros(2**16)
                ops.welford_update_(single, torch.zeros(2**16), values, 1)
            assert torch.equal(torch.nan_to_num(back, nan=7.0), torch.nan_to_num(between.to(dtype), nan=7.0)), isa
            finite = wide.isfinite()
            assert torch.equal(single[finite], wide[finite]), isa
            assert not single[~finite].isfinite().any(), isa


def test_sums_of_a_million_have_the_same_bits_on_every_instruction_set_and_number_of_threads():
    for name in ("gaussian_kl", "variational_step_, natural_adam, learned std"):
        results = []
        for isa in isas():
            for number in (1, 2):
                with instruction_set(isa), threads(number):
                    results.append(CALLS[name](Operands(LARGE), 1))
        for other in results[1:]:
            assert_same_bits(results[0], other, sums=True)


@pytest.mark.parametrize("name", ["noise_prediction_loss, v", "noise_prediction_loss, v, small samples", "mix_noise"])
def test_batches_have_the_same_bits_for_any_number_of_threads(name):
    results = []
    for number in (1, 2):
        with threads(number):
            results.append(CALLS[name](Operands(50_001), 1))
    assert_same_bits(*results, sums=True)


def test_choosing_an_instruction_set_that_is_not_here_names_those_that_are():
    from vdu_fast import _C_cpu

    with pytest.raises(ValueError, match=f"isa must be one of {', '.join(isas())} on this machine, got sse9"):
        _C_cpu.choose_isa("sse9")
    assert _C_cpu.build_info()["isa"] == isas()[0]
    assert isas()[-1] == "baseline"


def flat(total: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Operands of every list op, flat."""
    make = Operands(total, dtype)
    state = {name: make(state=True) for name in ("center", "z", "log_std", "first", "std_first", "noise_grad", "sum")}
    state |= {name: make.positive(state=True) for name in ("prior_std", "second", "std_second")}
    return {"theta": make(), "grad": make(), **state}


def list_ops(t: dict[str, Tensor] | dict[str, list[Tensor]], offset: int, rule: str) -> list[Tensor]:
    """Run all of them over tensors or lists; the sums that they return."""
    moved = {name: t[name] for name in ("z", "first", "second", "log_std", "std_first", "std_second")}
    fixed = {name: t[name] for name in ("center", "prior_std")}
    norm = ops.variational_gradient_norm(t["grad"], t["z"], t["prior_std"], CONSTANTS, rule=rule)
    sums = ops.variational_step_(
        t["theta"], t["grad"], **fixed, **moved, constants=CONSTANTS, seed=3, draw=4, next_draw=5, rule=rule,
        offset=offset,
    )  # fmt: skip
    ops.add_noise_gradient_(t["sum"], t["grad"], 3, 6, offset=offset)
    ops.sample_weights_(t["noise_grad"], t["center"], t["log_std"], 3, 7, offset=offset)
    ops.sample_whitened_weights_(t["std_first"], **fixed, z=t["z"], seed=3, step=8, offset=offset)
    return [norm, sums]


def cut(whole: Tensor, *, unaligned: bool) -> list[Tensor]:
    """The same values as tensors of their own, each starting one element into its memory where `unaligned`."""
    parts = whole.split(LENGTHS)
    if not unaligned:
        return [part.clone() for part in parts]
    return [torch.cat([part[:1], part])[1:] if len(part) else part.clone() for part in parts]


@pytest.mark.parametrize("unaligned", [False, True], ids=["aligned", "x[1:]"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_a_list_a_flat_buffer_and_single_calls_give_the_same_bits(dtype, unaligned):
    rule, total = RULES[DTYPES.index(dtype)], sum(LENGTHS)
    for isa in isas():
        with instruction_set(isa):
            whole, before = flat(total, dtype), flat(total, dtype)
            sums = list_ops(whole, 2, rule)
            lists = {name: cut(tensor, unaligned=unaligned) for name, tensor in before.items()}
            sums_of_lists = list_ops(lists, 2, rule)
            single = {name: cut(tensor, unaligned=unaligned) for name, tensor in before.items()}
            starts = torch.tensor((0, *LENGTHS)).cumsum(0).tolist()
            for k, (start, _) in enumerate(pairwise(starts)):
                list_ops({name: tensors[k] for name, tensors in single.items()}, 2 + start, rule)
        for name, tensor in whole.items():
            assert torch.equal(bits(tensor), bits(torch.cat(lists[name]))), name
            assert torch.equal(bits(tensor), bits(torch.cat(single[name]))), name
        for one, other in zip(sums, sums_of_lists, strict=True):
            assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_list_numbers_its_elements_alike_on_every_backend(backend):
    with _native.use_backend(backend):
        whole = flat(sum(LENGTHS), F32)
        lists = {name: cut(tensor, unaligned=False) for name, tensor in whole.items()}
        list_ops(whole, 0, "adam")
        list_ops(lists, 0, "adam")
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat(lists[name])), name


def test_lists_in_parameter_shapes_and_flat_state_correspond_in_order():
    shapes = ((3, 5), (0,), (2, 3, 4), ())
    lengths = [torch.Size(shape).numel() for shape in shapes]
    for backend in ("cpu", "reference"):
        with _native.use_backend(backend):
            t = flat(sum(lengths), F32)
            shaped = [p.view(s).clone() for p, s in zip(t["theta"].split(lengths), shapes, strict=True)]
            state = {name: list(tensor.clone().split(lengths)) for name, tensor in t.items()}
            list_ops({**state, "theta": shaped}, 0, "natural_adam")
            list_ops(t, 0, "natural_adam")
        assert torch.equal(torch.cat([p.flatten() for p in shaped]), t["theta"])
        assert torch.equal(torch.cat(state["z"]), t["z"])


def test_a_list_of_nothing_does_nothing():
    for empty in ([], [torch.empty(0)], [torch.empty(0), torch.empty(3, 0)]):
        t = dict.fromkeys(flat(1, F32), empty)
        norm, sums = list_ops(t, 0, "natural")
        assert norm.tolist() == [0]
        assert sums.tolist() == [0, 0]


# More than goes around the caches (csrc/cpu/stream.h): 32 MiB of results.
@pytest.mark.parametrize(("size", "dtype"), [(2**23 + 300, F32), (2**22 + 300, F64)])
@pytest.mark.parametrize("start", [0, 1], ids=["aligned", "x[1:]"])
def test_results_that_go_around_the_caches_have_the_same_bits(size, dtype, start):
    mean = torch.linspace(-1, 1, size, dtype=dtype)
    log_std = torch.full((size,), -0.5, dtype=dtype)
    out = torch.full((start + size + 1,), 7.0, dtype=dtype)
    with threads(2):
        ops.sample_weights_(out[start:-1], mean, log_std, 5, offset=3)
    cuts = range(0, size, 2**21)
    pieces = [ops.sample_weights(mean[at:][: 2**21], log_std[at:][: 2**21], 5, offset=3 + at) for at in cuts]
    assert torch.equal(out[start:-1], torch.cat(pieces))
    assert out[-1] == 7  # and nothing beyond
    ops.sample_weights_(mean, mean, log_std, 5, offset=3)
    assert torch.equal(mean, out[start:-1])
