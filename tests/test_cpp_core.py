"""tests/cpp/test_core.cpp, built as setup.py builds the library; `make sanitize` runs it under the sanitizers."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

pytestmark = pytest.mark.skipif(
    COMPILER is None or not (ROOT / "setup.py").exists(), reason="needs a C++ compiler and the source tree"
)


def host_flags() -> list[str]:
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "HOST_FLAGS":
            return ast.literal_eval(statement.value)
    raise AssertionError("setup.py has no HOST_FLAGS")


def test_the_core_passes_its_own_tests(tmp_path):
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("isa*.cpp")), ROOT / "tests" / "cpp" / "test_core.cpp"]
    binary = tmp_path / "test_core"
    subprocess.run([COMPILER, *host_flags(), *map(str, sources), "-o", str(binary)], check=True, timeout=300)
    run = subprocess.run([str(binary)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "baseline: passed" in run.stdout
