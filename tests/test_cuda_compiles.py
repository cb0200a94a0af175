"""The CUDA kernels compile for sm_80 and sm_90 without spills, with 16-byte accesses and without contraction.

Needs nvcc and no GPU; what the kernels compute is tested in test_cuda_ops.py.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from fused import unexplained_fusions
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90")


def find_nvcc() -> str | None:
    """nvcc in CUDA_HOME, in the usual folder, or on the PATH; setup.py looks in the same places."""
    for home in (os.environ.get("CUDA_HOME"), cpp_extension.CUDA_HOME, "/usr/local/cuda"):
        if home and (nvcc := Path(home) / "bin" / "nvcc").exists():
            return str(nvcc)
    return shutil.which("nvcc")


# Parsed here, not where it is asked for: Python 3.11 fails when two threads of a pool parse at once.
SETUP = ast.parse((ROOT / "setup.py").read_text())


def setting(name: str):
    """A constant of setup.py, which cannot be imported: that would build."""
    for node in SETUP.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py no longer defines {name}")


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture: what ptxas reports about it, and its PTX."""

    name: str
    architecture: str
    registers: int
    stack_and_spills: tuple[int, ...]
    ptx: str


def compile_kernels(source: Path, folder: Path) -> list[Kernel]:
    folder.mkdir()
    command = [
        str(find_nvcc()), "-c", str(source), "-o", str(folder / "object.o"), "--keep", "--keep-dir", str(folder),
        "-Xcompiler=-fsyntax-only",  # the host's half is checked, and takes no time to optimise
        "-Xptxas", "-v", f"-DTORCH_TARGET_VERSION={setting('OLDEST_TORCH')}", "-DUSE_CUDA", *setting("CUDA_FLAGS"),
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES),
        *(f"-I{path}" for path in cpp_extension.include_paths()),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    bodies = {}
    for architecture in ARCHITECTURES:
        (file,) = folder.glob(f"{source.stem}*compute_{architecture}.ptx")
        for name, body in re.findall(r"\.entry (\w+)\((.*?)^}", file.read_text(), re.DOTALL | re.MULTILINE):
            bodies[name, architecture] = body
    report = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    return [
        Kernel(name, arch, int(registers), (int(stack), int(stores), int(loads)), bodies[name, arch])
        for name, arch, stack, stores, loads, registers in report
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, list[Kernel]]:
    if find_nvcc() is None:
        pytest.skip("no nvcc was found; install the CUDA toolkit or set CUDA_HOME")
    folder = tmp_path_factory.mktemp("cuda")
    # The one that takes longest comes first.
    by_size = sorted(SOURCES, key=lambda source: -source.stat().st_size)
    with ThreadPoolExecutor(2) as pool:
        compiled = pool.map(lambda source: compile_kernels(source, folder / source.stem), by_size)
        return {source.stem: found for source, found in zip(by_size, compiled, strict=True)}


def streaming(found: list[Kernel]) -> list[Kernel]:
    """Those that walk over elements; the others add up a few partial sums."""
    return [kernel for kernel in found if "fold_partials" not in kernel.name]


@pytest.mark.parametrize("op", [source.stem for source in SOURCES])
def test_kernels_fit_in_registers_and_access_16_bytes_at_a_time(op, kernels):
    found = kernels[op]
    assert {kernel.architecture for kernel in streaming(found)} == set(ARCHITECTURES)
    for kernel in found:
        assert kernel.stack_and_spills == (0, 0, 0), f"{kernel.name} on sm_{kernel.architecture} spills"
        # Two blocks of 256 threads on a multiprocessor of 65,536 registers.
        assert kernel.registers <= 128
        # With contraction, results would no longer have the bits of the CPU.
        assert unexplained_fusions(kernel.ptx) == [], kernel.name
    for kernel in streaming(found):
        loads, stores = (
            re.search(rf"{access}\.global[.\w]*\.(v4\.[buf]32|v2\.[buf]64)", kernel.ptx) for access in ("ld", "st")
        )
        reads = "StandardNormal" not in kernel.name
        writes = not re.search(r"\d(Divergence|GradientNorm|NoisePredictionError)I", kernel.name)
        assert reads == bool(loads), kernel.name
        assert writes == bool(stores), kernel.name
