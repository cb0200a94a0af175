"""Which implementation serves, how another is chosen, and what happens where the library is missing or broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operands import needs_native

import vdu_fast
from vdu_fast import _native, _schema, ops
from vdu_fast.errors import InputError

PACKAGE = Path(vdu_fast.__file__).parent
TESTS = Path(__file__).parent


def python(
    *arguments: str, folder: Path, package: Path = PACKAGE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python somewhere else, on this package or a copy of it."""
    unset = {"VDU_FAST_BACKEND", "PYTHONPATH"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=inherited | {"PYTHONPATH": str(package.parent)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


REPORT = """
import vdu_fast, torch
print(set(vdu_fast.backends()["sample_weights"].values()), len(set(map(str, vdu_fast.backends().values()))))
print(vdu_fast.ops.sample_weights(torch.zeros(4), torch.zeros(4), 7, 2).tolist())
"""


def normals() -> str:
    return str(ops.sample_weights(torch.zeros(4), torch.zeros(4), 7, 2).tolist())


def test_backends_are_told_per_op_and_device():
    told = vdu_fast.backends()
    assert tuple(told) == _schema.PUBLIC_OPS
    assert all(devices["cpu"] in _native.NAMES for devices in told.values())
    assert all(hasattr(ops, name) for name in told)


@needs_native
def test_the_library_serves_the_cpu_unless_the_reference_is_chosen(monkeypatch):
    monkeypatch.setattr(_native, "_chosen", None)
    assert _native.backend_of("cpu") == "cpu"
    assert _native.reason("cpu") == ""
    with vdu_fast.use_backend("reference"):
        assert vdu_fast.backends()["gaussian_kl"] == dict.fromkeys(vdu_fast.backends()["gaussian_kl"], "reference")
        assert _native.reason("cpu") == "reference was chosen"
        with vdu_fast.use_backend("cpu"):
            assert _native.backend_of("cpu") == "cpu"
        assert _native.backend_of("cpu") == "reference"
    assert _native.backend_of("cpu") == "cpu"
    assert _native.reason("meta") == "no backend is written for meta"


@needs_native
def test_the_chosen_backend_is_the_one_that_runs(monkeypatch):
    calls = []
    monkeypatch.setattr(vdu_fast.reference, "sample_weights", lambda *a, **k: calls.append(1) or a[0])
    with vdu_fast.use_backend("reference"):
        ops.sample_weights(torch.zeros(3), torch.zeros(3), 0)
    assert calls == [1]
    with vdu_fast.use_backend("cpu"):
        ops.sample_weights(torch.zeros(3), torch.zeros(3), 0)
    assert calls == [1]


def test_the_choice_ends_with_its_block_even_in_an_error(monkeypatch):
    monkeypatch.setattr(_native, "_chosen", None)
    with pytest.raises(RuntimeError, match="stop"), vdu_fast.use_backend("reference"):
        raise RuntimeError("stop")
    assert _native._chosen is None


def test_a_backend_that_is_not_is_an_error_that_names_those_that_are():
    with (
        pytest.raises(InputError, match=r"backend must be one of reference, .*cpu.*, got 'fpga'"),
        vdu_fast.use_backend("fpga"),
    ):
        pass


@pytest.mark.skipif(_native.ABSENCES["cuda"] is None, reason="the CUDA backend can be used here")
def test_a_backend_that_cannot_serve_here_says_why():
    with pytest.raises(InputError, match="backend 'cuda' cannot be used here: "), vdu_fast.use_backend("cuda"):
        pass


def test_the_environment_chooses_the_reference_without_a_word(tmp_path):
    run = python("-c", REPORT, folder=tmp_path, VDU_FAST_BACKEND="reference")
    assert run.stdout.splitlines() == ["{'reference'} 1", normals()]
    assert run.stderr == ""


def test_nonsense_in_the_environment_is_an_error_that_names_what_is_accepted(tmp_path):
    run = python("-c", REPORT, folder=tmp_path, VDU_FAST_BACKEND="gpu")
    assert run.returncode == 1
    assert "InputError: VDU_FAST_BACKEND: backend must be one of reference, cuda" in run.stderr
    assert "got 'gpu'" in run.stderr


@pytest.fixture
def copy(tmp_path) -> Path:
    """The package without its libraries."""
    # An editable install offers the libraries of the working tree to any package of this name.
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder).lower()]\n"
    )
    return Path(
        shutil.copytree(PACKAGE, tmp_path / "copy" / "vdu_fast", ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    )


def test_without_its_library_the_package_warns_once_and_runs_the_reference(copy, tmp_path):
    run = python("-c", REPORT, folder=tmp_path, package=copy)
    assert run.stdout.splitlines() == ["{'reference'} 1", normals()]
    assert run.stderr.count("\n") == 1
    assert "the torch reference runs on cpu, many times slower: vdu_fast._C_cpu was not built" in run.stderr
    assert "VDU_FAST_BUILD_CPU=1" in run.stderr
    chosen = python("-c", REPORT, folder=tmp_path, package=copy, VDU_FAST_BACKEND="reference")
    assert chosen.stderr == ""


def test_a_broken_library_warns_once_and_the_reference_runs(copy, tmp_path):
    from importlib.machinery import EXTENSION_SUFFIXES

    (copy / f"_C_cpu{EXTENSION_SUFFIXES[0]}").write_bytes(b"\x7fELF" + b"broken" * 100)
    run = python("-c", REPORT, folder=tmp_path, package=copy)
    assert run.stdout.splitlines() == ["{'reference'} 1", normals()]
    assert run.stderr.count("many times slower: vdu_fast._C_cpu cannot be loaded: ") == 1


def test_asking_for_a_library_that_is_missing_is_an_error(copy, tmp_path):
    run = python("-c", REPORT, folder=tmp_path, package=copy, VDU_FAST_BACKEND="cpu")
    assert run.returncode == 1
    assert (
        "InputError: VDU_FAST_BACKEND: backend 'cpu' cannot be used here: vdu_fast._C_cpu was not built" in run.stderr
    )


@needs_native
def test_without_its_library_the_package_keeps_every_promise_to_torch(copy, tmp_path):
    # opcheck and compilation of the ops as they are on a device that no library serves.
    tests = [
        str(TESTS / "test_dispatch.py"),
        "-k",
        "opcheck or compile or needed",
        "-c",
        str(TESTS.parent / "pyproject.toml"),
        "-p",
        "no:cacheprovider",
    ]
    run = python("-m", "pytest", "-q", *tests, "-rs", "-m", "not slow", folder=tmp_path, package=copy)
    assert run.returncode == 0, run.stdout
    assert "passed" in run.stdout
    assert "no C++ backend: vdu_fast._C_cpu was not built" in run.stdout  # it did run without
