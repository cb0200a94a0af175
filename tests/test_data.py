"""Every source gives the same tensors for the same pictures, and every bad input says what to do next."""

from __future__ import annotations

import gzip
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from vdu_fast.data import ImageSet, check_fits, load_images
from vdu_fast.errors import InputError

GRAY = np.random.default_rng(0).integers(0, 256, (20, 12, 10), dtype=np.uint8)  # [N, H, W]
COLOUR = np.random.default_rng(1).integers(0, 256, (20, 12, 10, 3), dtype=np.uint8)
LABELS = np.repeat(np.arange(3, dtype=np.uint8), [12, 5, 3])


def write_class_folder(root: Path, images: np.ndarray, labels: np.ndarray, suffix: str = ".png") -> Path:
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}{suffix}")
    return root


def write_flat_folder(root: Path, images: np.ndarray) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(root / f"{index}.png")
    return root


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx_folder(root: Path, images: np.ndarray, labels: np.ndarray | None, part: str = "train") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
    if labels is not None:
        (root / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return root


def write_npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def to_float(pixels: np.ndarray) -> torch.Tensor:
    """The stated rule for 8-bit pixels, written independently: [N, H, W] or [N, H, W, 3] to [N, C, H, W]."""
    tensor = torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1
    return tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)


def refusal(data: object, **settings) -> str:
    with pytest.raises(InputError) as caught:
        load_images(str(data), **settings)
    return str(caught.value)


def assert_says(message: str, *patterns: str) -> None:
    for pattern in patterns:
        assert re.search(pattern, message), f"{pattern!r} not in: {message}"


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    return write_class_folder(tmp_path / "classes", GRAY, LABELS)


# ---- Sources


