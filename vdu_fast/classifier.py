"""A compact image classifier: it counts what a diffusion model draws, and its penultimate layer measures quality.

Pictures too small for Inception (8x8 digits, 28x28 clothes) need a feature extractor of their own. This one is trained
on the real images in seconds, from a seed of its own, and takes no part in unlearning: a number that judges a model
must not come from a network that helped to change it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdu_fast import rng
from vdu_fast.checkpoint import load_tensors, save_tensors
from vdu_fast.data import ImageSet
from vdu_fast.errors import InputError

NUM_FEATURES = 64
MIN_SIZE = 8
FEATURE_EXTRACTOR = f"penultimate layer ({NUM_FEATURES} features) of the vdu_fast image classifier"
_FORMAT = "vdu_fast.ImageClassifier/1"

Progress = Callable[[int, int], None]


class ImageClassifier(nn.Module):
    """Convolutions and poolings down to a map of about 4x4, then a layer of 64 features, then the classes.

    Args:
        channels: number of image channels, at least 1.
        image_size: (height, width) of the images, each at least 8.
        class_names: one name per class, in the order of the labels.

    Attributes:
        accuracy: share of held-out images classified correctly, in [0, 1]; None where it was not measured.
        seed: the seed it was trained from; None where it was not trained here.
        num_features: width of `features`, 64.

    Raises:
        InputError: no channels, fewer than two classes, or images smaller than 8x8.
    """

    num_features = NUM_FEATURES

    def __init__(self, channels: int, image_size: tuple[int, int], class_names: tuple[str, ...]) -> None:
        super().__init__()
        height, width = image_size
        if channels < 1 or min(height, width) < MIN_SIZE:
            raise InputError(
                f"images: got {channels} channels of {height}x{width} pixels; the classifier accepts at least 1 "
                f"channel and {MIN_SIZE}x{MIN_SIZE} pixels. Resize the images, for instance with --resize {MIN_SIZE}."
            )
        if len(class_names) < 2:
            raise InputError(
                f"classes: got {len(class_names)} ({', '.join(class_names) or 'none'}); a classifier needs at least 2. "
                "Give the whole labelled data set, not one class of it."
            )
        self.channels, self.image_size, self.class_names = channels, (height, width), tuple(class_names)
        self.accuracy: float | None = None
        self.seed: int | None = None

        layers: list[nn.Module] = [*_convolution(channels, 24)]
        size = min(height, width)
        if size >= 16:  # full resolution is where the time goes, and 8x8 images have none to spare
            layers.append(nn.MaxPool2d(2))
            size //= 2
        layers += [*_convolution(24, 48), nn.MaxPool2d(2)]
        inputs, size = 48, size // 2
        while size >= 8:
            layers += [*_convolution(inputs, 64), nn.MaxPool2d(2)]
            inputs, size = 64, size // 2
        self.body = nn.Sequential(*layers, *_convolution(inputs, 64), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.embed = nn.Linear(4 * 64, NUM_FEATURES)
        self.head = nn.Linear(NUM_FEATURES, len(class_names))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate layer: images float32 [N, C, H, W] in [-1, 1] to non-negative float32 [N, 64]."""
        return F.relu(self.embed(self.body(images)))

    def forward(self, images: Tensor) -> Tensor:
        """Class scores before the softmax: images float32 [N, C, H, W] in [-1, 1] to float32 [N, classes]."""
        return self.head(self.features(images))

    @torch.no_grad()
    def embed_and_classify(self, images: Tensor, *, batch_size: int = 500) -> tuple[Tensor, Tensor]:
        """Features and classes of any number of images, in evaluation mode.

        Args:
            images: float32 [N, C, H, W] in [-1, 1], on any device.

        Returns:
            Features, float64 [N, 64] (a covariance is about to be taken), and predicted labels, int64 [N], on the CPU.

        Raises:
            InputError: images of another channel count or size than the classifier was made for.
        """
        expected = (self.channels, *self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise InputError(
                f"images: got shape {tuple(images.shape)}; this classifier accepts "
                f"[N, {', '.join(map(str, expected))}]. "
                "Train one on images of the same shape, or leave it out and one is trained."
            )
        device, training = self.head.weight.device, self.training
        self.eval()
        features = [torch.empty(0, NUM_FEATURES, dtype=torch.float64)]
        labels = [torch.empty(0, dtype=torch.int64)]
        for batch in images.split(batch_size) if len(images) else ():
            embedded = self.features(batch.to(device))
            features.append(embedded.double().cpu())
            labels.append(self.head(embedded).argmax(dim=1).cpu())
        self.train(training)
        return torch.cat(features), torch.cat(labels)

    def save(self, path: str | Path) -> None:
        """Writes weights and description to one safetensors file, atomically."""
        description = {
            "format": _FORMAT,
            "channels": self.channels,
            "image_size": self.image_size,
            "class_names": self.class_names,
            "accuracy": self.accuracy,
            "seed": self.seed,
        }
        save_tensors(path, self.state_dict(), {"classifier": json.dumps(description)})

    @classmethod
    def load(cls, path: str | Path) -> ImageClassifier:
        """Reads what `save` wrote.

        Raises:
            InputError: the file holds something other than a classifier of this version.
        """
        tensors, metadata = load_tensors(path)
        description = json.loads(metadata.get("classifier", "{}"))
        if description.get("format") != _FORMAT:
            raise InputError(
                f"classifier: {path} is not a classifier of this version (format {description.get('format')!r}); "
                f"accepted is {_FORMAT!r}. Leave it out and one is trained from the labelled images."
            )
        height, width = description["image_size"]
        classifier = cls(description["channels"], (height, width), tuple(description["class_names"]))
        classifier.load_state_dict(tensors)
        classifier.accuracy, classifier.seed = description["accuracy"], description["seed"]
        return classifier.eval()


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def check_labels(images: ImageSet, argument: str) -> Tensor:
    """The labels of a set in which every named class occurs, int64 [N].

    Raises:
        InputError: no labels, a label without a name, or a class without an image.
    """
    if images.labels is None:
        raise InputError(
            f"{argument}: {images.name} has no labels; one label per image is needed to tell the classes apart. "
            "Use a folder with one sub-folder per class, an IDX folder, or an .npz with `images` and `labels`."
        )
    labels, classes = images.labels.to(torch.int64), len(images.class_names)
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise InputError(
            f"{argument}: {images.name} has labels from {int(labels.min())} to {int(labels.max())}, but names "
            f"{classes} classes; accepted are 0 to {classes - 1}. Name every class, or correct the labels."
        )
    counts = torch.bincount(labels, minlength=classes).tolist()
    empty = [name for name, count in zip(images.class_names, counts, strict=True) if count == 0]
    if empty:
        raise InputError(
            f"{argument}: {images.name} has no image of class {', '.join(empty)}; every class needs at least one. "
            "Add images of it, or take the class out of the data set."
        )
    return labels


def _shifted(images: Tensor, shift: int, seed: int, step: int) -> Tensor:
    """Every image moved by its own whole number of pixels in [-shift, shift] per axis, edges repeated; same shape."""
    count, _, height, width = images.shape
    padded = F.pad(images, (shift, shift, shift, shift), mode="replicate")
    moves = rng.randint(2 * shift + 1, (2, count), seed, step, stream=rng.Stream.IMAGE_NOISE)
    rows = moves[0][:, None] + torch.arange(height)
    columns = moves[1][:, None] + torch.arange(width)
    # Two index tensors around a slice put the channels last.
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train_classifier(
    train: ImageSet,
    *,
    heldout: ImageSet | None = None,
    seed: int = 0,
    epochs: int = 20,
    max_steps: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    progress: Progress | None = None,
) -> ImageClassifier:
    """Trains a classifier with AdamW, a one-cycle rate (short warm-up, cosine to zero) and small random shifts.

    The same arguments and thread count give the same weights; the global random state is left as it was.

    Args:
        train: labelled images, every class at least once.
        heldout: labelled images on which `accuracy` is measured; left out, it stays None.
        seed: of the initial weights, the batches and the shifts.
        epochs: passes over the images, as long as they take at most `max_steps` steps.
        max_steps: limit; None keeps large data sets near a minute on two cores (1,200 steps for 28x28 pixels).
        progress: called with (steps done, steps in all).

    Returns:
        The classifier in evaluation mode, on the CPU.

    Raises:
        InputError: labels absent, a class without images, or images smaller than 8x8.
    """
    labels, images = check_labels(train, "train"), train.images
    count, channels, height, width = images.shape
    batch_size = min(batch_size, count)
    if max_steps is None:
        max_steps = min(3000, max(400, 1200 * 28 * 28 // (height * width)))
    steps = max(1, min(epochs * count // batch_size, max_steps))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = ImageClassifier(channels, (height, width), train.class_names)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.15)

    shift = max(1, min(height, width) // 14)
    classifier.train()
    for step in range(steps):
        index = rng.batch_indices(count, batch_size, step, seed)
        scores = classifier(_shifted(images[index], shift, seed, step))
        loss = F.cross_entropy(scores, labels[index], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    classifier.eval()
    classifier.seed = seed
    if heldout is not None:
        classifier.accuracy = measure_accuracy(classifier, heldout)
    return classifier


def measure_accuracy(classifier: ImageClassifier, images: ImageSet) -> float:
    """Share of the images, in [0, 1], whose label the classifier finds.

    Raises:
        InputError: no labels, or no images.
    """
    if images.labels is None or len(images.labels) == 0:
        raise InputError(
            f"heldout: {images.name} has {'no labels' if images.labels is None else 'no images'}; accuracy is measured "
            "on at least one labelled image. Give labelled images that were not used for training."
        )
    _, predicted = classifier.embed_and_classify(images.images)
    return float((predicted == images.labels.cpu()).double().mean())


class _GivenFeatures(nn.Module):
    """Lets torchmetrics take features that were computed already; it passes a module's input on unscaled."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, eq. 6).

        |m_s - m_r|^2 + trace(C_s + C_r - 2 (C_s C_r)^(1/2)),        C the unbiased covariances

    Args:
        samples: features of generated images, [N, F]; computed in float64.
        reference: features of real images, [M, F].

    Raises:
        InputError: fewer than two of either, or values that are not finite.
    """
    for name, features in (("samples", samples), ("reference", reference)):
        if len(features) < 2:
            raise InputError(f"{name}: got {len(features)} images; a covariance needs at least 2. Give more images.")
        if not bool(features.isfinite().all()):
            raise InputError(
                f"{name}: features hold NaN or infinity; only finite images have a distance. Check the model."
            )
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_GivenFeatures(samples.shape[1])).set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(samples.double(), real=False)
    # Two equal sets come out as a rounding error on either side of zero.
    return max(0.0, float(metric.compute()))
