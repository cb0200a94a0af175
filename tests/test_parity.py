"""The C++ ops against the reference: in float32 the same bits element by element, in every dtype close to float64."""

from __future__ import annotations

import pytest
import torch
from operands import (
    BF16,
    CALLS,
    DTYPES,
    F16,
    F32,
    F64,
    LARGE,
    OFFSETS,
    SIZES,
    Operands,
    assert_same_bits,
    needs_native,
)

from vdu_fast import _native

pytestmark = needs_native

# Of the largest element: the rounding of the result, and that of the float32 computation before it.
TOLERANCE = {F64: 1e-13, F32: 3e-6, BF16: 2**-8, F16: 2**-10}


def under(backend: str, name: str, make: Operands, offset: int = 0):
    with _native.use_backend(backend):
        return CALLS[name](make, offset)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("name", CALLS)
def test_every_element_has_the_bits_of_the_reference(name, dtype):
    for size in SIZES:
        for offset in OFFSETS if size in (3, 63) else (0, 3):
            got = under("cpu", name, Operands(size, dtype), offset)
            assert_same_bits(got, under("reference", name, Operands(size, dtype), offset), sums=False)


@pytest.mark.parametrize(
    "name", ["standard_normal", "sample_weights", "gaussian_kl", "variational_step_, adam, learned std"]
)
def test_a_million_elements_have_the_bits_of_the_reference(name):
    # Enough for every branch of the polynomials, and for a size that is a multiple of nothing.
    got = under("cpu", name, Operands(LARGE), 1)
    expected = under("reference", name, Operands(LARGE), 1)
    for sum in [key for key in expected if key.startswith("sum")]:
        torch.testing.assert_close(got.pop(sum).double(), expected.pop(sum).double(), rtol=1e-5, atol=0)
    assert_same_bits(got, expected, sums=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_float64(name, dtype):
    for size in SIZES:
        got = under("cpu", name, Operands(size, dtype), 5)
        exact = under("reference", name, Operands(size, dtype, exact=True), 5)
        for key, value in got.items():
            # What is computed in float32 or more is judged by that; only what is stored narrowly has its rounding.
            largest = float(exact[key].abs().max()) if exact[key].numel() else 0.0
            torch.testing.assert_close(
                value.double(),
                exact[key],
                rtol=TOLERANCE[value.dtype] if not key.startswith("sum") or dtype == F64 else 1e-5,
                atol=max(TOLERANCE[F64 if dtype == F64 else F32] * largest, 2.0**-24 * (value.dtype == F16)),
                msg=lambda text, key=key, size=size: f"{key} of {size}: {text}",
            )


def test_float64_elements_differ_from_the_reference_by_library_functions_alone():
    # Without exp, log and torch's sqrt there is nothing that may round differently.
    for name in ("standard_normal", "mix_noise", "quadratic_penalty", "variational_step_, natural", "welford_update_"):
        got, expected = (under(backend, name, Operands(1000, F64), 3) for backend in ("cpu", "reference"))
        assert_same_bits(got, expected, sums=False)


def test_a_table_that_compares_nothing_would_be_noticed():
    changed = under("cpu", "variational_step_, adam", Operands(63), 0)
    other = under("cpu", "variational_step_, adam", Operands(63), 1)
    assert torch.equal(changed["z"], other["z"])
    with pytest.raises(AssertionError, match="theta"):
        assert_same_bits(changed, other, sums=True)