def test_digits_are_the_real_ones_scaled_by_eighths():
    digits = load_images("digits", split="all")
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.float32
    assert digits.labels.dtype == torch.int64
    assert digits.class_names == tuple("0123456789")
    assert digits.name == "digits"
    assert (digits.images.min(), digits.images.max()) == (-1, 1)
    assert torch.equal(digits.images * 8, (digits.images * 8).round())
    assert digits.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_digits_survive_a_round_trip_through_png(tmp_path: Path):
    digits = load_images("digits", split="all")
    pixels = ((digits.images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
    order = torch.argsort(digits.labels, stable=True)
    write_class_folder(tmp_path, pixels[order], digits.labels[order].numpy())
    back = load_images(str(tmp_path), split="all")
    assert torch.equal(back.labels, digits.labels[order])
    assert (back.images - digits.images[order]).abs().max() <= 1 / 255 + 1e-6


def test_class_folder(class_folder: Path):
    loaded = load_images(str(class_folder), split="all")
    assert torch.equal(loaded.images, to_float(GRAY))
    assert loaded.labels.tolist() == LABELS.tolist()
    assert loaded.class_names == ("0", "1", "2")
    assert len(loaded) == 20


def test_class_folders_named_by_numbers_are_sorted_as_numbers_and_others_as_text(tmp_path: Path):
    numbers = write_class_folder(tmp_path / "numbers", GRAY[:3], np.array(["10", "2", "1"]))
    assert load_images(str(numbers)).class_names == ("1", "2", "10")
    texts = write_class_folder(tmp_path / "texts", GRAY[:3], np.array(["v10", "v2", "v1"]))
    assert load_images(str(texts)).class_names == ("v1", "v10", "v2")
    versions = write_class_folder(tmp_path / "versions", GRAY[:3], np.array(["10.5", "2.5", "1.5"]))
    assert load_images(str(versions)).class_names == ("1.5", "10.5", "2.5")


def test_flat_folder_has_no_labels_and_keeps_the_order_of_numbered_files(tmp_path: Path):
    loaded = load_images(str(write_flat_folder(tmp_path / "flat", GRAY)), split="all")
    assert loaded.labels is None
    assert loaded.class_names == ()
    assert torch.equal(loaded.images, to_float(GRAY))


def test_hidden_and_other_files_are_ignored(class_folder: Path):
    for name in (".DS_Store", "0/.DS_Store", "0/._1.png", "0/notes.txt"):
        (class_folder / name).write_bytes(b"not a picture")
    (class_folder / ".cache").mkdir()
    assert torch.equal(load_images(str(class_folder), split="all").images, to_float(GRAY))


@pytest.mark.parametrize("resize", [None, 7, 10, 16])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_png_idx_and_npz_of_the_same_pictures_give_the_same_bits(tmp_path: Path, resize, channels):
    folder = write_class_folder(tmp_path / "png", GRAY, LABELS)
    others = [
        str(write_idx_folder(tmp_path / "idx", GRAY, LABELS)),
        write_npz(tmp_path / "a.npz", images=GRAY, labels=LABELS),
    ]
    for split in ("train", "heldout", "all"):
        want = load_images(str(folder), split=split, resize=resize, channels=channels)
        assert want.images.shape[1:] == (channels or 1, *([resize, resize] if resize else [12, 10]))
        for other in others:
            got = load_images(other, split=split, resize=resize, channels=channels)
            assert torch.equal(got.images, want.images)
            assert torch.equal(got.labels, want.labels)
            assert got.class_names == want.class_names


@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("gz", [False, True])
def test_idx_file_names(tmp_path: Path, separator: str, gz: bool):
    for kind, array in (("images", GRAY), ("labels", LABELS)):
        name = f"train-{kind}{separator}idx{array.ndim}-ubyte" + (".gz" if gz else "")
        raw = idx_bytes(array)
        (tmp_path / name).write_bytes(gzip.compress(raw) if gz else raw)
    loaded = load_images(str(tmp_path), split="all")
    assert torch.equal(loaded.images, to_float(GRAY))
    assert loaded.labels.tolist() == LABELS.tolist()


def test_idx_file_that_was_unpacked_but_kept_its_gz_name(tmp_path: Path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(idx_bytes(GRAY))
    assert torch.equal(load_images(str(tmp_path), split="all").images, to_float(GRAY))


def test_idx_t10k_is_the_held_out_split(tmp_path: Path):
    write_idx_folder(tmp_path, GRAY[:14], LABELS[:14])
    write_idx_folder(tmp_path, GRAY[14:], LABELS[14:], "t10k")
    assert torch.equal(load_images(str(tmp_path), split="train").images, to_float(GRAY[:14]))
    assert torch.equal(load_images(str(tmp_path), split="heldout").images, to_float(GRAY[14:]))
    everything = load_images(str(tmp_path), split="all")
    assert torch.equal(everything.images, to_float(GRAY))
    # Class 2 is in t10k alone, and both splits number and name the classes alike.
    assert load_images(str(tmp_path), split="train").class_names == everything.class_names == ("0", "1", "2")


def test_idx_without_labels(tmp_path: Path):
    loaded = load_images(str(write_idx_folder(tmp_path, GRAY, None)), split="all")
    assert loaded.labels is None
    assert torch.equal(loaded.images, to_float(GRAY))


@pytest.mark.parametrize(
    ("stored", "want"),
    [
        (GRAY, to_float(GRAY)),
        (GRAY[..., None], to_float(GRAY)),
        (COLOUR, to_float(COLOUR)),
        (COLOUR.transpose(0, 3, 1, 2), to_float(COLOUR)),
        (COLOUR[..., :2], to_float(COLOUR)[:, :2]),
    ],
    ids=["NHW", "NHW1", "NHWC", "NCHW", "two channels"],
)
def test_npz_layouts(tmp_path: Path, stored: np.ndarray, want: torch.Tensor):
    loaded = load_images(write_npz(tmp_path / "a.npz", images=stored), split="all")
    assert loaded.labels is None
    assert torch.equal(loaded.images, want)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f4"])
def test_npz_float_ranges(tmp_path: Path, dtype):
    unit = (GRAY / 255).astype(dtype)
    from_unit = load_images(write_npz(tmp_path / "unit.npz", images=unit), split="all").images
    from_signed = load_images(write_npz(tmp_path / "signed.npz", images=2 * unit - 1), split="all").images
    assert from_unit.dtype == from_signed.dtype == torch.float32
    torch.testing.assert_close(from_unit, to_float(GRAY), rtol=0, atol=1e-6)
    torch.testing.assert_close(from_signed, to_float(GRAY), rtol=0, atol=1e-6)


def test_npz_range_is_that_of_the_whole_array_not_of_the_chosen_class(tmp_path: Path):
    images = np.stack([np.full((8, 8), value, np.float32) for value in (0.5, -0.5)])
    path = write_npz(tmp_path / "a.npz", images=images, labels=np.array([0, 1]))
    assert load_images(path + ":0", split="all").images.unique().tolist() == [0.5]


def test_npz_class_names_and_unrelated_arrays(tmp_path: Path):
    names = np.array(["cat", "dog", "eel"])
    other = np.array([{"not": "ours"}], dtype=object)
    path = write_npz(tmp_path / "a.npz", images=GRAY, labels=LABELS, class_names=names, other=other)
    loaded = load_images(f"{path}:dog", split="all")
    assert loaded.class_names == ("cat", "dog", "eel")
    assert torch.equal(loaded.images, to_float(GRAY[12:17]))


# ---- Picture formats, channels, size


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".TIFF"])
def test_lossless_formats_give_the_same_bits(tmp_path: Path, suffix: str):
    write_class_folder(tmp_path, COLOUR, LABELS, suffix)
    assert torch.equal(load_images(str(tmp_path), split="all").images, to_float(COLOUR))


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_lossy_formats_give_what_pillow_decodes(tmp_path: Path, suffix: str):
    write_class_folder(tmp_path, COLOUR, LABELS, suffix)
    want = np.stack([np.asarray(Image.open(tmp_path / str(c) / f"{i}{suffix}")) for i, c in enumerate(LABELS)])
    assert torch.equal(load_images(str(tmp_path), split="all").images, to_float(want))


def test_channels_default_to_one_only_if_every_file_is_gray(tmp_path: Path):
    write_class_folder(tmp_path, GRAY, LABELS)
    assert load_images(str(tmp_path)).images.shape[1] == 1
    Image.fromarray(COLOUR[0]).save(tmp_path / "2" / "99.png")
    assert load_images(str(tmp_path)).images.shape[1] == 3
    # The rule looks at the whole folder, so every class of it comes with the same channels.
    gray_class = load_images(f"{tmp_path}:0", split="all")
    assert torch.equal(gray_class.images, to_float(GRAY[:12]).expand(-1, 3, -1, -1))


def test_colour_to_gray_has_the_bits_of_pillow_from_every_source(tmp_path: Path):
    write_class_folder(tmp_path / "png", COLOUR, LABELS)
    want = to_float(np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in COLOUR]))
    assert torch.equal(load_images(str(tmp_path / "png"), split="all", channels=1).images, want)
    as_bytes = write_npz(tmp_path / "a.npz", images=COLOUR)
    assert torch.equal(load_images(as_bytes, split="all", channels=1).images, want)
    as_float = write_npz(tmp_path / "b.npz", images=(COLOUR / 255).astype(np.float32))
    got = load_images(as_float, split="all", channels=1).images
    torch.testing.assert_close(got, want, rtol=0, atol=1 / 255 + 1e-6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "1", "P", "CMYK"])
