"""How much was forgotten (PUL), what it cost (u-FID, class shares, losses), and what those numbers compare with.

Definitions, for N generated samples of the model before and after, from the same seeds by the same sampler:

    PUL    = 100 (N_before - N_after) / N_before       N = samples that the classifier assigns to the forgotten class
    u-FID  = Frechet distance between ALL samples of a model and REAL training images without the forgotten class,
             in the features of the classifier's penultimate layer ("FID" alone would mean Inception's)

KID, precision, recall, density and coverage (`vdu_fast.distances`) compare the same sets in the same features. All are
also measured for three references. `oracle`: the original model's samples with the forgotten class removed by the
classifier, which is what perfect unlearning would leave. `floor`: real held-out images. `before`: the original model,
forgotten class and all. A Frechet distance falls as counts rise, so counts are kept equal where the data allow it and
are reported where they do not. `pul_heldout` is the PUL of a model that draws real held-out images of the other
classes, as often as there are: it is below 100 by the classifier's mistakes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vdu_fast import rng
from vdu_fast.classifier import (
    FEATURE_EXTRACTOR,
    ImageClassifier,
    check_labels,
    frechet_distance,
    train_classifier,
)
from vdu_fast.data import ImageSet
from vdu_fast.distances import LEAST_IMAGES, NearestNeighbours, kernel_distance, nearest_neighbours
from vdu_fast.errors import InputError, check_choices
from vdu_fast.execution import CompileMode, Execution, Precision
from vdu_fast.pipelines import Denoiser
from vdu_fast.prediction_errors import even_timesteps, noise_prediction_errors
from vdu_fast.sampling import sample_images

# Called with (what is being done, how much of it is done, how much there is).
EvaluationProgress = Callable[[str, int, int], None]

LOW_ACCURACY = 0.9


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation.

    Attributes:
        samples: images drawn from each model.
        sampler_steps: network evaluations per image. Few steps and few samples flatter PUL.
        batch_size: images per network call; changes the results by float rounding only.
        seed: starting noise of the samples, the same for both models. Independent of the unlearning seed, so that no
            model is judged on noise it was tuned on.
        max_real: most real images used as the u-FID reference; a fixed random subset beyond that.
        classifier_seed: seed of the classifier, where one has to be trained.
        loss_images: most images over which the noise-prediction losses are averaged.
        loss_timesteps: number of timesteps, evenly spaced, over which they are averaged.
        precision: "float32" or "bfloat16" (autocast of both networks), which is faster and draws slightly other images.
        channels_last: run both networks in the channels-last memory layout.
        compile: "off", or a mode of torch.compile for drawing the samples; pays for many samples or large networks.
    """

    samples: int = 1000
    sampler_steps: int = 50
    batch_size: int = 250
    seed: int = 1234
    max_real: int = 10_000
    classifier_seed: int = 4321
    loss_images: int = 128
    loss_timesteps: int = 10
    precision: Precision = "float32"
    channels_last: bool = False
    compile: CompileMode = "off"

    def __post_init__(self) -> None:
        least = {"samples": 2, "max_real": 2}
        for name in ("samples", "sampler_steps", "batch_size", "max_real", "loss_images", "loss_timesteps"):
            if (value := getattr(self, name)) < (minimum := least.get(name, 1)):
                raise InputError(f"{name}: got {value}; accepted are whole numbers from {minimum} up. Raise it.")
        check_choices(self)

    @property
    def execution(self) -> Execution:
        """How the networks are run."""
        return Execution(self.precision, self.channels_last, self.compile)


