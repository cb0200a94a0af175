"""The Triton package where its kernels cannot run, and how it is chosen."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vdu_fast
from vdu_fast import _native, _schema, kernels
from vdu_fast.cli import main
from vdu_fast.errors import InputError

ROOT = Path(vdu_fast.__file__).parents[1]
HAVE_GPU_BUILD = bool(torch.version.cuda or torch.version.hip)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("VDU_FAST_BACKEND", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


def test_without_triton_the_package_is_there_and_says_what_is_missing():
    code = """
import sys
sys.modules["triton"] = None
import vdu_fast.kernels
from vdu_fast import _native
print(vdu_fast.kernels.ABSENCE)
print(_native.ABSENCES["triton"])
print(hasattr(vdu_fast.kernels, "sample_weights"), vdu_fast.kernels.INTERPRETED)
"""
    run = python(code)
    assert run.stdout.splitlines() == [
        "triton is not installed; pip install 'vdu_fast[triton]'",
        "triton is not installed; pip install 'vdu_fast[triton]'",
        "False False",
    ], run.stderr


@pytest.mark.skipif(kernels.ABSENCE is not None, reason="triton is not installed")
def test_every_op_has_a_launcher_with_its_signature():
    assert set(kernels.LAUNCHERS) == set(_schema.SCHEMAS)
    for name in _schema.SCHEMAS:
        schema = getattr(torch.ops.vdu_fast, name).default._schema
        code = getattr(kernels, name)
        names = inspect.signature(code).parameters
        assert list(names) == [argument.name for argument in schema.arguments], name


@pytest.mark.skipif(HAVE_GPU_BUILD or kernels.INTERPRETED, reason="Triton can be used here")
def test_without_a_gpu_choosing_triton_is_an_error_that_says_why(capsys):
    with pytest.raises(InputError, match="backend 'triton' cannot be used here: "), _native.use_backend("triton"):
        pass
    assert main(["tune"]) == 2
    assert "which cannot be used here" in capsys.readouterr().err


@pytest.mark.skipif(kernels.ABSENCE is not None, reason="triton is not installed")
def test_the_interpreter_is_used_only_when_it_is_chosen_and_gives_way_again():
    code = """
import torch, vdu_fast
from vdu_fast import ops
def drawn():
    return ops.standard_normal(9, 1).tolist(), vdu_fast.backends()["standard_normal"]["cpu"]
before = drawn()
with vdu_fast.use_backend("triton"):
    inside = drawn()
after = drawn()
print(before[0] == inside[0] == after[0], before[1] == after[1], inside[1])
"""
    run = python(code, TRITON_INTERPRET="1")
    assert run.stdout.split() == ["True", "True", "triton"], run.stderr
    assert run.stderr == ""
    chosen = python(code, TRITON_INTERPRET="1", VDU_FAST_BACKEND="triton")
    assert chosen.stdout.split() == ["True", "True", "triton"], chosen.stderr


@pytest.mark.parametrize("argument", ["--elements 0", "--device cuda:99"])
def test_what_tuning_cannot_do_is_told(argument, capsys):
    assert main(["tune", *argument.split()]) == 2
    assert capsys.readouterr().err.startswith("error: ")