def test_other_pillow_modes_convert_as_pillow_does(tmp_path: Path, mode: str):
    picture = Image.fromarray(COLOUR[0]).convert(mode)
    picture.save(tmp_path / "a.tif")
    gray = mode in ("LA", "1")
    want = np.asarray(picture.convert("L" if gray else "RGB"))[None]
    loaded = load_images(str(tmp_path))
    assert loaded.images.shape[1] == (1 if gray else 3)
    assert torch.equal(loaded.images, to_float(want))


def test_transparency_is_dropped_without_a_warning(tmp_path: Path):
    palette = Image.fromarray(COLOUR[0]).convert("P")
    palette.save(tmp_path / "palette.png", transparency=bytes(10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load_images(str(tmp_path)).images, to_float(np.asarray(palette.convert("RGB"))[None]))
    path = write_npz(tmp_path / "a.npz", images=np.concatenate([COLOUR, GRAY[..., None]], axis=-1))
    assert load_images(path, split="all").images.shape[1] == 4
    assert torch.equal(load_images(path, split="all", channels=3).images, to_float(COLOUR))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_gray_keeps_its_high_byte(tmp_path: Path, suffix: str):
    low_byte = np.random.default_rng(2).integers(0, 256, GRAY[0].shape, dtype=np.uint16)
    Image.fromarray(GRAY[0].astype(np.uint16) * 256 + low_byte).save(tmp_path / f"a{suffix}")
    assert torch.equal(load_images(str(tmp_path)).images, to_float(GRAY[:1]))


def test_exif_orientation_is_applied(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways: show turned by 90 degrees clockwise
    Image.fromarray(GRAY[0]).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(load_images(str(tmp_path)).images, to_float(np.rot90(GRAY[0], -1)[None].copy()))


def test_a_camera_jpeg_with_a_preview_behind_it_is_its_first_picture(tmp_path: Path):
    pictures = [Image.fromarray(image) for image in COLOUR[:2]]
    pictures[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=pictures[1:])
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.n_frames == 2
        want = to_float(np.asarray(stored)[None])
    assert torch.equal(load_images(str(tmp_path)).images, want)


def test_resize_is_antialiased_and_stays_in_range(tmp_path: Path):
    stripes = np.tile([0, 0, 0, 255], 8).astype(np.uint8) * np.ones((32, 1), np.uint8)
    halves = np.repeat([0, 255], 16).astype(np.uint8) * np.ones((32, 1), np.uint8)
    path = write_npz(tmp_path / "a.npz", images=np.stack([stripes, halves]))
    small = load_images(path, split="all", resize=8).images
    # A quarter of each stripe is white; plain bicubic sampling would miss it and give black.
    torch.testing.assert_close(small[0, :, :, 1:-1], torch.full((1, 8, 6), -0.5), rtol=0, atol=0.05)
    assert (small[1].min(), small[1].max()) == (-1, 1)


def test_resize_brings_images_of_different_sizes_together(tmp_path: Path):
    write_flat_folder(tmp_path, GRAY[:3])
    Image.fromarray(GRAY[3, :9, :7]).save(tmp_path / "3.png")
    loaded = load_images(str(tmp_path), split="all", resize=8)
    assert loaded.images.shape == (4, 1, 8, 8)
    # A neighbour of another size changes nothing.
    (tmp_path / "3.png").unlink()
    assert torch.equal(load_images(str(tmp_path), split="all", resize=8).images, loaded.images[:3])


# ---- Splits and classes


@pytest.mark.parametrize("data", ["digits", "digits:7", "labelled", "unlabelled"])
def test_splits_are_deterministic_disjoint_and_complete(tmp_path: Path, data: str):
    if data.endswith("labelled"):
        labels = {"labels": LABELS} if data == "labelled" else {}
        data = write_npz(tmp_path / "a.npz", images=GRAY, **labels)
    train, heldout, everything = (load_images(data, split=split).images for split in ("train", "heldout", "all"))
    assert torch.equal(train, load_images(data).images)

    # Rows as bytes, so that equal pictures in the source count as often as they occur.
    def rows(images: torch.Tensor) -> list[bytes]:
        return sorted(image.numpy().tobytes() for image in images)

    assert rows(torch.cat([train, heldout])) == rows(everything)
    assert 0 < len(heldout) < len(train)


def test_heldout_is_every_fifth_of_each_class_wherever_the_class_lies(tmp_path: Path):
    labels = np.tile([1, 0], 10)
    path = write_npz(tmp_path / "a.npz", images=GRAY, labels=labels)
    held = [8, 9, 18, 19]  # the fifth and tenth of class 1 (even positions) and of class 0 (odd ones)
    assert torch.equal(load_images(path, split="heldout").images, to_float(GRAY[held]))
    kept = [i for i in range(20) if i not in held]
    assert torch.equal(load_images(path, split="train").images, to_float(GRAY[kept]))
    flat = write_npz(tmp_path / "b.npz", images=GRAY)
    assert torch.equal(load_images(flat, split="heldout").images, to_float(GRAY[4::5]))


@pytest.mark.parametrize("split", ["train", "heldout", "all"])
def test_class_and_split_compose(class_folder: Path, split):
    chosen = load_images(f"{class_folder}:1", split=split)
    whole = load_images(str(class_folder), split=split).only(1)
    assert torch.equal(chosen.images, whole.images)
    assert chosen.labels.tolist() == whole.labels.tolist() == [1] * len(chosen)
    assert chosen.class_names == ("0", "1", "2")
    assert chosen.name == f"{class_folder}:1"


def test_only_and_without_partition(class_folder: Path):
    images = load_images(str(class_folder), split="all")
    one, rest = images.only(1), images.without(1)
    assert torch.equal(one.images, to_float(GRAY[12:17]))
    assert rest.labels.tolist() == [0] * 12 + [2] * 3
    assert len(one) + len(rest) == len(images)
    assert rest.class_names == images.class_names


def test_class_index_by_name_and_by_number():
    animals = ImageSet(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), ("cat", "dog"), "zoo")
    assert [animals.class_index(c) for c in ("cat", "dog", 0, 1, "1")] == [0, 1, 0, 1, 1]
    numbers = ImageSet(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), ("1", "2"), "numbers")
    assert [numbers.class_index(c) for c in ("1", "2", 0, 1)] == [0, 1, 0, 1]
    with pytest.raises(InputError, match="no class '0'; choose one of: 1, 2"):
        numbers.class_index("0")
    for unknown in ("fox", 2, -1):
        with pytest.raises(InputError, match=f"data 'zoo' has no class {unknown!r}; choose one of: cat, dog"):
            animals.class_index(unknown)


