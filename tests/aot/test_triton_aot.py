"""The code that Triton generates for GPUs that need not be there: what reaches memory how, and what is rounded when."""

from __future__ import annotations

import os
import re
from importlib import import_module

import pytest
from fused import ROOTS, unexplained_fusions

pytest.importorskip("triton", reason="triton is not installed")

from vdu_fast import kernels
from vdu_fast.kernels import ahead

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter compiles nothing")

KINDS = {"sm_80": "cuda 8", "sm_90": "cuda", "gfx942": "hip"}


@pytest.fixture(scope="module", autouse=True)
def compiler_cache(tmp_path_factory):
    """Nothing is taken from, or left in, the user's cache."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before


def compiled(case: ahead.Case, target: str) -> ahead.Compiled:
    return ahead.compile_case(case, ahead.TARGETS[target])


def of(target: str) -> list[pytest.param]:
    return [pytest.param(target, case, id=f"{target} {case.name}") for case in ahead.cases(KINDS[target])]


@pytest.mark.parametrize(("target", "case"), [*of("sm_80"), *of("sm_90")])
def test_nvidia(target, case):
    code = compiled(case, target)
    assert code.spilled_bytes == 0
    assert code.registers <= 128
    # Products and sums are rounded one by one, denormal numbers stay, and nothing is approximated but what a correctly
    # rounded root begins with.
    assert unexplained_fusions(code.assembly) == []
    rest, roots = re.subn(ROOTS, "", code.assembly)
    assert re.findall(r"\b(?:fma|mad)\.\S*f64\b|\.ftz|\.approx|div\.full", rest) == []
    if case.noisy:
        assert roots or "sqrt.rn.f32" in code.assembly
    for access, instruction in (("r", "ld"), ("w", "st")):
        wide = re.findall(rf"{instruction}\.global\.\S*(?:v4\.b32|v2\.b64)", code.assembly)
        if case.streams:
            assert len(wide) == case.vectors(access, 32 * case.warps), instruction


@pytest.mark.parametrize(("target", "case"), of("gfx942"))
def test_amd(target, case):
    code = compiled(case, target)
    assert code.spilled_bytes == 0
    assert code.registers <= 128
    if case.streams and not case.constants.get("SPLIT"):
        assert re.search(r"(?:global|buffer)_(?:load|store)_dwordx[24]", code.assembly)


def test_every_kernel_is_compiled():
    modules = {import_module(f"vdu_fast.kernels.{name}") for name in [*kernels.LAUNCHERS.values(), "sums"]}
    written = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {case.kernel for case in ahead.cases()} == written


def test_fused_multiply_adds_would_be_noticed(monkeypatch):
    case = next(case for case in ahead.cases() if case.name == "standard_normal fp32")
    compile_ = ahead.triton.compile
    options = {"num_warps": case.warps, "enable_fp_fusion": True}
    monkeypatch.setattr(
        ahead.triton, "compile", lambda source, **given: compile_(source, **given | {"options": options})
    )
    assert unexplained_fusions(compiled(case, "sm_90").assembly)