@dataclass(frozen=True)
class Evaluation:
    """The numbers, and what the pictures of a report are drawn from.

    Attributes:
        metrics: plain nested dictionaries of strings and finite numbers, ready for JSON.
        before, after: samples of the two models, float32 [N, C, H, W] in [-1, 1]; image i of both has the same seed.
        labels_before, labels_after: classes that the classifier assigns to them, int64 [N].
        class_names: names of the classes.
        forget: index of the forgotten class.
        classifier: the network that counted, and whose features measured.
        original_samples: all that was drawn from the original model, numbered from 0; `before` are the first of them.
    """

    metrics: dict[str, Any]
    before: Tensor
    after: Tensor
    labels_before: Tensor
    labels_after: Tensor
    class_names: tuple[str, ...]
    forget: int
    classifier: ImageClassifier
    original_samples: Tensor


@dataclass(frozen=True)
class _Drawn:
    """Samples of one model with their features, float64 [N, F], and predicted classes, int64 [N]."""

    images: Tensor
    features: Tensor
    labels: Tensor


def percentage_unlearned(before: int, after: int, *, samples: int, class_name: str) -> float:
    """PUL = 100 (before - after) / before, in percent; negative where the model draws more of the class than it did.

    Raises:
        InputError: the original model never drew the class, so that there is nothing to forget.
    """
    if before == 0:
        raise InputError(
            f"forget: the original model drew no image of class {class_name!r} in {samples} samples, so the percentage "
            "unlearned is undefined. Draw more samples (--samples), or name a class that the model draws."
        )
    return 100.0 * (before - after) / before


def evaluate(
    before: Denoiser,
    after: Denoiser,
    *,
    train: ImageSet,
    heldout: ImageSet,
    forget: int,
    config: EvaluationConfig | None = None,
    classifier: ImageClassifier | None = None,
    original_samples: Tensor | None = None,
    on_original: Callable[[Tensor], None] | None = None,
    progress: EvaluationProgress | None = None,
) -> Evaluation:
    """Compares a model before and after unlearning; see the head of this module for the definitions.

    Args:
        before, after: the original and the unlearned model, drawing images of one shape.
        train: labelled real images; without the forgotten class they are the u-FID reference, and the classifier is
            trained on them where none is given.
        heldout: labelled real images of the same classes that neither the models nor the classifier saw.
        forget: index of the forgotten class.
        classifier: never one that took part in unlearning or in choosing the images to forget.
        original_samples: samples numbered 0, 1, ... of `before` with this seed and sampler, drawn earlier: many models
            are then compared with one original that is sampled once. Those beyond their number are drawn.
        on_original: called with all samples of `before`, whenever some were drawn: to keep them whatever comes after.
        progress: called with (stage, done, total).

    Raises:
        InputError: labels absent, images or classes that do not fit together, a class that the original model never
            draws, or a model that draws NaN.
    """
    config = config or EvaluationConfig()
    _check(before, after, train, heldout, forget)
    before.execution = after.execution = config.execution
    report = progress or (lambda stage, done, total: None)
    if classifier is None:
        classifier = train_classifier(
            train, seed=config.classifier_seed, progress=lambda done, total: report("classifier", done, total)
        )
    made_for, needed = (classifier.channels, *classifier.image_size), tuple(before.sample_shape)
    if classifier.class_names != train.class_names or made_for != needed:
        raise InputError(
            f"classifier: made for {made_for} images of the classes {', '.join(classifier.class_names)}; needed is "
            f"{needed} and {', '.join(train.class_names)}. Give one trained on the same data, or leave it out."
        )
    comparison = _Comparison(
        before, after, train, heldout, forget, config, classifier, report, original_samples, on_original
    )
    return comparison.run()


