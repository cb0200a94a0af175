"""Builds the native extensions; everything else about the package is in pyproject.toml.

    VDU_FAST_BUILD_CPU=0|1, VDU_FAST_BUILD_CUDA=0|1    0 leaves one out, 1 fails loudly when it cannot be built
    TORCH_CUDA_ARCH_LIST                               default "8.0;9.0+PTX"
    CUDA_HOME                                          default: where torch finds the toolkit, else /usr/local/cuda

Unset, what can be built is built and a warning says why the rest is not: the package works without either. CUDA code
is built when torch is a CUDA build and there is a toolkit; no GPU is asked for.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
OLDEST_TORCH = "0x020B000000000000"  # 2.11: one binary serves it and every later torch, through the stable ABI
HOST_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fopenmp-simd",
    # Part of the meaning, not of the speed: products and sums are rounded one by one, so all backends give equal bits.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",  # the flags of Python itself ask for debug symbols, twenty times the size of the code
    "-Wall",
]
CUDA_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"]


def wanted(name: str) -> bool | None:
    """True: build it or fail; False: leave it out; None: build it if that works."""
    value = os.environ.get(f"VDU_FAST_BUILD_{name}", "").strip()
    if value not in ("", "0", "1"):
        raise SystemExit(f"VDU_FAST_BUILD_{name} must be 0 or 1, got {value!r}")
    return {"": None, "0": False, "1": True}[value]


def leave_out(name: str, why: str) -> None:
    """Fail if this extension was asked for, else warn that the package will do without."""
    if wanted(name):
        raise SystemExit(f"VDU_FAST_BUILD_{name}=1, but {why}")
    if wanted(name) is None:
        print(f"warning: vdu_fast is built without its {name} extension: {why}", file=sys.stderr)


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / folder).glob(f"*.{suffix}"))


def headers() -> list[str]:
    return sorted(str(path) for suffix in ("h", "cuh") for path in (ROOT / "csrc").rglob(f"*.{suffix}"))


def cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    defines = [
        ("TORCH_TARGET_VERSION", OLDEST_TORCH),
        ("VDU_TARGET_TORCH", '"2.11"'),
        ("VDU_BUILD_FLAGS", '"' + " ".join(HOST_FLAGS) + '"'),
    ]
    return CppExtension(
        "vdu_fast._C_cpu",
        ["csrc/bindings.cpp", *sources("cpu", "cpp")],
        depends=headers(),
        define_macros=defines,
        extra_compile_args={"cxx": HOST_FLAGS},
    )


def toolkit() -> str | None:
    """The CUDA toolkit's folder; nvcc on the PATH may be a wrapper that lives elsewhere."""
    from torch.utils import cpp_extension

    for candidate in (os.environ.get("CUDA_HOME"), cpp_extension.CUDA_HOME, "/usr/local/cuda"):
        if candidate and (Path(candidate) / "bin" / "nvcc").exists():
            return candidate
    return None


def cuda_extension():
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = toolkit()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    return cpp_extension.CUDAExtension(
        "vdu_fast._C_cuda",
        [*sources("cuda", "cu"), *sources("cuda", "cpp")],
        depends=headers(),
        define_macros=[("TORCH_TARGET_VERSION", OLDEST_TORCH), ("USE_CUDA", None)],
        extra_compile_args={"cxx": HOST_FLAGS, "nvcc": CUDA_FLAGS},
    )


def extensions() -> list:
    try:
        import torch
    except ImportError:
        for name in ("CPU", "CUDA"):
            if wanted(name) is not False:
                leave_out(
                    name, "torch cannot be imported here; install it first, then pip install --no-build-isolation"
                )
        return []
    found = []
    if wanted("CPU") is not False:
        found.append(cpu_extension())
    if wanted("CUDA") is not False:
        if not torch.version.cuda:
            leave_out("CUDA", f"torch {torch.__version__} is not a CUDA build")
        elif toolkit() is None:
            leave_out("CUDA", "no CUDA toolkit was found; set CUDA_HOME")
        else:
            found.append(cuda_extension())
    return found


def build_command() -> dict:
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        return {}

    class Build(BuildExtension):
        """Goes on without an extension that cannot be built, unless it was asked for."""

        def build_extensions(self) -> None:
            everything, self.extensions = self.extensions, []
            for extension in everything:
                self.extensions = [extension]
                try:
                    super().build_extensions()
                except Exception as error:  # compilers fail in many ways; the package works without
                    leave_out("CUDA" if extension.name.endswith("cuda") else "CPU", str(error))
            self.extensions = [e for e in everything if Path(self.get_ext_fullpath(e.name)).exists()]

    return {"build_ext": Build}


setup(ext_modules=extensions(), cmdclass=build_command())
