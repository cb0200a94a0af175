"""Distances between two sets of features beside the Frechet distance: KID, precision and recall, density and coverage.

A Frechet distance sees means and covariances, and falls as counts rise. The kernel distance is unbiased, and the others
tell apart what one number mixes: pictures that are not like any real one (precision, density), and real pictures that
nothing drawn is like (recall, coverage).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vdu_fast import rng
from vdu_fast.errors import InputError

# As in the papers: k = 3 for precision and recall, k = 5 for density and coverage.
PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5
LEAST_IMAGES = DENSITY_NEIGHBOURS + 1


@dataclass(frozen=True)
class NearestNeighbours:
    """How two sets of features lie among each other.

    Attributes:
        precision: share of the samples within the manifold of the reference (Kynkäänniemi et al. 2019), in [0, 1].
        recall: share of the reference within the manifold of the samples, in [0, 1].
        density: mean number of reference balls that hold a sample, over k (Naeem et al. 2020), at least 0; 1 where the
            two are alike.
        coverage: share of the reference balls that hold a sample, in [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float


def _check(samples: Tensor, reference: Tensor, least: int) -> None:
    for name, features in (("samples", samples), ("reference", reference)):
        if features.ndim != 2 or len(features) < least:
            raise InputError(
                f"{name}: got features of shape {list(features.shape)}; accepted is [N, F] with N of at least {least}. "
                "Give more images."
            )
        if not bool(features.isfinite().all()):
            raise InputError(
                f"{name}: features hold NaN or infinity; only finite images have a distance. Check the model."
            )


def kernel_distance(
    samples: Tensor, reference: Tensor, *, subsets: int = 100, subset_size: int = 250, seed: int = 0
) -> float:
    """Squared maximum mean discrepancy under the kernel (x . y / F + 1)^3 (Binkowski et al. 2018, "KID" on Inception).

    The unbiased estimate, averaged over random subsets of equal size; below zero by chance where the two are alike.

    Args:
        samples: features of generated images, [N, F]; computed in float64.
        reference: features of real images, [M, F].
        subsets: how many are averaged.
        subset_size: images of each set in a subset; fewer where there are fewer.
        seed: of the choice.

    Raises:
        InputError: fewer than two of either, or values that are not finite.
    """
    from torchmetrics.image.kid import poly_mmd

    _check(samples, reference, 2)
    size, total = min(subset_size, len(samples), len(reference)), 0.0
    sets = samples.double(), reference.double()
    for number in range(subsets):
        chosen = [
            features[rng.permutation(len(features), seed, 2 * number + side, stream=rng.Stream.SPLIT)[:size]]
            for side, features in enumerate(sets)
        ]
        total += float(poly_mmd(chosen[1], chosen[0]))
    return total / subsets


def nearest_neighbours(samples: Tensor, reference: Tensor) -> NearestNeighbours:
    """Precision, recall, density and coverage in Euclidean distance.

    The manifold of a set is the union of the balls around its points that reach to the k-th nearest other point.

    Args:
        samples: features of generated images, [N, F]; computed in float64.
        reference: features of real images, [M, F].

    Raises:
        InputError: fewer than 6 of either, or values that are not finite.
    """
    _check(samples, reference, LEAST_IMAGES)
    samples, reference = samples.double().cpu(), reference.double().cpu()
    of_reference = _radii(reference)
    precise, counts, held = [], [], torch.zeros(len(reference), dtype=torch.bool)
    own, of_samples = torch.zeros(len(reference), dtype=torch.bool), _radii(samples)[PRECISION_NEIGHBOURS]
    # In parts: ten thousand against ten thousand would take 800 MB at once.
    for chunk, radius in zip(samples.split(1000), of_samples.split(1000), strict=True):
        distance = torch.cdist(chunk, reference)
        precise.append((distance <= of_reference[PRECISION_NEIGHBOURS]).any(dim=1))
        own |= (distance <= radius[:, None]).any(dim=0)
        inside = distance <= of_reference[DENSITY_NEIGHBOURS]
        counts.append(inside.sum(dim=1))
        held |= inside.any(dim=0)
    return NearestNeighbours(
        precision=float(torch.cat(precise).double().mean()),
        recall=float(own.double().mean()),
        density=float(torch.cat(counts).double().mean()) / DENSITY_NEIGHBOURS,
        coverage=float(held.double().mean()),
    )


def _radii(features: Tensor) -> dict[int, Tensor]:
    """Distance of every point to its k-th nearest other point, for the two k, each float64 [N]."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=DENSITY_NEIGHBOURS).fit(features.numpy())
    distances = torch.from_numpy(search.kneighbors()[0])  # without arguments a point is no neighbour of its own
    return {k: distances[:, k - 1] for k in (PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS)}
