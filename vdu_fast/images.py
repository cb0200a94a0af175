"""Image files to arrays: pictures (png, jpg, ...), IDX files (MNIST layout) and .npz archives.

Pictures of every format follow one set of rules: transparency is dropped and palettes are expanded as Pillow does it,
the EXIF orientation is applied, 16-bit channels keep their high byte, and a file with several frames is refused.
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageFile, ImageOps

from vdu_fast.errors import InputError

# ---- Pictures

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
_LUMA = (19595, 38470, 7471)
_GRAYSCALE_MODES = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N")
# Pillow reports a damaged file through any of these, depending on the format and on where the damage is.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Listing:
    """What one folder holds, hidden entries left out; both lists in the order of :func:`_in_order`."""

    images: list[Path]
    folders: list[Path]
    others: int  # files that are not pictures


def _in_order(paths: list[Path], number: Callable[[Path], str]) -> list[Path]:
    """Sort by name, or by ``number(path)`` where that is a whole number for every path, so that 2 precedes 10."""
    if all(number(path).isascii() and number(path).isdecimal() for path in paths):
        return sorted(paths, key=lambda path: (int(number(path)), path.name))
    return sorted(paths, key=lambda path: path.name)


def list_folder(folder: Path) -> Listing:
    """List the pictures, sub-folders and other files of ``folder``, without going deeper.

    Raises :class:`InputError` when the folder cannot be read, and when it holds a GIF: its first frame alone would be
    a surprise, and skipping it a silent loss.
    """
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"data: cannot list the folder '{folder}' ({error}); check its permissions") from error
    folders = [entry for entry in entries if entry.is_dir()]
    files = [entry for entry in entries if not entry.is_dir()]
    for file in files:
        if file.suffix.lower() == ".gif":
            raise InputError(
                f"data: '{file}' is a GIF, which may hold several frames; accepted: {', '.join(SUFFIXES)}. "
                "Convert it to PNG (one file per frame), or move it out of the folder"
            )
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    return Listing(
        images=_in_order(images, lambda path: path.stem),
        folders=_in_order(folders, lambda path: path.name),
        others=len(files) - len(images),
    )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open ``path`` with Pillow; whatever damage shows inside the block becomes an :class:`InputError`."""
    # Another library may have told Pillow to fill the missing part of a truncated picture with grey.
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except InputError:
        raise
    except _DAMAGED as error:
        raise InputError(
            f"data: cannot read the image '{path}': unreadable or truncated ({error}); accepted: whole "
            f"{', '.join(SUFFIXES)} files. Replace the file with an intact copy, or move it out of the folder"
        ) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def is_grayscale(path: Path) -> bool:
    """Whether the file's header declares gray pixels (a palette counts as colour). Decodes nothing."""
    with _opened(path) as image:
        return image.mode in _GRAYSCALE_MODES


def read_image(path: Path) -> np.ndarray:
    """Decode one picture: uint8 ``[H, W, 1]`` if it is grayscale, else ``[H, W, 3]`` in RGB order.

    Raises :class:`InputError`, naming the file, when it is damaged, holds several frames, or has 32-bit pixels (they
    have no defined white).
    """
    with _opened(path) as image:
        # An MPO is a camera's JPEG with previews behind it; its first frame is the picture.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise InputError(
                f"data: '{path}' holds several frames; accepted: one picture per file. "
                "Save each frame as a file of its own, or move it out of the folder"
            )
        if image.mode in ("I", "F"):
            raise InputError(
                f"data: '{path}' has 32-bit pixels (Pillow mode {image.mode}); accepted: 8 or 16 bits per channel. "
                "Convert it to an 8-bit PNG, or pass an .npz with float images in [0, 1]"
            )
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            return (np.asarray(upright) >> 8).astype(np.uint8)[..., None]
        if upright.mode in _GRAYSCALE_MODES:
            return np.array(upright.convert("L"))[..., None]
        # Through RGBA, because Pillow warns about a palette with transparency when converted directly.
        flat = upright.convert("RGBA") if upright.mode == "P" else upright
        return np.array(flat.convert("RGB"))