def test_only_and_without_refuse_to_return_nothing():
    lone = ImageSet(torch.zeros(2, 1, 8, 8), torch.tensor([1, 1]), ("cat", "dog"), "zoo")
    with pytest.raises(InputError, match="no images of class 'cat'"):
        lone.only(0)
    with pytest.raises(InputError, match="no images outside class 'dog'"):
        lone.without(1)


def test_colons_in_paths_and_class_names(tmp_path: Path):
    write_class_folder(tmp_path / "odd", GRAY, np.repeat(["name", "c"], 10))
    folder = write_class_folder(tmp_path / "odd:name", GRAY, np.repeat(["a:b", "c"], 10))
    assert len(load_images(str(folder), split="all")) == 20
    assert torch.equal(load_images(f"{folder}:c", split="all").images, to_float(GRAY[10:]))
    assert torch.equal(load_images(f"{folder}:a:b", split="all").images, to_float(GRAY[:10]))
    # The longest path that exists wins over a class of the shorter one.
    assert load_images(str(folder)).class_names == load_images(f"{folder}:c").class_names == ("a:b", "c")


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_class_folder(tmp_path / "pictures", GRAY, LABELS)
    assert len(load_images("~/pictures:2", split="all")) == 3


# ---- Bad input


@pytest.mark.parametrize("data", ["", ":", "digit", "no/such/folder", "no/such:3", "x" * 5000])
def test_neither_a_name_nor_a_path(data: str):
    assert_says(
        refusal(data), "data: got .*neither a known name nor a path", "'digits'; a folder", "IDX", ".npz", "spelling"
    )