def _check(before: Denoiser, after: Denoiser, train: ImageSet, heldout: ImageSet, forget: int) -> None:
    check_labels(train, "train")
    if not 0 <= forget < len(train.class_names):
        raise InputError(
            f"forget: got class {forget}; {train.name} has classes 0 to {len(train.class_names) - 1} "
            f"({', '.join(train.class_names)}). Name one of them."
        )
    if heldout.labels is None or heldout.class_names != train.class_names:
        came = "no labels" if heldout.labels is None else f"the classes {', '.join(heldout.class_names)}"
        raise InputError(
            f"heldout: {heldout.name} has {came}; accepted are images labelled with the classes of the training "
            f"images, {', '.join(train.class_names)}, in that order. Give such images."
        )
    shape = tuple(before.sample_shape)
    others = {"after": after.sample_shape, "train": train.images.shape[1:], "heldout": heldout.images.shape[1:]}
    for argument, other in others.items():
        if tuple(other) != shape:
            raise InputError(
                f"{argument}: images are {tuple(other)} (channels, height, width); the original model draws {shape}. "
                "Use the data the model was trained on, or resize it (--resize)."
            )


def fixed_subset(images: Tensor, count: int, seed: int) -> Tensor:
    """A fixed random choice of at most `count` images."""
    if len(images) <= count:
        return images
    return images[rng.permutation(len(images), seed, stream=rng.Stream.SPLIT)[:count].sort().values]


