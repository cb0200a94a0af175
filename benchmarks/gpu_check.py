"""Everything that only a GPU can tell, in one go: `make gpu` runs this with the Python that has torch there.

Builds the native extensions in place, runs the tests marked `gpu`, runs a small script of every kernel under
compute-sanitizer where there is one, and measures (benchmarks/run.py). Needs torch 2.11, Triton 3.6, pytest,
safetensors and setuptools 77 or later and no network. A part that fails does not stop the others; the exit code is 1 if
any did, or if a backend cannot be loaded.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SECONDS = 590  # for everything
OP_TESTS = ("tests/test_cuda_ops.py", "tests/test_triton_gpu.py")  # these need torch and pytest alone
# compute-sanitizer slows a program down many times over: every kernel once, on few elements.
SANITIZED = """
import sys
sys.path.insert(0, "tests")
import torch
from operands import CALLS, Operands
from vdu_fast import _native
class OnDevice(Operands):
    def __call__(self, *shape, **options):
        return super().__call__(*shape, **options).cuda()
for backend in ("cuda", "triton"):
    if _native.ABSENCES[backend] is None:
        with _native.use_backend(backend):
            for call in CALLS.values():
                call(OnDevice(1000), 3)
                call(OnDevice(2064), 0)
torch.cuda.synchronize()
"""


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def pytest(*arguments: str) -> list[str]:
    # Most of the time goes into compiling Triton kernels, which several processes do side by side.
    workers = ("-n", str(min(16, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    return python("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *workers, *arguments)


def other_tests() -> list[str]:
    """Test files with a `gpu` mark besides those of the ops."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))
    return [name for name in files if name not in OP_TESTS and "pytest.mark.gpu" in (ROOT / name).read_text()]


# Tests of a backend that cannot be loaded are skipped, so its absence has to fail by itself.
LOADED = """
import sys
import torch
from vdu_fast import _native
wanted = ("cuda", "triton") if torch.version.cuda else ("triton",)
sys.exit("; ".join(f"{name}: {_native.ABSENCES[name]}" for name in wanted if _native.ABSENCES[name]) or 0)
"""


def parts() -> dict[str, tuple[list[str], int]]:
    """Name: command and the seconds that it may take."""
    found = {
        "build": (python("setup.py", "build_ext", "--inplace"), 240),
        "backends": (python("-c", LOADED), 60),
        **{f"tests of {name}": (pytest("--noconftest", name), 200) for name in OP_TESTS},
    }
    missing = [name for name in ("diffusers", "hypothesis", "jsonargparse") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out: the other tests marked gpu, which need {', '.join(missing)}")
    else:
        found["other tests"] = (pytest(*other_tests()), 120)
    if sanitizer := _sanitizer():
        # torch's cache of memory would hide accesses beyond an allocation.
        uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, "--error-exitcode", "1"]
        found["compute-sanitizer"] = ([*uncached, *python("-c", SANITIZED)], 120)
    else:
        print("left out: compute-sanitizer, which is not installed")
    ask = python("benchmarks/run.py", "--device", "cuda", "--output")
    results = "benchmarks/results/cuda"
    found["benchmarks of ops and steps"] = ([*ask, f"{results}.csv", "--groups", "ops", "step"], 200)
    found["benchmarks of sizes and loops"] = ([*ask, f"{results}_loops.csv", "--groups", "machine", "loop"], 200)
    return found


def _sanitizer() -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(home) if home.exists() else None)


def run(name: str, command: list[str], seconds: float) -> str:
    """What became of a part."""
    print(f"\n=== {name}", flush=True)
    if seconds < 1:
        return "FAILED: no time left"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # With a thread per core in each of many test processes, the tests would take ten times as long.
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
    environment |= {"VDU_FAST_BUILD_CUDA": "1"} if torch.version.cuda else {}
    start = time.monotonic()
    # A session of its own: compilers that a part has started must not go on beside the parts after it.
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"FAILED: not done after {seconds:.0f} s"
    return f"{'ok' if code == 0 else f'FAILED with exit code {code}'} ({time.monotonic() - start:.0f} s)"


def main() -> int:
    end = time.monotonic() + SECONDS
    found = {name: run(name, command, min(limit, end - time.monotonic())) for name, (command, limit) in parts().items()}
    print("\n=== summary")
    for name, outcome in found.items():
        print(f"{name:34} {outcome}")
    return 1 if any(outcome.startswith("FAILED") for outcome in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
