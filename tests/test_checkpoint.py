"""Files are written whole or not at all, and every unusable one is refused before it can do harm."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vdu_fast import checkpoint
from vdu_fast.checkpoint import (
    StoppedAtOnce,
    fingerprint,
    load_state,
    load_tensors,
    prepare_output,
    replacing_folder,
    save_tensors,
    uninterrupted,
    write_bytes_atomic,
    write_json_atomic,
)
from vdu_fast.errors import InputError

TENSORS = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}
OWNED = "resume/state.safetensors"


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_tensors_and_metadata_come_back_as_written(tmp_path):
    tensors = TENSORS | {"bf16": torch.randn(5).bfloat16(), "empty": torch.empty(0), "transposed": TENSORS["w"].T}
    save_tensors(tmp_path / "new" / "t.safetensors", tensors, {"key": "value"})
    loaded, metadata = load_tensors(tmp_path / "new" / "t.safetensors")
    assert metadata == {"key": "value"}
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert everything_in(tmp_path / "new") == ["t.safetensors"]


def test_tensors_that_share_storage_are_written_each(tmp_path):
    # Tied weights, and the views into one flat buffer that parameters are while unlearning runs.
    flat = torch.arange(10.0)
    save_tensors(tmp_path / "t.safetensors", {"a": flat[:4], "b": flat[4:], "tied": flat[:4]})
    loaded = load_file(tmp_path / "t.safetensors")
    assert torch.equal(loaded["a"], flat[:4])
    assert torch.equal(loaded["b"], flat[4:])
    assert torch.equal(loaded["tied"], flat[:4])


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    path = tmp_path / "t.safetensors"
    save_tensors(path, TENSORS)

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.os, broken.removeprefix("os."), fail)
    with pytest.raises(OSError, match="no space left"):
        save_tensors(path, {"w": torch.zeros(1000)})
    monkeypatch.undo()
    assert torch.equal(load_tensors(path)[0]["w"], TENSORS["w"])
    assert everything_in(tmp_path) == ["t.safetensors"]


def test_an_interrupted_write_leaves_the_old_file_too(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json_atomic(path, {"old": 1})

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_json_atomic(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert everything_in(tmp_path) == ["x.json"]


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path, monkeypatch):
    path, seen = tmp_path / "x", []
    write_bytes_atomic(path, b"old")
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: seen.append(path.read_bytes()))
    write_bytes_atomic(path, b"new")
    assert seen == [b"old"]
    assert path.read_bytes() == b"new"


def test_files_get_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes_atomic(tmp_path / "x", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_json_cannot_hold(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(tmp_path / "x.json", {"loss": value})
    assert everything_in(tmp_path) == []


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no\.safetensors does not exist"):
        load_tensors(tmp_path / "no.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 9, 40, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "t.safetensors"
    save_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"not a readable safetensors file .*truncated: write or copy it again"):
        load_tensors(path)


def test_a_pickle_is_refused_even_where_it_could_be_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    for name in ("model.pt", "model.bin", "model.ckpt", "model.pth", "model.pkl", "model.PICKLE"):
        torch.save({"w": Bomb()}, tmp_path / name)
        with pytest.raises(InputError, match="looks like a pickle"):
            load_tensors(tmp_path / name)
    (tmp_path / "model.pt").rename(tmp_path / "renamed.safetensors")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_tensors(tmp_path / "renamed.safetensors")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("place", ["", "unet", "model"])
def test_a_state_is_found_in_a_pipeline_folder(tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    save_file(TENSORS, tmp_path / place / "diffusion_pytorch_model.safetensors")
    assert torch.equal(load_state(tmp_path)["w"], TENSORS["w"])


def test_a_folder_without_one_single_state_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no single \.safetensors file"):
        load_state(tmp_path)
    for name in ("a", "b"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match=r"holds no single \.safetensors file"):
        load_state(tmp_path)


def test_the_fingerprint_sees_values_names_shapes_and_dtypes():
    def linear(**changes) -> nn.Module:
        module = nn.Linear(2, 3)
        with torch.no_grad():
            module.weight.copy_(torch.arange(6.0).reshape(3, 2))
            module.bias.fill_(changes.get("bias", 0.0))
        return module

    base = fingerprint(linear())
    assert fingerprint(linear()) == base
    assert len(base) == 16
    assert fingerprint(linear(bias=torch.finfo(torch.float32).tiny)) != base
    assert fingerprint(linear().double()) != base
    assert fingerprint(nn.Sequential(linear())) != base


def test_a_new_or_empty_output_folder_is_made(tmp_path):
    for name in ("new/deep", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert prepare_output(tmp_path / name, overwrite=False, resume=False, owned=OWNED).is_dir()


def occupied(tmp_path: Path, *, interrupted: bool) -> Path:
    folder = tmp_path / "out"
    (folder / "resume").mkdir(parents=True)
    (folder / "precious.txt").write_text("keep me")
    if interrupted:
        (folder / OWNED).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("interrupted", "overwrite", "resume", "says"),
    [
        (False, False, False, r"exists and is not empty: --overwrite replaces it, or name another"),
        (True, False, False, r"exists and is not empty: --resume goes on with the interrupted run in it, --overwrite"),
        (False, False, True, r"state\.safetensors does not exist, so there is nothing to resume; leave --resume out"),
        (False, True, True, r"nothing to resume"),
        (False, True, False, None),
        (True, True, False, None),
        (True, False, True, None),
        (True, True, True, None),
    ],
)
def test_an_occupied_output_folder_needs_the_right_flag(tmp_path, interrupted, overwrite, resume, says):
    folder = occupied(tmp_path, interrupted=interrupted)
    before = everything_in(folder)
    if says is None:
        assert prepare_output(folder, overwrite=overwrite, resume=resume, owned=OWNED) == folder
    else:
        with pytest.raises(InputError, match=says):
            prepare_output(folder, overwrite=overwrite, resume=resume, owned=OWNED)
    assert everything_in(folder) == before


def test_resume_into_a_missing_folder_does_not_create_it(tmp_path):
    with pytest.raises(InputError, match="nothing to resume"):
        prepare_output(tmp_path / "out", overwrite=False, resume=True, owned=OWNED)
    assert not (tmp_path / "out").exists()


def test_a_file_as_output_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file; give a folder"):
        prepare_output(tmp_path / "out", overwrite=True, resume=False, owned=OWNED)


def test_replacing_a_folder_swaps_entries_and_keeps_the_others(tmp_path):
    folder = tmp_path / "out"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "old.bin").write_text("old")
    (folder / "index.json").write_text("old")
    (folder / "mine.txt").write_text("mine")
    with replacing_folder(folder) as staged:
        (staged / "unet").mkdir()
        (staged / "unet" / "new.bin").write_text("new")
        (staged / "index.json").write_text("new")
        (staged / "scheduler").mkdir()
        assert (folder / "index.json").read_text() == "old"
    assert everything_in(folder) == ["index.json", "mine.txt", "scheduler", "unet", "unet/new.bin"]
    assert (folder / "index.json").read_text() == "new"


def test_a_failure_while_staging_leaves_the_folder_as_it_was(tmp_path):
    (tmp_path / "index.json").write_text("old")

    def stage_and_fail() -> None:
        with replacing_folder(tmp_path) as staged:
            (staged / "index.json").write_text("new")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        stage_and_fail()
    assert everything_in(tmp_path) == ["index.json"]
    assert (tmp_path / "index.json").read_text() == "old"


def test_ctrl_c_waits_for_the_end_of_the_block():
    done = []
    before = signal.getsignal(signal.SIGINT)

    def interrupted_block() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        interrupted_block()
    assert done
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait(caplog):
    done = []
    before = signal.getsignal(signal.SIGINT)

    def interrupted_block() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("first")
            signal.raise_signal(signal.SIGINT)
            done.append("second")

    with pytest.raises(StoppedAtOnce):
        interrupted_block()
    assert done == ["first"]
    assert "Ctrl-C again stops at once" in caplog.text
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_in_the_block_comes_through_and_ctrl_c_works_again():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="inside"), uninterrupted():
        raise ValueError("inside")
    assert signal.getsignal(signal.SIGINT) is before


def test_threads_other_than_the_main_one_may_use_the_block():
    ran = []

    def work() -> None:
        with uninterrupted():
            ran.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [True]
