"""Pictures in, tensors out: every place a user may keep images, read by one set of rules.

Whatever the source, an 8-bit pixel ``p`` becomes ``p / 127.5 - 1`` in float32, colour becomes gray by the ITU-R 601-2
luma in the integer arithmetic of Pillow's mode "L", and resizing is antialiased bicubic interpolation of that float
image (torch), one image at a time. The same pictures therefore give the same bits from PNG files, an IDX folder or an
.npz.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vdu_fast.errors import InputError
from vdu_fast.images import (
    IDX_PARTS,
    SUFFIXES,
    Listing,
    find_idx,
    is_grayscale,
    list_folder,
    read_idx_part,
    read_image,
    read_npz,
    to_channels,
)

Split = Literal["train", "heldout", "all"]

ACCEPTED = (
    "'digits'; a folder of class sub-folders; a flat folder of images; an IDX folder (MNIST layout); "
    "an .npz with 'images' and optional 'labels'; any of these with ':CLASS' at the end to keep one class"
)
_PICKLE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".joblib")
_HELD_EVERY = 5


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with the labels of their source, in the source's order.

    ``images`` is float32 ``[N, C, H, W]`` in [-1, 1]; ``labels`` is int64 ``[N]``, or None when the source has none;
    ``class_names[label]`` is the class's name, empty without labels and complete even when a class was selected;
    ``name`` is what the user wrote.
    """

    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def class_index(self, name_or_index: str | int) -> int:
        """Label of a class, given its name or its number (as an int, or as text where no class name is a number).

        Raises :class:`InputError`, listing the classes, when there is no such class or there are no labels.
        """
        return _class_index(name_or_index, self.class_names, self.name)

    def only(self, label: int) -> ImageSet:
        """The images of one class; :class:`InputError` if there are none."""
        return self._where(label, keep=True)

    def without(self, label: int) -> ImageSet:
        """The images of all other classes; :class:`InputError` if there are none."""
        return self._where(label, keep=False)

    def _where(self, label: int, *, keep: bool) -> ImageSet:
        label = self.class_index(label)
        assert self.labels is not None
        mask = (self.labels == label) == keep
        if not mask.any():
            raise InputError(
                f"data '{self.name}' has no images {'of' if keep else 'outside'} class '{self.class_names[label]}' "
                "in this split; use data that holds some, or another class"
            )
        return replace(self, images=self.images[mask], labels=self.labels[mask])


@dataclass(frozen=True)
class _Source:
    """A place that holds images, listed and checked but not yet decoded."""

    pixels: Callable[[int], np.ndarray]  # index -> [H, W, C], uint8, or float32 in [-1, 1]
    where: Callable[[int], str]  # index -> what to call that image in a message
    channels: Callable[[], int]  # channel count when the user asks for none
    labels: np.ndarray | None  # int64 [N]
    class_names: tuple[str, ...]
    held: np.ndarray  # bool [N], the held-out images


def load_images(
    data: str, *, split: Split = "train", resize: int | None = None, channels: int | None = None
) -> ImageSet:
    """Read images from any of the accepted sources.

    ``data`` is one of

    - ``digits``: the 1,797 digits of scikit-learn, ``[1, 8, 8]``, 0..16 mapped to ``x / 8 - 1``. (A folder of that
      name is reached as ``./digits``.)
    - a folder of class sub-folders (the class is the sub-folder's name; sorted, by number if all names are numbers)
      or a flat folder of images without labels. png, jpg, bmp, webp, tif; hidden and other files are ignored.
    - an IDX folder in MNIST layout: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the ``t10k-`` pair,
      with ``-idx`` or ``.idx``, gzipped or not, labels optional. Class names are the numbers.
    - an .npz with ``images`` and optionally ``labels`` (integers ``[N]`` from 0) and ``class_names`` (text). ``images``
      is ``[N, H, W]``, or 4-D with 1 to 4 channels on the last axis or on axis 1; where both could be the channels it
      is refused. uint8 is mapped as ``x / 127.5 - 1``; float must be finite and either within [0, 1], mapped to
      ``2 x - 1``, or within [-1, 1] with at least one negative value, taken as it is. Pickled objects are refused.

    and may end in ``:CLASS`` (name or number) to keep one class; a path that exists as written, colon included, wins.

    ``split``: ``heldout`` is the t10k part of an IDX folder that has one, elsewhere every fifth image of each class
    (number 4, 9, 14, ... within the class, or within the source if it has no labels); ``train`` is the rest; ``all``
    is everything. Order is always the source's.

    ``resize``: bring every image to ``resize x resize`` pixels, without cropping. Required if the sizes differ.

    ``channels``: convert to 1 or 3 channels (4 becomes 3 by dropping alpha). By default an array keeps its own, and a
    folder has 1 if every file in it is grayscale, else 3.

    Raises :class:`InputError` for anything else, with what to do about it.
    """
    if split not in get_args(Split):
        raise InputError(f"split: got {split!r}; accepted: {', '.join(get_args(Split))}")
    if resize is not None and resize < 1:
        raise InputError(f"resize: got {resize}; accepted: a whole number of pixels from 1. Use the model's image size")
    source, selected = _find(data)
    chosen = _choose(source, split, selected, data)
    images = _decode(source, chosen, resize, source.channels() if channels is None else channels, data)
    labels = None if source.labels is None else torch.from_numpy(source.labels[chosen])
    return ImageSet(images, labels, source.class_names, data)