def test_unknown_split_and_resize():
    assert_says(refusal("digits", split="test"), "split: got 'test'; accepted: train, heldout, all")
    assert_says(refusal("digits", resize=0), "resize: got 0; accepted")


def test_empty_folders(tmp_path: Path):
    assert_says(refusal(tmp_path), "no images in .* 0 sub-folder", r"accepted: \.png", "Check the path")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / ".hidden.png").touch()
    assert_says(refusal(tmp_path), r"2 sub-folder\(s\) \(1 file\(s\) of other types ignored\)")


def test_empty_class_folder(class_folder: Path):
    (class_folder / "3").mkdir()
    assert_says(refusal(class_folder), "class '3' of .* is empty", "remove it")


def test_loose_images_beside_class_folders(class_folder: Path):
    Image.fromarray(GRAY[0]).save(class_folder / "loose.png")
    assert_says(refusal(class_folder), r"beside sub-folders with images \('0'\)", "Move the loose images")


def test_images_two_levels_down(tmp_path: Path):
    write_class_folder(tmp_path / "train", GRAY, LABELS)
    assert_says(refusal(tmp_path), "two levels down, in '.*train/0'", f"Pass '{tmp_path}/train'")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".tif"])
@pytest.mark.parametrize("tolerant", [False, True])
def test_truncated_image(tmp_path: Path, suffix: str, tolerant: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    write_class_folder(tmp_path, COLOUR, LABELS, suffix)
    victim = tmp_path / "1" / f"13{suffix}"
    victim.write_bytes(victim.read_bytes()[:-100])
    assert_says(refusal(tmp_path, split="all"), f"image '{victim}': unreadable or truncated", "intact copy")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant


@pytest.mark.parametrize("content", [b"", b"this is text", b"GIF89a"])
def test_file_that_is_no_image(tmp_path: Path, content: bytes):
    (tmp_path / "a.png").write_bytes(content)
    assert_says(refusal(tmp_path), "cannot read the image .*a.png': unreadable", "move it out of the folder")


def test_gif_and_several_frames(tmp_path: Path):
    frames = [Image.fromarray(image) for image in GRAY[:2]]
    write_flat_folder(tmp_path, GRAY[:1])
    frames[0].save(tmp_path / "a.gif")
    assert_says(refusal(tmp_path), "a.gif' is a GIF", "Convert it to PNG")
    (tmp_path / "a.gif").unlink()
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert_says(refusal(tmp_path), "a.tif' holds several frames", "Save each frame")


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bit_pixels(tmp_path: Path, dtype):
    Image.fromarray(GRAY[0].astype(dtype)).save(tmp_path / "a.tif")
    assert_says(refusal(tmp_path), "a.tif' has 32-bit pixels", "8-bit PNG")


def test_images_of_different_sizes_name_the_first_that_differs(tmp_path: Path):
    write_flat_folder(tmp_path, GRAY[:4])
    for index in (4, 5):
        Image.fromarray(GRAY[index, :9, :7]).save(tmp_path / f"{index}.png")
    assert_says(refusal(tmp_path, split="all"), "'4.png' is 9x7 .*'0.png' is 12x10", "--resize S")


def test_class_of_unlabelled_data(tmp_path: Path):
    flat = write_flat_folder(tmp_path / "flat", GRAY)
    assert_says(refusal(f"{flat}:3"), "has no labels, so class '3'", "Add labels")
    with pytest.raises(InputError, match="has no labels"):
        load_images(str(flat)).only(0)


def test_unknown_class(class_folder: Path):
    for data, shown in (("digits:ten", "ten"), ("digits:10", "10"), ("digits:", "")):
        assert_says(refusal(data), f"data '{data}' has no class '{shown}'; choose one of: 0, 1, 2, .*, 9$")
    assert_says(refusal(f"{class_folder}:cat"), "no class 'cat'; choose one of: 0, 1, 2$")


def test_long_class_lists_are_cut(tmp_path: Path):
    path = write_npz(tmp_path / "a.npz", images=GRAY, labels=np.arange(20) * 10)
    assert_says(refusal(f"{path}:x"), r"0, 1, .*, 29, \.\.\. \(191 in all\)$")


def test_class_without_images(tmp_path: Path):
    path = write_npz(tmp_path / "a.npz", images=GRAY, labels=LABELS * 2)
    assert_says(refusal(f"{path}:1"), "class '1' is empty", "choose a class with images")


def test_split_without_images(class_folder: Path, tmp_path: Path):
    assert_says(refusal(f"{class_folder}:2", split="heldout"), r"none of its 3 image\(s\)", "'train' or 'all'")
    t10k = write_idx_folder(tmp_path / "t10k", GRAY, LABELS, "t10k")
    assert_says(refusal(t10k, split="train"), "in the train split", "'heldout' or 'all'")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.pt", "Pickles are refused"),
        ("images.pkl", "Pickles are refused"),
        ("images.npy", "numpy.savez"),
        ("one.png", "Put the pictures in a folder"),
        ("all.tar", "Unpack it"),
        ("table.csv", "Convert the images"),
    ],
)
def test_unsupported_file(tmp_path: Path, name: str, says: str):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    assert_says(refusal(tmp_path / name), f"{name}' is a file of an unsupported type; accepted", says)


