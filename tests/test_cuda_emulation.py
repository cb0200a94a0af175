"""The CUDA kernels, run by threads of the host, pass test_cuda_ops.py: indexing, heads and tails, noise, and sums.

What only a GPU shows is tested on one: rounding by its hardware, graphs, waiting, speed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
EMULATION = Path(__file__).parent / "emulation"


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def build(folder: Path) -> Path:
    """The kernels as a library of CPU ops: their sources with another runtime.cuh beside them."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    cuda = folder / "csrc" / "cuda"
    shutil.copy(EMULATION / "runtime.cuh", cuda)
    sources = sorted(cuda.glob("*.cu"), key=lambda source: -source.stat().st_size)
    for source in sources:
        source.write_text(source.read_text().replace("(vdu_fast, CUDA, m)", "(vdu_fast, CPU, m)"))
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-pthread", "-w"]
    flags += ["-DTORCH_TARGET_VERSION=0x020B000000000000", *(f"-I{path}" for path in cpp_extension.include_paths())]
    compiler = os.environ.get("CXX", "c++")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda s: run(compiler, *flags, "-x", "c++", "-c", s, "-o", s.with_suffix(".o")), sources))
    library = folder / "emulation.so"
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    run(compiler, "-shared", "-pthread", "-o", library, *cuda.glob("*.o"), *libraries, "-ltorch_cpu", "-lc10")
    return library


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler was found")
def test_kernels_run_by_host_threads_pass_the_tests_of_the_cuda_ops(tmp_path):
    environment = {**os.environ, "VDU_FAST_TEST_EMULATION": str(build(tmp_path))}
    tests = Path(__file__).parent / "test_cuda_ops.py"
    run(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests, cwd=ROOT, env=environment)