def check_fits(
    images: ImageSet, *, sample_size: int | tuple[int, int] | None, channels: int, argument: str = "data"
) -> None:
    """Raise :class:`InputError` unless the images have the model's size and channel count.

    ``sample_size`` is in pixels, one number for a square or (height, width); None accepts any size. ``argument`` is
    the name that the message gives to the source of the images.
    """
    have_channels, *have_size = images.images.shape[1:]
    if have_channels != channels:
        remedy = (
            f"Pass --image_channels {channels} (channels={channels} in Python), which converts between gray and colour"
            if channels in (1, 3)
            else f"Pass an .npz whose images have {channels} channels"
        )
        raise InputError(
            f"{argument} '{images.name}': the images have {have_channels} channel(s); "
            f"the model takes {channels}. {remedy}"
        )
    if sample_size is None:
        return
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    if have_size != [height, width]:
        remedy = (
            f"Pass --resize {height} (resize={height} in Python)"
            if height == width
            else "--resize makes squares only: bring the pictures to this size beforehand"
        )
        raise InputError(
            f"{argument} '{images.name}': the images are {have_size[0]}x{have_size[1]} pixels (height x width); "
            f"the model takes {height}x{width}. {remedy}"
        )


# ---- From what the user wrote to a source and a choice of its images


def _find(data: str) -> tuple[_Source, str | None]:
    """The source that ``data`` names, and the class after the colon, if any."""
    if data == "digits" or data.startswith("digits:"):
        return _digits(), data.partition(":")[2] if ":" in data else None
    # The longest prefix that exists is the path, so colons may occur in paths and in class names.
    for end in [len(data), *(i for i in reversed(range(len(data))) if data[i] == ":")]:
        # os.path, because pathlib raises on names that the system finds too long.
        path = os.path.expanduser(data[:end])
        if os.path.exists(path):
            source = _folder(Path(path)) if os.path.isdir(path) else _file(Path(path))
            return source, data[end + 1 :] if end < len(data) else None
    raise InputError(
        f"data: got '{data}', which is neither a known name nor a path that exists; accepted: {ACCEPTED}. "
        f"Check the spelling; relative paths start at '{os.getcwd()}'"
    )


def _file(path: Path) -> _Source:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _array_source(*read_npz(path), str(path))
    if suffix in _PICKLE_SUFFIXES:
        remedy = "Pickles are refused, because loading one can run any code. Save the images with numpy.savez instead"
    elif suffix == ".npy":
        remedy = "Save it with numpy.savez(file, images=array, labels=labels) instead"
    elif suffix in SUFFIXES:
        remedy = "Put the pictures in a folder, and pass the folder"
    elif suffix in (".zip", ".tar", ".gz", ".tgz"):
        remedy = "Unpack it, and pass the folder"
    else:
        remedy = "Convert the images to PNG files or to an .npz"
    raise InputError(f"data: '{path}' is a file of an unsupported type; accepted: {ACCEPTED}. {remedy}")