def test_idx_with_wrong_magic(tmp_path: Path):
    write_idx_folder(tmp_path, GRAY, LABELS)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(LABELS))
    assert_says(refusal(tmp_path), "starts with bytes 00 00 08 01; accepted: 00 00 08 03", "not swapped")


@pytest.mark.parametrize("length", [6, 500, -1])
def test_truncated_idx(tmp_path: Path, length: int):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(GRAY)[:length])
    assert_says(refusal(tmp_path), "train-images-idx3-ubyte' is truncated or damaged", "download it again")


def test_truncated_gzip(tmp_path: Path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(GRAY))[:-200])
    assert_says(refusal(tmp_path), "idx3-ubyte.gz': unreadable or truncated", "download it again")


def test_idx_parts_that_do_not_fit_together(tmp_path: Path):
    count = write_idx_folder(tmp_path / "count", GRAY, LABELS[:-1])
    assert_says(refusal(count), "has 19 labels and .* 20 images", "from the same source")
    sizes = write_idx_folder(tmp_path / "sizes", GRAY, LABELS)
    write_idx_folder(sizes, GRAY[:, :9], LABELS, "t10k")
    assert_says(refusal(sizes), r"differ in size \(\[12, 10\] and \[9, 10\]\)")
    half = write_idx_folder(tmp_path / "half", GRAY, LABELS)
    write_idx_folder(half, GRAY, None, "t10k")
    assert_says(refusal(half), "labels for only one of its parts", "Add the missing file")
    (half / "train-images-idx3-ubyte").unlink()
    assert_says(refusal(half), "has train labels but no train images", "Add that file")