@dataclass
class _Comparison:
    """One evaluation under way. Doubts about its numbers, and reasons for the absence of some, are noted as it goes."""

    before: Denoiser
    after: Denoiser
    train: ImageSet
    heldout: ImageSet
    forget: int
    config: EvaluationConfig
    classifier: ImageClassifier
    report: EvaluationProgress
    original_samples: Tensor | None = None
    on_original: Callable[[Tensor], None] | None = None
    warnings: list[str] = field(default_factory=list)
    omitted: dict[str, str] = field(default_factory=dict)

    def run(self) -> Evaluation:
        config, name, samples = self.config, self.train.class_names[self.forget], self.config.samples
        original = self.draw(self.before, "before", samples)
        n_before = int((original.labels == self.forget).sum())
        # Asked before the second model is sampled: minutes can pass there.
        percentage_unlearned(n_before, 0, samples=samples, class_name=name)
        unlearned = self.draw(self.after, "after", samples)
        n_after = int((unlearned.labels == self.forget).sum())
        distances, counts = self.distances(original, unlearned)
        flow = self.before.schedule.prediction_type == "velocity"
        sampler = "Euler (flow matching)" if flow else "DDIM (eta = 0)"
        metrics: dict[str, Any] = {
            "forgotten_class": {"index": self.forget, "name": name},
            "pul": percentage_unlearned(n_before, n_after, samples=samples, class_name=name),
            **self.heldout_pul(n_before),
            **distances,
            "feature_extractor": FEATURE_EXTRACTOR,
            "shares": self.shares(original.labels, unlearned.labels),
            **self.losses(),
            "counts": {"samples": samples, "forgotten_before": n_before, "forgotten_after": n_after, **counts},
            "sampler": {"name": sampler, "steps": config.sampler_steps, "seed": config.seed},
            "classifier": self.describe_classifier(),
            "omitted": self.omitted,
            "warnings": self.warnings,
        }
        pictures = original.images, unlearned.images, original.labels, unlearned.labels
        assert self.original_samples is not None
        names = self.train.class_names
        return Evaluation(metrics, *pictures, names, self.forget, self.classifier, self.original_samples)

    def draw(self, denoiser: Denoiser, argument: str, count: int, *, first: int = 0) -> _Drawn:
        """The samples first .. first + count - 1; of the original model, those that are there are not drawn again."""
        known = self.original_samples if denoiser is self.before else None
        start = first if known is None else min(max(first, len(known)), first + count)
        images = self.sample(denoiser, argument, first + count - start, first=start)
        if known is not None:
            images = torch.cat([known[first:start], images])
        if denoiser is self.before:
            self.original_samples = images if known is None else torch.cat([known, images[len(known) - first :]])
            if self.on_original is not None and start < first + count:
                self.on_original(self.original_samples)
        return _Drawn(images, *self.classifier.embed_and_classify(images))

    def sample(self, denoiser: Denoiser, argument: str, count: int, *, first: int) -> Tensor:
        config, done = self.config, 0

        def finished(images: int) -> None:
            nonlocal done
            done += images
            self.report(f"samples {argument}", done, count)

        how: dict[str, Any] = {"steps": config.sampler_steps, "seed": config.seed, "batch_size": config.batch_size}
        images = sample_images(denoiser, count, first=first, progress=finished, **how)
        if not bool(images.isfinite().all()):
            raise InputError(
                f"{argument}: the model draws NaN or infinity; only finite images can be judged. Its weights are "
                "damaged: unlearn again with a smaller learning rate, or give an intact model."
            )
        return images

    def oracle(self, original: _Drawn) -> tuple[Tensor, int]:
        """Features of `samples` original samples outside the forgotten class, and how many were drawn on top.

        The gaps that the class leaves are filled from later sample numbers, so that all u-FIDs have the same count. A
        model that draws little else is given up on after four times the samples.
        """
        wanted, drawn = self.config.samples, len(original.labels)
        kept = original.features[original.labels != self.forget]
        while len(kept) < wanted and drawn < 4 * wanted:
            share = max(len(kept) / drawn, 0.05)
            count = min(math.ceil((wanted - len(kept)) / share * 1.05), 4 * wanted - drawn)
            more = self.draw(self.before, "oracle", count, first=drawn)
            kept, drawn = torch.cat([kept, more.features[more.labels != self.forget]]), drawn + count
        return kept[:wanted], drawn - len(original.labels)

    def distances(self, original: _Drawn, unlearned: _Drawn) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
        """u-FID and its neighbours, each of the four sets against the real images, and the counts behind them."""
        config, classifier = self.config, self.classifier
        assert self.train.labels is not None
        assert self.heldout.labels is not None
        real = fixed_subset(self.train.images[self.train.labels != self.forget], config.max_real, config.seed)
        unseen = fixed_subset(self.heldout.images[self.heldout.labels != self.forget], config.samples, config.seed)
        reference, _ = classifier.embed_and_classify(real)
        floor, _ = classifier.embed_and_classify(unseen)
        oracle, extra = self.oracle(original)

        found: dict[str, dict[str, float]] = {"u_fid": {}, "kid": {}}
        found |= {field.name: {} for field in fields(NearestNeighbours)}
        sets = {"before": original.features, "after": unlearned.features, "oracle": oracle, "floor": floor}
        for done, (name, features) in enumerate(sets.items()):
            self.report("distances", done, len(sets))
            measured = {}
            if len(features) >= 2:
                measured["u_fid"] = frechet_distance(features, reference)
                measured["kid"] = kernel_distance(features, reference, seed=config.seed)
            if min(len(features), len(reference)) >= LEAST_IMAGES:
                measured |= asdict(nearest_neighbours(features, reference))
            for metric, values in found.items():
                if metric in measured:
                    values[name] = measured[metric]
                    continue
                have, need = min(len(features), len(reference)), 2 if metric in ("u_fid", "kid") else LEAST_IMAGES
                self.omitted[f"{metric}.{name}"] = f"{have} images without the forgotten class; {need} are needed"
        self.report("distances", len(sets), len(sets))
        counts = {"real": len(real), "floor": len(floor), "oracle": len(oracle)}
        self.doubt_counts(counts)
        return found, {**counts, "oracle_extra_drawn": extra}

    def doubt_counts(self, counts: dict[str, int]) -> None:
        samples, features = self.config.samples, self.classifier.num_features
        for name, count in {"generated": samples, **counts}.items():
            if count <= features:
                self.warnings.append(
                    f"{count} {name} images are too few for a covariance of {features} features: the u-FIDs that use "
                    "them are unreliable. Use more images."
                )
        for name in ("oracle", "floor"):
            if counts[name] < samples:
                self.warnings.append(
                    f"the {name} has {counts[name]} images where the models have {samples}: the smaller count raises "
                    "its u-FID."
                )

    def shares(self, before: Tensor, after: Tensor) -> dict[str, Any]:
        """Share of the samples in every class, in [0, 1], and the ratio after / before for every kept class."""
        names = self.train.class_names
        share = [
            dict(
                zip(names, (torch.bincount(labels, minlength=len(names)).double() / len(labels)).tolist(), strict=True)
            )
            for labels in (before, after)
        ]
        ratios = {}
        for name in names:
            if name == names[self.forget]:
                continue
            if share[0][name] == 0:
                self.omitted[f"shares.kept_ratio.{name}"] = "the original model never drew this class"
                continue
            ratios[name] = share[1][name] / share[0][name]
        shares: dict[str, Any] = {"before": share[0], "after": share[1], "kept_ratio": ratios}
        if ratios:
            least = min(ratios, key=lambda name: ratios[name])
            shares |= {"kept_ratio_min": ratios[least], "kept_ratio_min_class": least}
        return shares

    def losses(self) -> dict[str, Any]:
        """Noise-prediction error of both models on held-out images of the forgotten class and of the others."""
        assert self.heldout.labels is not None
        config, forgotten = self.config, self.heldout.labels == self.forget
        sets = {"forget_loss": self.heldout.images[forgotten], "retained_loss": self.heldout.images[~forgotten]}
        timesteps = even_timesteps(config.loss_timesteps, len(self.before.schedule))
        how: dict[str, Any] = {"timesteps": timesteps, "seed": config.seed, "batch_size": config.batch_size}
        losses: dict[str, Any] = {}
        for done, (name, images) in enumerate(sets.items()):
            self.report("losses", done, len(sets))
            if len(images) == 0:
                self.omitted[name] = "no held-out image of that kind"
                continue
            images = fixed_subset(images, config.loss_images, config.seed)
            values = [
                float(noise_prediction_errors(model, images, **how).mean()) for model in (self.before, self.after)
            ]
            if not all(math.isfinite(value) for value in values):
                self.omitted[name] = "the network's prediction is not finite on these images"
                continue
            losses[name] = {"before": values[0], "after": values[1], "images": len(images), "timesteps": len(timesteps)}
            if values[0] > 0:
                losses[name]["ratio"] = values[1] / values[0]
        self.report("losses", len(sets), len(sets))
        return losses

    @cached_property
    def heldout_classes(self) -> Tensor:
        """The classes that the classifier assigns to the held-out images, int64 [M]."""
        return self.classifier.embed_and_classify(self.heldout.images)[1]

    def heldout_pul(self, n_before: int) -> dict[str, float]:
        """`pul_heldout`, the PUL that all held-out images of the other classes have."""
        assert self.heldout.labels is not None
        found = self.heldout_classes[self.heldout.labels.cpu() != self.forget]
        if len(found) == 0:
            self.omitted["pul_heldout"] = "no held-out images of other classes"
            return {}
        mistaken = float((found == self.forget).double().mean())
        return {"pul_heldout": 100 * (1 - mistaken * self.config.samples / n_before)}

    def describe_classifier(self) -> dict[str, Any]:
        description = {} if self.classifier.seed is None else {"seed": self.classifier.seed}
        if len(self.heldout.images) == 0:
            self.omitted["classifier.accuracy"] = "no held-out images"
            return description
        assert self.heldout.labels is not None
        accuracy = float((self.heldout_classes == self.heldout.labels.cpu()).double().mean())
        if self.classifier.accuracy is None:
            self.classifier.accuracy = accuracy
        if accuracy < LOW_ACCURACY:
            self.warnings.append(
                f"the classifier is right on only {accuracy:.1%} of the held-out images: PUL and class shares carry "
                "its mistakes. Use more labelled images."
            )
        return {**description, "accuracy": accuracy, "accuracy_images": len(self.heldout.images)}
