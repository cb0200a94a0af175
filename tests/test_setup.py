"""What setup.py decides before anything is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")

# The extensions of a setup.py that stops before it does anything.
EXTENSIONS = """
import sys
import setuptools
setuptools.setup = lambda **options: print([extension.name for extension in options["ext_modules"]])
sys.argv = ["setup.py", "--name"]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": "setup.py", "__name__": "__main__"})
"""


NO_TORCH = "import sys; sys.modules['torch'] = None"  # imports fail, and fast


def setup(*before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VDU_FAST_BUILD")}
    code = "\n".join([*before, EXTENSIONS])
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=inherited | environment, capture_output=True, text=True
    )


def test_an_extension_that_is_not_wanted_is_left_out_without_a_word():
    run = setup(NO_TORCH, VDU_FAST_BUILD_CPU="0", VDU_FAST_BUILD_CUDA="0")
    assert run.stdout.strip() == "[]"
    assert run.stderr == ""


def test_the_cpu_extension_is_built_unless_it_is_not_wanted():
    run = setup(VDU_FAST_BUILD_CUDA="0")
    assert run.stdout.strip() == "['vdu_fast._C_cpu']"


@pytest.mark.parametrize("name", ["VDU_FAST_BUILD_CPU", "VDU_FAST_BUILD_CUDA"])
def test_a_value_that_is_neither_0_nor_1_is_an_error(name):
    run = setup(NO_TORCH, **{name: "yes"})
    assert run.returncode == 1
    assert f"{name} must be 0 or 1, got 'yes'" in run.stderr


@pytest.mark.parametrize("wanted", ["", "1"])
def test_without_torch_nothing_is_built_with_a_warning_and_a_demand_fails(wanted):
    run = setup(NO_TORCH, VDU_FAST_BUILD_CPU=wanted, VDU_FAST_BUILD_CUDA="0")
    assert "torch cannot be imported here" in run.stderr
    assert run.returncode == (1 if wanted else 0)
    assert run.stderr.startswith(
        "VDU_FAST_BUILD_CPU=1, but" if wanted else "warning: vdu_fast is built without its CPU"
    )