def test_sources_of_no_images(tmp_path: Path):
    assert_says(
        refusal(write_idx_folder(tmp_path / "idx", GRAY[:0], LABELS[:0])), r"no images \(shape \[0, 12, 10, 1\]"
    )
    assert_says(refusal(write_npz(tmp_path / "a.npz", images=GRAY[:0], labels=LABELS[:0])), "has no images")


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x_train": GRAY}, r"no array 'images' \(it has: x_train\)"),
        ({"images": np.array([GRAY[0], None], dtype=object)}, "holds pickled objects"),
        ({"images": GRAY.astype(np.int64)}, "is int64; accepted: uint8"),
        ({"images": GRAY.astype(np.float32)}, r"float32 from 0 to 255; accepted: .*as uint8"),
        ({"images": np.where(GRAY == 7, np.nan, 0.5)}, "holds NaN or infinity"),
        ({"images": GRAY[0]}, r"has shape \[12, 10\]"),
        ({"images": GRAY[:, :3, :, None]}, r"has shape \[20, 3, 10, 1\]; accepted: .*exactly one"),
        ({"images": np.zeros((5, 8, 8, 7), np.uint8)}, r"has shape \[5, 8, 8, 7\]"),
        ({"images": GRAY, "labels": LABELS[:-1]}, r"'labels' of .* is uint8 \[19\] for 20 images"),
        ({"images": GRAY, "labels": LABELS.astype(float)}, "'labels' of .* is float64"),
        ({"images": GRAY, "labels": LABELS.astype(int) - 1}, "-1 to 1 .*one integer from 0"),
        ({"images": GRAY, "labels": LABELS.astype(int) + 10**12}, "one integer from 0 to 65535"),
        ({"images": GRAY, "labels": LABELS.astype(str)}, "'labels' of .* is <U"),
        ({"images": GRAY, "labels": LABELS, "class_names": np.array(["a", "b"])}, r"\[2\] for labels up to 2"),
        ({"images": GRAY, "labels": LABELS, "class_names": np.array(["a", "b", "b"])}, "one distinct text"),
        ({"images": GRAY, "labels": LABELS, "class_names": np.array([b"a", b"b", b"c"])}, "'class_names' of .* is"),
        ({"images": GRAY, "labels": LABELS, "class_names": np.array(["a", None, 3], dtype=object)}, "pickled"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], says: str):
    message = refusal(write_npz(tmp_path / "a.npz", **arrays))
    assert_says(message, "^data: .*a.npz", says, "accepted")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-50], lambda raw: b"\x80\x04.", lambda raw: b""])
