"""Does it stay forgotten? What a model that was unlearned gives back when it is asked for it in earnest.

Not drawing a class is one thing, not knowing it any more another. Three questions to the weights:

    relearning   The model is trained on with a few images of the class. After how many steps does it draw half as many
                 of the class as the original model did? And after how many with images of other classes, which say
                 nothing about it?
    inversion    The original model's deterministic sampler is run backwards from images of the class. Does the
                 unlearned model still draw the class from the noise that this leads to?
    membership   The prediction error at every timestep, on the training images that were to be forgotten and on images
                 of the class that were never trained on. Can they be told apart?

What a model retrained without the class answers is the yardstick: it knows nothing that could come back.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from vdu_fast.baselines.training import denoising_loss, noised_batch
from vdu_fast.classifier import ImageClassifier, check_labels
from vdu_fast.data import ImageSet
from vdu_fast.errors import InputError
from vdu_fast.evaluation import EvaluationConfig, EvaluationProgress, fixed_subset
from vdu_fast.inversion import invert_images
from vdu_fast.pipelines import Denoiser
from vdu_fast.prediction_errors import auc_spread, even_timesteps, membership_auc, noise_prediction_errors
from vdu_fast.sampling import decode_noise, sample_images


@dataclass(frozen=True)
class PersistenceConfig:
    """Settings of the questions whether a model has forgotten for good.

    Attributes:
        relearn_images: images of the class that relearning sees.
        unrelated_images: of other classes, where it sees those. A few would be learned by heart, and then be all that
            the model draws.
        relearn_steps: steps after which what the model draws is counted, rising from 0; the last one ends relearning.
        relearn_learning_rate: of Adam, constant.
        relearn_batch_size: noised images per step, drawn from the few over and over.
        relearn_samples: images drawn for every count, from the evaluation's starting noise.
        inverted_images: most images of the class that are inverted.
        membership_images: most images of a kind whose prediction errors are compared.
        membership_timesteps: number of timesteps, evenly spaced, at which they are.
    """

    relearn_images: int = 8
    unrelated_images: int = 64
    relearn_steps: tuple[int, ...] = (0, 5, 10, 20, 40, 80)
    relearn_learning_rate: float = 1e-4
    relearn_batch_size: int = 64
    relearn_samples: int = 200
    inverted_images: int = 100
    membership_images: int = 500
    membership_timesteps: int = 20

    def __post_init__(self) -> None:
        object.__setattr__(self, "relearn_steps", tuple(self.relearn_steps))
        for name, value in asdict(self).items():
            if name == "relearn_steps":
                if value[:1] != (0,) or any(b <= a for a, b in itertools.pairwise(value)):
                    raise InputError(
                        f"{name}: got {list(value)}; accepted are 0 and then whole numbers, each greater than the "
                        "one before. Give such a list, as [0,10,20,40]."
                    )
            elif name == "relearn_learning_rate":
                if not (math.isfinite(value) and value > 0):
                    raise InputError(f"{name}: got {value}; accepted are positive numbers. Give a small one, as 1e-4.")
            elif value < 1:
                raise InputError(f"{name}: got {value}; accepted are whole numbers from 1 up. Raise it.")


def half_life(steps: Sequence[int], counts: Sequence[int], original: int) -> float | None:
    """Steps until half of the original count is back, by straight lines between the steps that were counted at.

    Args:
        steps: rising.
        counts: samples of the class after so many steps.
        original: samples of the class that the original model draws.

    Returns:
        None where it is not back at the last step.
    """
    half = original / 2
    for i, count in enumerate(counts):
        if count >= half:
            if i == 0:
                return float(steps[0])
            share = (half - counts[i - 1]) / (count - counts[i - 1])
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None


def check_count(original: int, *, samples: int, class_name: str) -> None:
    """InputError where the original model draws none of the class, so that there is nothing to come back."""
    if original == 0:
        raise InputError(
            f"relearn_samples: the original model drew no image of class {class_name!r} in {samples} samples, so that "
            "half of them means nothing. Draw more (--relearn_samples)."
        )


def measure_persistence(
    before: Denoiser,
    after: Denoiser,
    *,
    train: ImageSet,
    heldout: ImageSet,
    forget: int,
    classifier: ImageClassifier,
    persistence: PersistenceConfig | None = None,
    config: EvaluationConfig | None = None,
    original_samples: Tensor | None = None,
    progress: EvaluationProgress | None = None,
) -> dict[str, Any]:
    """Asks the three questions of the head of this module. Both models are left as they are.

    Args:
        before, after: the original and the unlearned model.
        train, heldout: labelled images that the original model saw, and others of the same classes.
        forget: index of the forgotten class.
        classifier: the judge of `evaluate`.
        persistence: the settings.
        config: gives sampler steps, batch size, how networks are run, and the seed of everything random.
        original_samples: samples numbered 0, 1, ... of `before` with this seed and sampler; those that are missing are
            drawn.
        progress: called with (stage, done, total).

    Returns:
        `settings`, `relearning`, `inversion`, `errors`, `membership`, and in `omitted` what could not be measured and
        why; nested dictionaries of plain values.

    Raises:
        InputError: the original model does not draw the class in `relearn_samples` samples, or a class has no training
            image.
    """
    persistence, config = persistence or PersistenceConfig(), config or EvaluationConfig()
    before.execution = after.execution = config.execution
    report = progress or (lambda stage, done, total: None)
    check_labels(train, "train")
    images: dict[str, Tensor] = {}
    for name, source in (("train", train), ("heldout", heldout)):
        assert source.labels is not None
        of_class = source.labels == forget
        images |= {f"forget_{name}": source.images[of_class], f"retained_{name}": source.images[~of_class]}
    questions = _Questions(before, after, images, forget, classifier, persistence, config, report)
    original = questions.count(before, original_samples)
    check_count(original, samples=persistence.relearn_samples, class_name=train.class_names[forget])
    answers: dict[str, Any] = {
        "settings": asdict(persistence),
        "relearning": questions.relearning(original),
        "inversion": questions.inversion(),
        **questions.membership(),
    }
    return {**answers, "omitted": questions.omitted}


@dataclass
class _Questions:
    """The questions to one model under way; `images` by kind, `omitted` grows."""

    before: Denoiser
    after: Denoiser
    images: dict[str, Tensor]
    forget: int
    classifier: ImageClassifier
    settings: PersistenceConfig
    config: EvaluationConfig
    report: EvaluationProgress
    omitted: dict[str, str] = field(default_factory=dict)

    @property
    def sampler(self) -> dict[str, Any]:
        return {"steps": self.config.sampler_steps, "batch_size": self.config.batch_size}

    def of_class(self, images: Tensor) -> int:
        """How many of these images the judge assigns to the forgotten class; NaN is no image of it."""
        _, labels = self.classifier.embed_and_classify(images.nan_to_num())
        return int(((labels == self.forget) & images.flatten(1).isfinite().all(dim=1)).sum())

    def count(self, denoiser: Denoiser, known: Tensor | None = None) -> int:
        """How many of its samples are of the class; `known` are its first ones, where they were drawn before."""
        wanted, seed = self.settings.relearn_samples, self.config.seed
        known = torch.empty(0, *denoiser.sample_shape) if known is None else known[:wanted]
        rest = sample_images(denoiser, wanted - len(known), first=len(known), seed=seed, **self.sampler)
        return self.of_class(torch.cat([known, rest]))

    def relearning(self, original: int) -> dict[str, Any]:
        """What is drawn again after training on, with images of the class and with others."""
        settings, seed, steps = self.settings, self.config.seed, self.settings.relearn_steps
        answers: dict[str, Any] = {"samples": settings.relearn_samples, "before": original, "steps": list(steps)}
        untouched = self.count(self.after)
        for kind, source, count in (
            ("forget", "forget_train", settings.relearn_images),
            ("unrelated", "retained_train", settings.unrelated_images),
        ):
            images = fixed_subset(self.images[source], count, seed)
            counts: list[int] = []
            for step, model in relearn(self.after, images, settings, seed=seed):
                self.report(f"relearning, {kind} images", len(counts), len(steps))
                counts.append(self.count(model) if step else untouched)
            self.report(f"relearning, {kind} images", len(steps), len(steps))
            answers[kind] = {"images": len(images), "counts": counts, "half_life": half_life(steps, counts, original)}
        return answers

    def inversion(self) -> dict[str, Any]:
        """Shares of the class among what both models draw from the noise that its images are inverted to."""
        images = fixed_subset(self.images["forget_train"], self.settings.inverted_images, self.config.seed)
        self.report("inversion", 0, 3)
        noise = invert_images(self.before, images, **self.sampler)
        shares: dict[str, Any] = {"images": len(images), "steps": self.config.sampler_steps}
        for done, (side, denoiser) in enumerate((("before", self.before), ("after", self.after)), start=1):
            self.report("inversion", done, 3)
            shares[side] = self.of_class(decode_noise(denoiser, noise, **self.sampler)) / len(images)
        self.report("inversion", 3, 3)
        return shares

    def membership(self) -> dict[str, Any]:
        """Mean errors at every timestep, by kind of image and model, and the AUCs between them."""
        seed, settings = self.config.seed, self.settings
        timesteps = even_timesteps(settings.membership_timesteps, len(self.before.schedule))
        how: dict[str, Any] = {"timesteps": timesteps, "seed": seed, "batch_size": self.config.batch_size}
        curves: dict[str, Any] = {"timesteps": timesteps.tolist()}
        found: dict[str, dict[str, Tensor]] = {}
        kinds = ("forget_train", "forget_heldout", "retained_heldout")
        for done, kind in enumerate(kinds):
            self.report("prediction errors", done, len(kinds))
            images = fixed_subset(self.images[kind], settings.membership_images, seed)
            if not len(images):
                self.omitted[f"errors.{kind}"] = "there is no such image"
                continue
            models = {"before": self.before, "after": self.after}
            errors = {side: noise_prediction_errors(model, images, **how) for side, model in models.items()}
            if not all(bool(error.isfinite().all()) for error in errors.values()):
                self.omitted[f"errors.{kind}"] = "the network's prediction is not finite on these images"
                continue
            found[kind] = errors
            curves[kind] = {"images": len(images)} | {side: e.mean(dim=1).tolist() for side, e in errors.items()}
        self.report("prediction errors", len(kinds), len(kinds))
        if not {"forget_train", "forget_heldout"} <= found.keys():
            self.omitted["membership"] = "it takes the errors on training and on held-out images of the class"
            return {"errors": curves}
        members, others = found["forget_train"], found["forget_heldout"]
        aucs: dict[str, Any] = {side: _worst(membership_auc(members[side], others[side])) for side in members}
        aucs["spread"] = auc_spread(curves["forget_train"]["images"], curves["forget_heldout"]["images"])
        return {"errors": curves, "membership": aucs}


def _worst(aucs: list[float]) -> dict[str, Any]:
    """The AUCs and the worst of them: errors that are conspicuously high give images away as well as low ones do."""
    highest, lowest = max(aucs), min(aucs)
    return {"auc": aucs, "highest": highest, "lowest": lowest, "worst": max(highest, 1 - lowest)}


def relearn(
    denoiser: Denoiser, images: Tensor, settings: PersistenceConfig, *, seed: int
) -> Iterator[tuple[int, Denoiser]]:
    """Train a copy of the model on a few images with the plain DDPM loss and Adam; the model is left as it is.

    Args:
        images: float32 [N, C, H, W] in [-1, 1].
        seed: of batches, timesteps and noise.

    Yields:
        Steps done and the copy, at each of `settings.relearn_steps`.
    """
    copied = Denoiser(copy.deepcopy(denoiser.module), denoiser.scheduler, denoiser.sample_shape)
    copied.execution = denoiser.execution
    # Whoever relearns is bound neither by what unlearning froze nor to a dropout that is no function of the seed.
    copied.module.requires_grad_(True).eval()
    optimizer = torch.optim.Adam(copied.module.parameters(), lr=settings.relearn_learning_rate)
    done = 0
    for goal in settings.relearn_steps:
        for step in range(done, goal):
            batch = noised_batch(copied, [images], settings.relearn_batch_size, step, seed)
            optimizer.zero_grad()
            denoising_loss(copied, copied.predict(batch.x_t, batch.timesteps), batch).backward()
            optimizer.step()
        done = goal
        yield done, copied
