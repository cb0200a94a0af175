"""Keeping what must go out of the replay bank: by a given classifier, or from the forget images alone.

What is left of the unwanted in the bank is what the function-space term teaches the model to keep, so this decides how
completely it is forgotten. What is dropped by mistake only makes the bank smaller, as long as it is not much. The
scores are kept, too: they say which of the rest is most like what must go, and pays most for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vdu_fast.errors import InputError
from vdu_fast.pipelines import Denoiser

# Clean enough to show what is drawn, deep enough into the noise levels that the middle block sees the whole of it.
FEATURE_LEVELS = (0.05, 0.15, 0.30)
# Of so many forget images more make the fit no better, and each costs network evaluations.
MOST_FORGET_IMAGES = 1000
ROUNDS = 3
LOGISTIC_C = 0.003
# Of the held-out forget images, those with the lowest scores are given up: this share of them, where there are enough
# to know where it lies, or else those further than so many (robust) standard deviations below the median.
GIVEN_UP = 0.01
ENOUGH = 500
TOLERANCE = 3.5


@dataclass(frozen=True)
class Filtered:
    """What a filter says of a bank of N images.

    Attributes:
        keep: bool [N], true where the image stays.
        likeness: float [N], how much the image looks like what must go, on any scale; None where nothing tells.
        unwanted: float [N] in [0, 1], the probability that the image is what must go; 0 where nothing tells.
        report: what was done.
    """

    keep: Tensor
    likeness: Tensor | None
    unwanted: Tensor
    report: FilterReport


@dataclass
class FilterReport:
    """What a filter did.

    Attributes:
        method: "positive_unlabelled", "classifier" or "none".
        total: replayed images looked at.
        dropped: how many were dropped.
        estimated_share: the filter's own estimate of the unwanted share of the bank, None where it makes none.
        limited: whether max_dropped kept the filter from dropping all it suspected.
        guided_states: replayed states whose targets are those of a model that does not draw the unwanted; None without
            guidance.
        guided_dropped: dropped images whose noise is replayed with such targets; None without guidance.
    """

    method: str
    total: int
    dropped: int
    estimated_share: float | None = None
    limited: bool = False
    guided_states: int | None = None
    guided_dropped: int | None = None

    def describe(self) -> str:
        """One line for people."""
        line = f"filter {self.method}: dropped {self.dropped} of {self.total} replayed images"
        if self.estimated_share is not None:
            line += f", estimated share of the unwanted {100 * self.estimated_share:.1f}%"
        if self.limited:
            line += "; it suspected more than max_dropped allows, so some of the unwanted may be left"
        return line


def classifier_filter(
    images: Tensor, classifier: nn.Module, forget_label: int, *, max_dropped: float = 0.5, batch_size: int = 250
) -> Filtered:
    """Drop the images that a classifier assigns to the forgotten class, or gives it a probability of 5% or more.

    Args:
        images: float32 [N, C, H, W] in [-1, 1].
        classifier: maps images [B, C, H, W] to logits [B, classes].
        forget_label: index of the forgotten class.
        max_dropped: at most this share of the images is dropped, the most probable first.
        batch_size: images per call of the classifier.
    """
    device = next(classifier.parameters()).device
    classifier.eval()
    with torch.no_grad():
        logits = torch.cat([classifier(chunk.to(device)).float().cpu() for chunk in images.split(batch_size)])
    if not 0 <= forget_label < logits.shape[1]:
        raise InputError(
            f"forget_label must be in [0, {logits.shape[1]}), the classes of the classifier, got {forget_label}."
        )
    probability, assigned = logits.softmax(dim=1)[:, forget_label], logits.argmax(dim=1) == forget_label
    suspected, limited = _at_most(max_dropped, (probability >= 0.05) | assigned, probability)
    share = float(assigned.float().mean())
    report = FilterReport("classifier", len(images), int(suspected.sum()), share, limited)
    return Filtered(~suspected, probability, probability, report)


def _at_most(share: float, suspected: Tensor, scores: Tensor) -> tuple[Tensor, bool]:
    """The suspected, bool [N], or the best-scored of them where they are more than `share` of all; and which it was."""
    limit = int(share * len(scores))
    if int(suspected.sum()) <= limit:
        return suspected, False
    best = torch.zeros_like(suspected)
    best[scores.topk(limit).indices] = True
    return best, True


def positive_unlabelled_filter(
    denoiser: Denoiser,
    bank_images: Tensor,
    forget_images: Tensor,
    *,
    feature_module: str | None = None,
    max_dropped: float = 0.5,
    batch_size: int = 250,
) -> Filtered:
    """Drop the replayed images that look like the forget images to the network itself.

    Features are channel means and standard deviations of the network's middle block. A logistic regression of the
    forget images (positive) against the bank (unlabelled) scores the bank; it is cross-fitted over the two halves of
    the forget images, so that each is also scored by a fit that did not see it. Twice the share of the bank above the
    held-out median estimates how much of the bank is unwanted; that many of the best-scored bank images join the
    positives, the doubtful are left out of the negatives, and the fit is repeated: otherwise it learns to tell real
    images from drawn ones. What scores as high as the held-out forget images is dropped; see `_threshold`.

    Args:
        denoiser: the model before unlearning.
        bank_images: float32 [N, C, H, W], drawn by it.
        forget_images: float32 [M, C, H, W], M >= 8; see `examples`.
        feature_module: name of the submodule to read; None takes `mid_block`.
        max_dropped: at most this share of the bank is dropped, the best-scored first.
        batch_size: images per network call.

    Raises:
        InputError: too few forget images, or no such submodule.
    """
    module = check_positive_unlabelled(denoiser, forget_images, feature_module)
    bank = middle_features(denoiser, bank_images, module, batch_size=batch_size)
    forget = middle_features(denoiser, examples(forget_images), module, batch_size=batch_size)
    fit = fit_positive_unlabelled(bank, forget)
    scores = fit.score(bank)
    suspected, limited = _at_most(max_dropped, scores >= _threshold(fit.held_out), scores)
    report = FilterReport("positive_unlabelled", len(bank), int(suspected.sum()), fit.share, limited)
    return Filtered(~suspected, scores, _probability(scores, fit.held_out, fit.share), report)


def _threshold(held_out: Tensor) -> Tensor:
    """The score from which an image is suspected, by the scores of the held-out forget images, float64 [M].

    How far they reach down differs from class to class, which their middle does not tell: a fixed number of standard
    deviations leaves some boots and trousers of Fashion-MNIST in the bank, and takes two sneakers for each sandal.
    """
    if len(held_out) >= ENOUGH:
        return held_out.quantile(GIVEN_UP)
    median = held_out.median()
    return median - TOLERANCE * 1.4826 * (held_out - median).abs().median()


def _probability(scores: Tensor, held_out: Tensor, share: float) -> Tensor:
    """P(unwanted | score) of bank images, float64 [N]: share x density of the held-out forget images / of the bank.

    The ratio of the densities is that of a monotone (isotonic) regression which tells the two sets apart.
    """
    from sklearn.isotonic import IsotonicRegression

    each = share * len(scores) / len(held_out)
    weights = torch.cat([torch.ones_like(scores), torch.full_like(held_out, each)])
    labels = torch.cat([torch.zeros_like(scores), torch.ones_like(held_out)])
    regression = IsotonicRegression(out_of_bounds="clip")
    regression.fit(torch.cat([scores, held_out]).numpy(), labels.numpy(), weights.numpy())
    told = torch.from_numpy(regression.predict(scores.numpy()))
    return (told / (1 - told).clamp_min(1e-9)).clamp(0, 1)


def examples(forget_images: Tensor) -> Tensor:
    """What is looked at of the forget images: all, or `MOST_FORGET_IMAGES` of them, evenly spaced."""
    count = min(len(forget_images), MOST_FORGET_IMAGES)
    return forget_images[torch.arange(count) * len(forget_images) // count]


def check_positive_unlabelled(denoiser: Denoiser, forget_images: Tensor, feature_module: str | None) -> nn.Module:
    """The submodule that the filter reads; InputError when the filter cannot work. Needs no bank, so ask it first."""
    if len(forget_images) < 8:
        raise InputError(
            f"the positive_unlabelled filter needs at least 8 forget images, got {len(forget_images)}. Give more, or "
            "use bank_filter 'classifier', or 'none' if the model hardly ever draws what must go."
        )
    return find_feature_module(denoiser.module, feature_module)


@dataclass(frozen=True)
class PositiveUnlabelledFit:
    """A linear score of how much features look like those of the forget images.

    Attributes:
        direction, offset: the score of features f is f . direction + offset; float64 [F] and a number.
        held_out: scores of the forget images, each by the fit that did not see it, float64 [M].
        share: estimated share of the unlabelled images that look like the forget images.
    """

    direction: Tensor
    offset: float
    held_out: Tensor
    share: float

    def score(self, features: Tensor) -> Tensor:
        """Scores of features float64 [N, F], float64 [N]."""
        return features @ self.direction + self.offset


def fit_positive_unlabelled(unlabelled: Tensor, forget: Tensor) -> PositiveUnlabelledFit:
    """The cross-fitted regression of `positive_unlabelled_filter`, on features float64 [N, F] and [M, F], M >= 8."""
    both = torch.cat([unlabelled, forget])
    mean, std = both.mean(dim=0), both.std(dim=0).clamp_min(1e-6)
    unlabelled, forget = (unlabelled - mean) / std, (forget - mean) / std
    halves = torch.arange(len(forget)) % 2 == 0
    positives, negatives = unlabelled[:0], unlabelled
    for _ in range(ROUNDS):
        first = _regression(torch.cat([forget[halves], positives]), negatives)
        second = _regression(torch.cat([forget[~halves], positives]), negatives)
        held_out = torch.cat([_linear(second, forget[halves]), _linear(first, forget[~halves])])
        direction, offset = (first[0] + second[0]) / 2, (first[1] + second[1]) / 2
        scores = _linear((direction, offset), unlabelled)
        share = min(1.0, 2 * float((scores >= held_out.median()).double().mean()))
        order = scores.argsort(descending=True)
        positives = unlabelled[order[: int(share / 2 * len(unlabelled))]]
        negatives = unlabelled[order[int(min(0.5, 2 * share) * len(unlabelled)) :]]
    return PositiveUnlabelledFit(direction / std, offset - float(mean @ (direction / std)), held_out, share)


def _regression(positive: Tensor, negative: Tensor) -> tuple[Tensor, float]:
    """Direction [F] and offset of a logistic regression."""
    from sklearn.linear_model import LogisticRegression

    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).numpy()
    # Balanced: the two sets have nothing to do with the frequencies of the classes.
    model = LogisticRegression(C=LOGISTIC_C, class_weight="balanced", max_iter=500)
    model.fit(torch.cat([positive, negative]).numpy(), labels)
    return torch.from_numpy(model.coef_[0]), float(model.intercept_[0])


def _linear(fit: tuple[Tensor, float], features: Tensor) -> Tensor:
    return features @ fit[0] + fit[1]


def find_feature_module(network: nn.Module, name: str | None) -> nn.Module:
    """The named submodule, or `mid_block`; InputError with what to do when there is none."""
    modules = dict(network.named_modules())
    if name is None and "mid_block" in modules:
        return modules["mid_block"]
    if name is not None and name in modules:
        return modules[name]
    some = ", ".join([n for n in modules if n and n.count(".") == 0][:8])
    raise InputError(
        f"feature_module {name!r}: the network has no such submodule. Name one whose output is [B, F, ...] and that "
        f"sees the whole image (top level: {some}), or use bank_filter 'classifier' or 'none'."
    )


def middle_features(denoiser: Denoiser, images: Tensor, module: nn.Module, *, batch_size: int = 250) -> Tensor:
    """Channel means and standard deviations of a submodule's output, float64 [N, 2 F len(FEATURE_LEVELS)].

    The images are scaled as at each noise level but no noise is added: that makes the features sharper.
    """
    grabbed: list[Tensor] = []

    def grab(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        grabbed.append(output if isinstance(output, Tensor) else output[0])

    handle = module.register_forward_hook(grab)
    rows = []
    try:
        with denoiser.evaluating():
            for chunk in images.split(batch_size):
                x0 = chunk.to(denoiser.device, denoiser.dtype)
                for level in FEATURE_LEVELS:
                    t = torch.full((len(x0),), int(level * len(denoiser.schedule)), device=x0.device)
                    denoiser.predict(denoiser.schedule.add_noise(x0, torch.zeros_like(x0), t), t)
                rows.append(torch.cat([_pool(output) for output in grabbed], dim=1))
                grabbed.clear()
    finally:
        handle.remove()
    return torch.cat(rows)


def _pool(output: Tensor) -> Tensor:
    flat = output.double().cpu().flatten(2) if output.ndim > 2 else output.double().cpu().unsqueeze(2)
    return torch.cat([flat.mean(dim=2), flat.std(dim=2, correction=0)], dim=1)
