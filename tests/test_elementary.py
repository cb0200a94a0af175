"""exp and log as the kernels compute them: accurate everywhere, defined at the edges, the same in both languages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from operands import bits, needs_native
from torch import Tensor

from vdu_fast.elementary import exponential, natural_log, square_root

INF, NAN = math.inf, math.nan
LARGEST, SMALLEST, TINIEST = 3.4028234663852886e38, 1.1754943508222875e-38, 1.401298464324817e-45


def floats(first: float, last: float, number: int = 2**20) -> Tensor:
    """Evenly spaced in their bits, so that every exponent has its share; both ends positive or both negative."""
    ends = np.array([first, last], dtype=np.float32).view(np.int32)
    return torch.from_numpy(np.linspace(*ends, number).astype(np.int32).view(np.float32))


def error_in_ulps(got: Tensor, exact: np.ndarray) -> float:
    return float((np.abs(got.double().numpy() - exact) / np.spacing(np.abs(exact).astype(np.float32))).max())


# Measured over a fifth of all floats: 1.26 for exp (0.78 where the result is subnormal), 1.07 for log.
@pytest.mark.parametrize("domain", [(1e-30, 88.722), (-1e-30, -87.3), (-87.3, -103.9)])
def test_exp_is_within_1_3_units_in_the_last_place(domain):
    x = floats(*domain)
    assert error_in_ulps(exponential(x), np.exp(x.double().numpy())) < 1.3


@pytest.mark.parametrize("domain", [(SMALLEST, 0.99), (1.01, LARGEST), (0.99, 0.9999999), (1.0000001, 1.01)])
def test_log_is_within_1_1_units_in_the_last_place(domain):
    x = floats(*domain)
    assert error_in_ulps(natural_log(x), np.log(x.double().numpy())) < 1.1


def test_exp_at_its_edges():
    x = torch.tensor([0.0, -0.0, 89.0, 1e30, INF, -104.0, -1e30, -INF, NAN, TINIEST, -TINIEST])
    torch.testing.assert_close(exponential(x), torch.exp(x), rtol=0, atol=0, equal_nan=True)


def test_a_square_root_is_correctly_rounded():
    x = floats(TINIEST, LARGEST)
    assert np.array_equal(square_root(x).numpy(), np.sqrt(x.double().numpy()).astype(np.float32))


@needs_native
def test_exp_has_the_same_bits_in_both_languages():
    from vdu_fast import _C_cpu

    x = torch.cat([floats(*ends, 8000) for ends in ((1e-38, 90.0), (-1e-38, -106.0))])
    x = torch.cat([x, torch.tensor([0.0, -0.0, INF, -INF, 88.72283, 88.72284, -103.97, -103.98, 1e38, -1e38])])
    got = torch.tensor([_C_cpu.exponential(value) for value in x.tolist()], dtype=torch.float32)
    assert torch.equal(bits(got), bits(exponential(x)))
    assert math.isnan(_C_cpu.exponential(NAN))


@needs_native
def test_log_has_the_same_bits_in_both_languages():
    from vdu_fast import _C_cpu

    x = torch.cat([floats(SMALLEST, LARGEST, 16_000), floats(0.5, 2.0, 4000), torch.tensor([1.0])])
    got = torch.tensor([_C_cpu.natural_log(value) for value in x.tolist()], dtype=torch.float32)
    assert torch.equal(bits(got), bits(natural_log(x)))


@needs_native
def test_log_at_its_edges():
    from vdu_fast import _C_cpu

    edges = [(0.0, -INF), (-0.0, -INF), (1.0, 0.0), (INF, INF), (-1.0, NAN), (-INF, NAN), (NAN, NAN), (-TINIEST, NAN)]
    for x, exact in edges:
        got = _C_cpu.natural_log(x)
        assert got == exact or (math.isnan(got) and math.isnan(exact)), x
    # The reference is only asked for normal numbers; priors may hold others.
    subnormal = floats(TINIEST, SMALLEST, 5000)
    got = torch.tensor([_C_cpu.natural_log(value) for value in subnormal.tolist()], dtype=torch.float32)
    assert error_in_ulps(got, np.log(subnormal.double().numpy())) < 1.6