def to_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Convert ``[H, W, C]`` to ``[H, W, channels]``, in the same dtype.

    Gray to RGB repeats it, RGB to gray is the ITU-R 601-2 luma (for uint8 with the bits of Pillow's mode "L"), RGBA
    loses its alpha. Raises :class:`InputError` for any other change.
    """
    have = pixels.shape[-1]
    if have == channels:
        return pixels
    if channels not in (1, 3) or have not in (1, 3, 4):
        raise InputError(
            f"channels: cannot convert images of {have} channel(s) to {channels}; accepted: 1 (gray) or 3 (RGB), from "
            "gray, RGB or RGBA. Pass an .npz that has the channels, and leave this setting out"
        )
    if have == 1:
        return np.repeat(pixels, 3, axis=-1)
    if channels == 3:
        return pixels[..., :3]
    if pixels.dtype == np.uint8:
        return ((_luma(pixels.astype(np.uint32)) + 0x8000) >> 16).astype(np.uint8)
    return _luma(pixels) / 65536


def _luma(pixels: np.ndarray) -> np.ndarray:
    """ITU-R 601-2 luma times 2^16: ``[H, W, 3 or 4]`` to ``[H, W, 1]``."""
    return pixels[..., 0:1] * _LUMA[0] + pixels[..., 1:2] * _LUMA[1] + pixels[..., 2:3] * _LUMA[2]


# ---- IDX, the format of MNIST: 0, 0, type, number of dimensions; big-endian uint32 sizes; the bytes

IDX_PARTS = ("train", "t10k")
_IDX_UINT8 = 0x08


def find_idx(folder: Path, part: str, kind: Literal["images", "labels"]) -> Path | None:
    """The file of one part under any of its usual names, unpacked before gzipped; None if there is none."""
    dimensions = 3 if kind == "images" else 1
    names = [f"{part}-{kind}{separator}idx{dimensions}-ubyte" for separator in "-."]
    paths = [folder / (name + gz) for gz in ("", ".gz") for name in names]
    return next((path for path in paths if path.is_file()), None)


def read_idx_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Images uint8 ``[N, H, W, 1]`` and labels int64 ``[N]`` (None without a labels file) of ``train`` or ``t10k``.

    Raises :class:`InputError` when the images are absent, a file is damaged, or the counts differ.
    """
    images_path, labels_path = find_idx(folder, part, "images"), find_idx(folder, part, "labels")
    if images_path is None:
        raise InputError(
            f"data: '{folder}' has {part} labels but no {part} images; accepted: '{part}-images-idx3-ubyte', gzipped "
            "or not, beside them. Add that file, or remove the labels"
        )
    images = _read_idx(images_path, 3)[..., None]
    if labels_path is None:
        return images, None
    labels = _read_idx(labels_path, 1).astype(np.int64)
    if len(labels) != len(images):
        raise InputError(
            f"data: '{labels_path}' has {len(labels)} labels and '{images_path}' {len(images)} images; accepted: one "
            "label per image. Get both files from the same source again"
        )
    return images, labels


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of an unsigned-byte IDX file with this many dimensions."""
    try:
        raw = path.read_bytes()
        # By content, not by name: downloads are often unpacked and keep their .gz.
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except _DAMAGED as error:
        raise InputError(f"data: cannot read '{path}': unreadable or truncated ({error}); download it again") from error
    magic = bytes([0, 0, _IDX_UINT8, dimensions])
    if raw[:4] != magic:
        raise InputError(
            f"data: '{path}' starts with bytes {raw[:4].hex(' ') or '(none)'}; accepted: {magic.hex(' ')} (unsigned "
            f"bytes, {dimensions} dimension(s)). Check that images and labels are not swapped, or download it again"
        )
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", raw[4:start]) if len(raw) >= start else None
    if shape is None or len(raw) - start != math.prod(shape):
        announced = "an incomplete header" if shape is None else f"a header for {math.prod(shape)} bytes {list(shape)}"
        raise InputError(
            f"data: '{path}' is truncated or damaged: {announced} and {max(len(raw) - start, 0)} bytes after it; "
            "download it again"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()


# ---- .npz

_NPZ_ARRAYS = ("images", "labels", "class_names")
_MAX_CLASSES = 65536


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """Images ``[N, H, W, C]`` (uint8, or float32 in [-1, 1]), labels int64 ``[N]`` or None, and the class names.

    The rules are those of :func:`vdu_fast.data.load_images`; class names default to the numbers.
    """
    names_in_file, arrays = _npz_arrays(path)
    if "images" not in arrays:
        raise InputError(
            f"data: '{path}' has no array 'images' (it has: {', '.join(names_in_file) or 'none'}); accepted: "
            "'images' and optional 'labels', 'class_names'. Save it with numpy.savez(file, images=..., labels=...)"
        )
    images = _in_range(_channels_last(arrays["images"], path), path)
    if "labels" not in arrays:
        return images, None, ()
    labels = arrays["labels"]
    usable = labels.shape == (len(images),) and labels.dtype.kind in "iu"
    if not usable or (labels.size and not 0 <= labels.min() <= labels.max() < _MAX_CLASSES):
        found = f", {labels.min()} to {labels.max()}" if usable else ""
        raise InputError(
            f"data: 'labels' of '{path}' is {labels.dtype} {list(labels.shape)}{found} for {len(images)} images; "
            f"accepted: one integer from 0 to {_MAX_CLASSES - 1} per image, shape [N]. Number the classes; "
            "their names may be put in 'class_names'"
        )
    classes = int(labels.max()) + 1 if labels.size else 0
    if "class_names" not in arrays:
        return images, labels.astype(np.int64), tuple(map(str, range(classes)))
    names = arrays["class_names"]
    if names.ndim != 1 or names.dtype.kind != "U" or len(names) < classes or len(set(names.tolist())) < len(names):
        raise InputError(
            f"data: 'class_names' of '{path}' is {names.dtype} {list(names.shape)} for labels up to {classes - 1}; "
            "accepted: one distinct text per label, shape [classes]. Correct it, or leave it out"
        )
    return images, labels.astype(np.int64), tuple(names.tolist())


def _npz_arrays(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of all arrays in the archive, and the arrays that are ours to read."""
    damaged = f"data: cannot read '{path}': unreadable or truncated"
    accepted = "accepted: an intact archive of plain arrays, as numpy.savez writes it. Write it again"
    # numpy takes whatever is no archive for a pickle, and would say so of a truncated file.
    if not zipfile.is_zipfile(path):
        raise InputError(f"{damaged}, or not an .npz archive (pickles are refused); {accepted}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive.files, {name: archive[name] for name in _NPZ_ARRAYS if name in archive.files}
    except (*_DAMAGED, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            raise InputError(
                f"data: '{path}' holds pickled objects, which are refused, because loading one can run any code; "
                f"{accepted}, without dtype=object"
            ) from error
        raise InputError(f"{damaged} ({error}); {accepted}") from error


def _channels_last(images: np.ndarray, path: Path) -> np.ndarray:
    """View ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` as ``[N, H, W, C]``."""
    if images.ndim == 3:
        return images[..., None]
    if images.ndim == 4:
        last, first = images.shape[3] in range(1, 5), images.shape[1] in range(1, 5)
        if last != first:
            return images if last else images.transpose(0, 2, 3, 1)
    raise InputError(
        f"data: 'images' of '{path}' has shape {list(images.shape)}; accepted: [N, H, W], or [N, H, W, C] or "
        "[N, C, H, W] where exactly one of the two places for C is from 1 to 4. Reshape it"
    )


def _in_range(images: np.ndarray, path: Path) -> np.ndarray:
    """uint8 as it is; float as float32 in [-1, 1], from [0, 1] or [-1, 1]."""
    if images.dtype == np.uint8 or images.size == 0:
        return images
    accepted = "accepted: uint8, or finite float within [0, 1] or [-1, 1]"
    if images.dtype.kind != "f":
        raise InputError(f"data: 'images' of '{path}' is {images.dtype}; {accepted}. Convert it with .astype('uint8')")
    if not np.isfinite(images).all():
        raise InputError(f"data: 'images' of '{path}' holds NaN or infinity; {accepted}. Find and mend those images")
    low, high = float(images.min()), float(images.max())
    if low < -1 or high > 1:
        raise InputError(
            f"data: 'images' of '{path}' is {images.dtype} from {low:g} to {high:g}; {accepted}. Save 0..255 as uint8, "
            "or rescale"
        )
    images = images.astype(np.float32)
    return images if low < 0 else 2 * images - 1
