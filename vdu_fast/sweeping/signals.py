"""How much was forgotten and how much was kept, told without retained data and without a classifier.

Both are read off features of the *original* network's middle block, which no unlearning changes.

- Forgotten: the positive-unlabelled regression of `vdu_fast.filters`, forget images against what the original model
  draws, scores fresh samples. One that scores at least the `LOW` quantile of the held-out forget images counts as
  forgotten, and the estimated PUL compares the counts of the unlearned model and the original, from the same noise.
- Kept: Frechet distance between all fresh samples of the unlearned model and an estimated oracle, the samples of the
  original without those that count as forgotten, in the leading principal components of the oracle's features. Divided
  by the same distance of other such samples of the original, so that 1 means as good as nothing lost.

The regression is not the one that filters the replay bank: its unlabelled images, which the oracle is taken from, are
drawn for this purpose, the fresh samples had no part in it, and its threshold is that of forget images which the
scoring fit did not see. What remains: the forget images and the kind of features are the same, so pictures of the
unwanted that neither recognises stay in the bank, are taught to be kept, and are not counted. The estimate of PUL is
too high by them. Where the classes lie close together the count also holds some pictures of other classes, which keeps
the estimate below 100. The oracle lacks what was wrongly called forgotten, and knows nothing of real pictures: what the
original model draws badly is no loss. And counts are small: none left of 30 shows, with 95% confidence, a PUL of 90.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from vdu_fast.classifier import frechet_distance
from vdu_fast.errors import InputError
from vdu_fast.filters import examples, find_feature_module, fit_positive_unlabelled, middle_features
from vdu_fast.pipelines import Denoiser

logger = logging.getLogger(__name__)

# Samples of the original model, as a multiple of those of an unlearned one: one part from the same noise, one to
# compare with the oracle, and two for the oracle and the regression.
ORIGINAL_SAMPLES = 4
LOW = 0.05
# A covariance of a few hundred samples tells no more than this.
MOST_COMPONENTS = 32
# From fewer, one picture more or less would move the estimate by more than ten percent.
FEW_FORGOTTEN = 10


class Signals:
    """What the original model draws, in features, and the measures against it.

    Args:
        original: the model before unlearning; its weights must stay.
        drawn: what it draws, float32 [4 N, C, H, W]; the first N from the noise that unlearned models start from too.
        forget_images: float32 [M, C, H, W] in [-1, 1], M >= 8.
        samples: N.
        feature_module: name of the submodule to read; None takes `mid_block`.
        batch_size: images per network call.

    Attributes:
        forgotten_before: how many of the first N count as forgotten.
        own_distance: kept distance of the original's own kept samples.

    Raises:
        InputError: no such submodule, or the original draws nothing, or nothing else, that counts as forgotten.
    """

    def __init__(
        self,
        original: Denoiser,
        drawn: Tensor,
        forget_images: Tensor,
        *,
        samples: int,
        feature_module: str | None = None,
        batch_size: int = 250,
    ) -> None:
        self.original, self.batch_size = original, batch_size
        self._module = find_feature_module(original.module, feature_module)
        features, forget = self._features(drawn), self._features(examples(forget_images))
        reference = features[2 * samples :]
        self._fit = fit_positive_unlabelled(reference, forget)
        self._threshold = self._fit.held_out.quantile(LOW)
        self.forgotten_before = int(self._counts(features[:samples]).sum())
        oracle = reference[~self._counts(reference)]
        others = features[: 2 * samples]
        others = others[~self._counts(others)][:samples]
        if self.forgotten_before == 0 or min(len(oracle), len(others)) < 2:
            raise InputError(
                f"forget_images: of {samples} images that the model draws {self.forgotten_before} look like them, so "
                "that the two cannot be told apart by what is drawn. Draw more (--samples), or give forget images of "
                "something that the model draws now and then."
            )
        if self.forgotten_before < FEW_FORGOTTEN:
            logger.warning(
                "only %d of %d images that the model draws look like the forget images, so that the estimated PUL is "
                "coarse. Draw more: --samples %d.",
                *(self.forgotten_before, samples, -(-samples * FEW_FORGOTTEN // self.forgotten_before)),
            )
        self._mean, self._std = oracle.mean(dim=0), oracle.std(dim=0).clamp_min(1e-6)
        components = max(1, min(MOST_COMPONENTS, len(oracle) // 4))
        self._axes = torch.linalg.svd((oracle - self._mean) / self._std, full_matrices=False).Vh[:components].T
        self._oracle = self._projected(oracle)
        # Zero where the model draws a single picture, over and over.
        self.own_distance = max(self._distance(others), 1e-12)

    def measure(self, images: Tensor) -> dict[str, Any]:
        """The measures of an unlearned model, as fields of `Point`.

        Args:
            images: what it draws, float32 [N, C, H, W], from the noise of the original's first N.

        Raises:
            InputError: images that are not finite.
        """
        features = self._features(images)
        forgotten, distance = int(self._counts(features).sum()), self._distance(features)
        return {
            "forgotten": forgotten,
            "forgotten_before": self.forgotten_before,
            "pul": 100.0 * (self.forgotten_before - forgotten) / self.forgotten_before,
            "distance": distance,
            "ratio": distance / self.own_distance,
        }

    def _features(self, images: Tensor) -> Tensor:
        return middle_features(self.original, images, self._module, batch_size=self.batch_size)

    def _counts(self, features: Tensor) -> Tensor:
        """Which count as forgotten, bool [N]."""
        return self._fit.score(features) >= self._threshold

    def _projected(self, features: Tensor) -> Tensor:
        return ((features - self._mean) / self._std) @ self._axes

    def _distance(self, features: Tensor) -> float:
        return frechet_distance(self._projected(features), self._oracle)