def test_npz_that_is_no_whole_archive(tmp_path: Path, damage):
    path = Path(write_npz(tmp_path / "a.npz", images=GRAY))
    path.write_bytes(damage(path.read_bytes()))
    assert_says(refusal(path), "truncated, or not an .npz archive", "Write it again")


def test_npz_with_a_flipped_bit(tmp_path: Path):
    path = Path(write_npz(tmp_path / "a.npz", images=GRAY))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    assert_says(refusal(path), r"unreadable or truncated \(.*CRC")


@pytest.mark.parametrize(("stored", "channels"), [(GRAY, 2), (GRAY, 0), (COLOUR[..., :2], 3), (COLOUR, 4)])
def test_impossible_channel_conversion(tmp_path: Path, stored: np.ndarray, channels: int):
    path = write_npz(tmp_path / "a.npz", images=stored)
    assert_says(refusal(path, channels=channels), f"^channels: cannot convert .* to {channels}; accepted: 1 .* or 3")


def test_check_fits():
    images = ImageSet(torch.zeros(2, 3, 12, 10), None, (), "pictures")
    check_fits(images, sample_size=(12, 10), channels=3)
    check_fits(images, sample_size=None, channels=3)
    with pytest.raises(InputError, match=r"^data 'pictures': .* 12x10 .* the model takes 8x8\. Pass --resize 8"):
        check_fits(images, sample_size=8, channels=3)
    with pytest.raises(InputError, match=r"takes 10x12\. --resize makes squares only"):
        check_fits(images, sample_size=(10, 12), channels=3)
    with pytest.raises(InputError, match=r"^forget 'pictures': .* 3 channel.* takes 1\. Pass --image_channels 1"):
        check_fits(images, sample_size=None, channels=1, argument="forget")
    with pytest.raises(InputError, match=r"takes 4\. Pass an .npz"):
        check_fits(images, sample_size=None, channels=4)