def _class_index(name_or_index: str | int, class_names: tuple[str, ...], data: str) -> int:
    if not class_names:
        raise InputError(
            f"data '{data}' has no labels, so class '{name_or_index}' cannot be selected; accepted: class sub-folders, "
            "an IDX folder with its labels file, or an .npz with 'labels'. Add labels, or leave the class out"
        )
    if isinstance(name_or_index, str):
        if name_or_index in class_names:
            return class_names.index(name_or_index)
        # Where class names are numbers, a number that is none of them is a mistake, not a position.
        numbered = any(name.isdecimal() for name in class_names)
        index = int(name_or_index) if name_or_index.isdecimal() and not numbered else -1
    else:
        index = int(name_or_index)
    if 0 <= index < len(class_names):
        return index
    shown = ", ".join(class_names[:30]) + (f", ... ({len(class_names)} in all)" if len(class_names) > 30 else "")
    raise InputError(f"data '{data}' has no class {name_or_index!r}; choose one of: {shown}")


def _choose(source: _Source, split: Split, selected: str | None, data: str) -> np.ndarray:
    """Indices of the images of this split and class, ascending."""
    mask = np.ones(len(source.held), dtype=bool)
    if selected is not None:
        label = _class_index(selected, source.class_names, data)
        assert source.labels is not None
        mask = source.labels == label
        if not mask.any():
            raise InputError(f"data '{data}': class '{selected}' is empty; choose a class with images, or add some")
    if split != "all":
        in_split = mask & (source.held == (split == "heldout"))
        if not in_split.any():
            other = "train" if split == "heldout" else "heldout"
            raise InputError(
                f"data '{data}': none of its {mask.sum()} image(s) is in the {split} split (held out is the t10k part "
                f"of an IDX folder, elsewhere every {_HELD_EVERY}th image of a class); add images, or use the "
                f"'{other}' or 'all' split"
            )
        mask = in_split
    return np.flatnonzero(mask)


