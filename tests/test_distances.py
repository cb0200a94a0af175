"""Distances on sets whose answer is known by counting or in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vdu_fast.distances import kernel_distance, nearest_neighbours
from vdu_fast.errors import InputError


def line(*positions: float) -> Tensor:
    return torch.tensor(positions, dtype=torch.float64)[:, None]


def normal(count: int, features: int = 8, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=generator, dtype=torch.float64) + shift


def direct_mmd(samples: Tensor, reference: Tensor) -> float:
    """The unbiased estimate by double loops over (Binkowski et al. 2018, eq. 4)."""

    def mean_kernel(a: Tensor, b: Tensor, *, same: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return math.fsum((float(a[i] @ b[j]) / a.shape[1] + 1) ** 3 for i, j in pairs) / len(pairs)

    cross = mean_kernel(samples, reference, same=False)
    return mean_kernel(samples, samples, same=True) + mean_kernel(reference, reference, same=True) - 2 * cross


class TestKernelDistance:
    def test_it_is_the_unbiased_estimate_where_a_subset_is_everything(self):
        samples, reference = normal(7), normal(7, seed=1, shift=0.4)
        expected = direct_mmd(samples, reference)
        assert kernel_distance(samples, reference, subsets=3) == pytest.approx(expected, rel=1e-10)

    def test_it_is_zero_on_average_for_equal_distributions(self):
        values = torch.tensor(
            [kernel_distance(normal(60, seed=2 * i), normal(60, seed=2 * i + 1), subsets=5) for i in range(40)]
        )
        assert values.min() < 0 < values.max()
        assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))

    def test_it_grows_with_the_shift_and_barely_depends_on_the_count(self):
        reference = normal(400)
        near, far = (kernel_distance(normal(400, seed=3, shift=s), reference, subset_size=100) for s in (0.3, 0.6))
        assert 0 < near < far
        few = kernel_distance(normal(100, seed=3, shift=0.6), reference, subset_size=100)
        assert few == pytest.approx(far, rel=0.35)

    def test_the_seed_decides_the_subsets_and_the_global_state_is_left_alone(self):
        samples, reference, state = normal(50), normal(50, seed=1), torch.get_rng_state()
        first = kernel_distance(samples, reference, subsets=4, subset_size=20, seed=1)
        assert first == kernel_distance(samples, reference, subsets=4, subset_size=20, seed=1)
        assert first != kernel_distance(samples, reference, subsets=4, subset_size=20, seed=2)
        assert torch.equal(torch.get_rng_state(), state)


class TestNearestNeighbours:
    def test_counted_by_hand(self):
        # k = 3: every reference ball reaches 3 to the middle, k = 5: to 5; the ends reach less far only inwards.
        reference = line(0, 1, 2, 3, 4, 5)
        samples = line(0.5, 2.5, 100, 101, 102, 103)
        found = nearest_neighbours(samples, reference)
        assert found.precision == pytest.approx(2 / 6)
        # The third nearest other sample of 0.5 is at 101: its ball holds every reference point.
        assert found.recall == 1
        # Balls of radius 5, 4, 3, 3, 4, 5 around 0 .. 5: all six hold 2.5; of 0.5, those around 0, 1, 2, 3, 4 and 5.
        assert found.density == pytest.approx((6 + 6) / (6 * 5))
        assert found.coverage == 1

    def test_equal_sets(self):
        points = normal(200)
        found = nearest_neighbours(points, points)
        assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
        assert found.density > 1  # a point lies in its own ball besides those of its neighbours

    def test_equal_distributions_have_density_and_coverage_near_their_expectation(self):
        found = nearest_neighbours(normal(800, 4), normal(800, 4, seed=1))
        assert found.density == pytest.approx(1, abs=0.1)
        # Naeem et al. 2020: 1 - (1/2)^k for equal and large counts.
        assert found.coverage == pytest.approx(1 - 0.5**5, abs=0.03)

    def test_a_mode_that_is_not_drawn_costs_recall_and_coverage_alone(self):
        both = torch.cat([normal(200), normal(200, seed=1, shift=30)])
        found = nearest_neighbours(normal(200, seed=2), both)
        assert found.precision > 0.8
        assert found.recall < 0.55
        assert found.coverage < 0.55

    def test_pictures_unlike_any_real_one_cost_precision_and_density_alone(self):
        drawn = torch.cat([normal(200, seed=2), normal(200, seed=3, shift=30)])
        found = nearest_neighbours(drawn, normal(200))
        assert found.precision < 0.55
        assert found.density < 0.6
        assert found.coverage > 0.9

    def test_parts_do_not_change_the_result(self):
        samples, reference = normal(1300, 3), normal(40, 3, seed=1, shift=0.5)
        found = nearest_neighbours(samples, reference)
        distance = torch.cdist(samples, reference)
        radius = torch.cdist(reference, reference).sort(dim=1).values[:, 3]
        assert found.precision == pytest.approx(float((distance <= radius).any(dim=1).double().mean()))


def test_bad_input():
    with pytest.raises(InputError, match=r"samples: got features of shape \[1, 8\].*at least 2"):
        kernel_distance(normal(1), normal(9))
    with pytest.raises(InputError, match=r"reference: got features of shape \[5, 8\].*at least 6"):
        nearest_neighbours(normal(9), normal(5))
    with pytest.raises(InputError, match="samples: features hold NaN"):
        nearest_neighbours(normal(9) * math.nan, normal(9))