def _hold_out(labels: np.ndarray | None, count: int) -> np.ndarray:
    """Mark every fifth image of each class: bool ``[count]``."""
    held = np.zeros(count, dtype=bool)
    groups = [np.arange(count)] if labels is None else [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for group in groups:
        held[group[_HELD_EVERY - 1 :: _HELD_EVERY]] = True
    return held


# ---- From pixels to tensors


def _decode(source: _Source, chosen: np.ndarray, resize: int | None, channels: int, data: str) -> Tensor:
    """Decode, convert and resize the chosen images: float32 ``[N, C, H, W]`` in [-1, 1]."""
    images = torch.empty(0)
    for position, index in enumerate(chosen.tolist()):
        image = _to_tensor(to_channels(source.pixels(index), channels), resize)
        if position == 0:
            images = torch.empty(len(chosen), *image.shape)
        elif image.shape != images.shape[1:]:
            sizes = ["{}x{}".format(*shape[-2:]) for shape in (image.shape, images.shape)]
            raise InputError(
                f"data '{data}': {source.where(index)} is {sizes[0]} pixels (height x width) and "
                f"{source.where(int(chosen[0]))} is {sizes[1]}; accepted: images of one size. "
                "Pass --resize S (resize=S in Python) to bring all of them to S x S"
            )
        images[position] = image
    return images


def _to_tensor(pixels: np.ndarray, resize: int | None) -> Tensor:
    """Map ``[H, W, C]`` pixels to a float32 ``[C, H, W]`` image in [-1, 1], resized to a square if asked."""
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    if image.dtype == torch.uint8:
        image = image.float().div_(127.5).sub_(1)
    if resize is None or image.shape[1:] == (resize, resize):
        return image
    # Bicubic weights are negative in places, so an edge may overshoot the range.
    return interpolate(image[None], size=(resize, resize), mode="bicubic", antialias=True)[0].clamp_(-1, 1)


# ---- The sources


def _array_source(
    array: np.ndarray,
    labels: np.ndarray | None,
    class_names: tuple[str, ...],
    name: str,
    held: np.ndarray | None = None,
) -> _Source:
    """A source held in memory: ``[N, H, W, C]``, uint8, or float32 in [-1, 1]."""
    if array.size == 0:
        raise InputError(f"data: '{name}' has no images (shape {list(array.shape)}); pass a source that holds some")
    held = _hold_out(labels, len(array)) if held is None else held
    return _Source(lambda i: array[i], lambda i: f"image {i}", lambda: array.shape[-1], labels, class_names, held)


def _digits() -> _Source:
    from sklearn.datasets import load_digits  # a second of import time that other sources need not pay

    digits = load_digits()
    pixels = (digits.images / 8 - 1).astype(np.float32)[..., None]
    return _array_source(pixels, digits.target.astype(np.int64), tuple("0123456789"), "digits")


def _folder(folder: Path) -> _Source:
    parts = [part for part in IDX_PARTS if find_idx(folder, part, "images") or find_idx(folder, part, "labels")]
    if parts:
        return _idx_folder(folder, parts)
    top = list_folder(folder)
    classes = {sub: list_folder(sub) for sub in top.folders}
    _check_layout(folder, top, classes)
    if top.images:
        return _picture_source(folder, top.images, None, ())
    counts = [len(listing.images) for listing in classes.values()]
    files = [file for listing in classes.values() for file in listing.images]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return _picture_source(folder, files, labels, tuple(sub.name for sub in classes))


def _check_layout(folder: Path, top: Listing, classes: dict[Path, Listing]) -> None:
    """Accept images in the folder itself, or in each of its sub-folders; refuse what might be either or neither."""
    for sub, listing in classes.items():
        for deeper in listing.folders:
            if list_folder(deeper).images:
                raise InputError(
                    f"data: '{folder}' holds images two levels down, in '{deeper}'; accepted: class sub-folders one "
                    f"level down. Pass '{sub}', or move the images up"
                )
    filled = [sub.name for sub, listing in classes.items() if listing.images]
    empty = [sub.name for sub, listing in classes.items() if not listing.images]
    if not top.images and not filled:
        ignored = top.others + sum(listing.others for listing in classes.values())
        raise InputError(
            f"data: no images in '{folder}' or its {len(classes)} sub-folder(s)"
            + (f" ({ignored} file(s) of other types ignored)" if ignored else "")
            + f"; accepted: {', '.join(SUFFIXES)} files or an IDX folder (MNIST layout). Check the path, or add images"
        )
    if top.images and filled:
        raise InputError(
            f"data: '{folder}' holds images beside sub-folders with images ('{filled[0]}'), so which are meant is "
            "unclear; accepted: one or the other. Move the loose images, or pass one sub-folder"
        )
    if filled and empty:
        raise InputError(
            f"data: class '{empty[0]}' of '{folder}' is empty; accepted: {', '.join(SUFFIXES)} files in every "
            "sub-folder. Add images to it, or remove it"
        )


def _picture_source(
    folder: Path, files: list[Path], labels: np.ndarray | None, class_names: tuple[str, ...]
) -> _Source:
    return _Source(
        pixels=lambda i: read_image(files[i]),
        where=lambda i: f"'{files[i].relative_to(folder)}'",
        channels=lambda: 1 if all(is_grayscale(file) for file in files) else 3,
        labels=labels,
        class_names=class_names,
        held=_hold_out(labels, len(files)),
    )


def _idx_folder(folder: Path, parts: list[str]) -> _Source:
    """The parts of an IDX folder one after the other, with t10k held out if it is there."""
    loaded = [read_idx_part(folder, part) for part in parts]
    images, labels = [images for images, _ in loaded], [labels for _, labels in loaded if labels is not None]
    if len({part.shape[1:] for part in images}) > 1:
        raise InputError(
            f"data: the train and t10k images of '{folder}' differ in size ({list(images[0].shape[1:3])} and "
            f"{list(images[1].shape[1:3])}); accepted: one size. Put files of one data set in the folder"
        )
    if len(labels) not in (0, len(parts)):
        raise InputError(
            f"data: '{folder}' has labels for only one of its parts ({', '.join(parts)}); accepted: "
            "'train-labels-idx1-ubyte' and 't10k-labels-idx1-ubyte', both or neither. Add the missing file, or remove "
            "the other"
        )
    held = np.repeat([part == "t10k" for part in parts], [len(part) for part in images]) if "t10k" in parts else None
    all_labels = np.concatenate(labels) if labels else None
    classes = int(all_labels.max()) + 1 if all_labels is not None and len(all_labels) else 0
    return _array_source(np.concatenate(images), all_labels, tuple(map(str, range(classes))), str(folder), held)
