"""Every kernel compiled without a GPU: what the tests of the generated code and benchmarks/triton_kernels.py look at.

Operands are aligned to 16 bytes and sizes are multiples of 16, as in a flat arena.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vdu_fast.kernels.batch import TILE
from vdu_fast.kernels.launch import BLOCKS
from vdu_fast.kernels.sums import CHUNK, CHUNK_WARPS
from vdu_fast.reference import RULES, StepConstants

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Case:
    """One kernel with the dtypes of its operands.

    Attributes:
        module, kernel: where it is.
        operands: dtype and access of every pointer to elements, as in "fp32 rw"; what is absent is None.
        scalars: types of the other runtime arguments.
        constants: compile-time arguments.
        streams: whether all it moves is one element after the other, so that 128 bits should move at a time.
        noisy: whether it draws normals.
    """

    name: str
    module: str
    kernel: str
    operands: dict[str, str | None]
    scalars: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = CHUNK_WARPS
    streams: bool = True
    noisy: bool = True

    def vectors(self, access: str, threads: int) -> int:
        """Accesses of 128 bits ("r" or "w") that a thread makes, if all that moves is moved so."""
        elements = self.constants.get("BLOCK", TILE) // threads
        operands = [operand.split() for operand in self.operands.values() if operand and " " in operand]
        return sum(elements * BYTES[dtype] // 16 for dtype, accesses in operands if access in accesses)

    @property
    def bytes_per_element(self) -> int:
        """Bytes that one element moves, read and written."""
        operands = [operand.split() for operand in self.operands.values() if operand and " " in operand]
        return sum(BYTES[dtype] * len(access) for dtype, access in operands)


@dataclass(frozen=True)
class Compiled:
    """What came out: assembly, and the resources of one thread or program."""

    assembly: str
    registers: int
    shared_bytes: int
    spilled_bytes: int


DRAW = {"seed": "i64", "step": "i64", "group": "i64", "numel": "i32"}
BATCH = {"seed": "i64", "step": "i64", "samples": "i32", "elements": "i32", "chunks": "i32"}
IMAGES = {"GROUPED": True, "ROWS": 1, "COLUMNS": TILE}
STEP = {
    "values": ("fp32",) * len(StepConstants._fields), "seed": "i64", "draw": "i64", "next_draw": "i64",
    "group": "i64", "slot": "i32", "slots": "i32", "numel": "i32",
}  # fmt: skip
SUMS = {"SKIP": 0, "SPLIT": False, "BLOCK": CHUNK}


def _streaming(kind: str, narrow: bool, **constants: Any) -> dict[str, Any]:
    """Compile-time arguments of a list kernel, with the block size of a kind of device."""
    block, warps = BLOCKS[kind][narrow]
    return {"constants": {"SKIP": 0, "SPLIT": False, "BLOCK": block, **constants}, "warps": warps}


def _step(name: str, rule: str, theta: str, learned: bool = False, **options: Any) -> Case:
    """The step with gradients and weights in one dtype, state in float32."""
    state = {
        "first": "fp32 rw" if "adam" in rule else None,
        "second": "fp32 rw" if "adam" in rule else None,
        **dict.fromkeys(("log_std", "std_first", "std_second"), "fp32 rw" if learned else None),
    }
    operands = {
        "theta": f"{theta} w", "grad": f"{theta} r", "center": "fp32 r", "prior_std": "fp32 r", "z": "fp32 rw", **state,
        "noise_grad": None, "partials": "fp64", "on_device": None,
    }  # fmt: skip
    constants = {"RULE": RULES.index(rule), "NOISY": options.pop("noisy", False), **SUMS, **options}
    noisy = constants["NOISY"] or learned
    return Case(name, "variational_step", "variational_step_kernel", operands, STEP, constants, noisy=noisy)


def cases(kind: str = "cuda") -> list[Case]:
    """All kernels in the forms that a training run meets, for a kind of device as in BLOCKS."""
    found = []
    for dtype in ("fp32", "bf16"):
        narrow = dtype != "fp32"
        stream = _streaming(kind, narrow)
        found += [
            Case(f"standard_normal {dtype}", "standard_normal", "standard_normal_kernel", {"out": f"{dtype} w"},
                 {**DRAW, "stream": "i32"}, **stream),
            Case(f"sample_weights {dtype}", "sample_weights", "sample_weights_kernel",
                 {"out": f"{dtype} w", "mean": f"{dtype} r", "log_std": f"{dtype} r"}, DRAW, **stream),
            Case(f"mix_noise {dtype}", "add_noise", "mix_noise_kernel",
                 {"out": f"{dtype} w", "x0": f"{dtype} r", "signal": "fp32", "noise": "fp32"}, BATCH, IMAGES),
            Case(f"noise_prediction_error {dtype}", "noise_prediction_loss", "noise_prediction_error_kernel",
                 {"prediction": f"{dtype} r", "partials": "fp64", "x0": None, "signal": None, "noise": None}, BATCH,
                 {"NOISY": True, **IMAGES}),
            Case(f"noise_prediction_error_backward {dtype}", "noise_prediction_loss",
                 "noise_prediction_error_backward_kernel",
                 {"out": f"{dtype} w", "grad": "fp32", "prediction": f"{dtype} r", "x0": None, "signal": None,
                  "noise": None}, BATCH, {"NOISY": True, **IMAGES}),
            _step(f"variational_step natural {dtype}", "natural", dtype),
            _step(f"variational_step natural_adam {dtype}", "natural_adam", dtype),
            _step(f"variational_step natural_adam, sampled {dtype}", "natural_adam", dtype, noisy=True),
            _step(f"variational_step natural_adam, std learned {dtype}", "natural_adam", dtype, learned=True,
                  noisy=True),
        ]  # fmt: skip
    return [*found, *_float32_cases(kind)]


def _float32_cases(kind: str) -> list[Case]:
    """Kernels that only ever see one dtype, or differ little between them."""
    stream, quiet = _streaming(kind, False), {"noisy": False}
    q = {"mean": "fp32 r", "log_std": "fp32 r", "prior_mean": "fp32 r", "prior_std": "fp32 r"}
    gradients = {"d_mean": "fp32 w", "d_log_std": "fp32 w", "d_prior_mean": None, "d_prior_std": None, "grad": "fp32"}
    return [
        Case("sample_weights_backward fp32", "sample_weights", "sample_weights_backward_kernel",
             {"out": "fp32 w", "grad": "fp32 r", "log_std": "fp32 r"}, DRAW, **stream),
        Case("sample_whitened_weights fp32", "sample_weights", "sample_whitened_weights_kernel",
             {"out": "fp32 w", "center": "fp32 r", "prior_std": "fp32 r", "z": "fp32 r", "log_std": None},
             {**DRAW, "noise_scale": "fp32"}, **_streaming(kind, False, NOISY=True)),
        Case("sample_whitened_weights bf16 from fp32", "sample_weights", "sample_whitened_weights_kernel",
             {"out": "bf16 w", "center": "fp32 r", "prior_std": "fp32 r", "z": "fp32 r", "log_std": "fp32 r"},
             {**DRAW, "noise_scale": "fp32"}, **_streaming(kind, False, NOISY=True)),
        Case("noise_prediction_error velocity fp32", "noise_prediction_loss", "noise_prediction_error_kernel",
             {"prediction": "fp32 r", "partials": "fp64", "x0": "fp32 r", "signal": "fp32", "noise": "fp32"}, BATCH,
             {"NOISY": True, **IMAGES}),
        Case("mix_noise points fp32", "add_noise", "mix_noise_kernel",
             {"out": "fp32 w", "x0": "fp32 r", "signal": "fp32", "noise": "fp32"}, BATCH,
             {"GROUPED": False, "ROWS": TILE // 4, "COLUMNS": 4}, streams=False),
        Case("gaussian_kl fp32", "gaussian_kl", "gaussian_kl_kernel", {"partials": "fp64", **q}, {"numel": "i32"},
             SUMS, **quiet),
        Case("quadratic_penalty fp32", "gaussian_kl", "gaussian_kl_kernel",
             {"partials": "fp64", **q, "log_std": None}, {"numel": "i32"}, SUMS, **quiet),
        Case("gaussian_kl_backward fp32", "gaussian_kl", "gaussian_kl_backward_kernel", {**q, **gradients},
             {"numel": "i32"}, **stream, **quiet),
        Case("variational_gradients fp32", "gaussian_kl", "variational_gradients_kernel",
             {"d_mean": "fp32 w", "d_log_std": "fp32 w", "partials": "fp64", "grad": "fp32 r", **q},
             {**DRAW, "kl_weight": "fp32"}, SUMS),
        _step("variational_step natural_sign fp32", "natural_sign", "fp32"),
        _step("variational_step adam fp32", "adam", "fp32"),
        _step("variational_step natural_adam, odd size fp32", "natural_adam", "fp32", noisy=True, SPLIT=True),
        Case("variational_gradient_norm fp32", "variational_step", "variational_gradient_norm_kernel",
             {"grad": "fp32 r", "z": "fp32 r", "prior_std": "fp32 r", "partials": "fp64", "on_device": None},
             {"values": STEP["values"], "slot": "i32", "numel": "i32"},
             {"RULE": RULES.index("natural_adam"), **SUMS}, **quiet),
        Case("add_noise_gradient fp32", "variational_step", "add_noise_gradient_kernel",
             {"sum": "fp32 rw", "grad": "fp32 r"},
             {"scale": "fp32", "seed": "i64", "draw": "i64", "group": "i64", "numel": "i32"}, **stream),
        Case("welford_update fp32", "welford_update", "welford_update_kernel",
             {"mean": "fp32 rw", "squares": "fp32 rw", "value": "fp32 r", "partials": "fp64"},
             {"slots": "i32", "inverse_count": "fp32", "numel": "i32"}, SUMS, **quiet),
        Case("fold", "sums", "fold_kernel", {"partials": "fp64", "out": "fp64"},
             {"rows": "i32", "slots": "i32"}, {"TURNS": 5, "ROWS": 1, "BLOCK": 8192},
             warps=16, streams=False, noisy=False),
    ]  # fmt: skip


def compile_case(case: Case, target: GPUTarget) -> Compiled:
    """Compile one kernel for a GPU that need not be there; TRITON_INTERPRET must not be set."""
    kernel = getattr(import_module(f"vdu_fast.kernels.{case.module}"), case.kernel)
    absent = {name: None for name, operand in case.operands.items() if operand is None}
    pointers = {name: f"*{operand.split()[0]}" for name, operand in case.operands.items() if operand}
    constants = {**case.constants, **absent}
    types = {**pointers, **case.scalars}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    # Of the numbers, only sizes are told to be multiples of 16, as at a launch.
    uneven = case.constants.get("SPLIT")
    aligned = [name for name in kernel.arg_names
               if name in pointers or (name in ("numel", "elements") and not uneven)]  # fmt: skip
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": case.warps, "enable_fp_fusion": False}
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
    if target.backend == "hip":
        return _of_amd(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _of_nvidia(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared)


def _of_amd(assembly: str, shared: int) -> Compiled:
    counts = {
        key: sum(int(found) for found in re.findall(rf"\.{key}: +(\d+)", assembly))
        for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    return Compiled(
        assembly, counts["vgpr_count"], shared, 4 * (counts["vgpr_spill_count"] + counts["sgpr_spill_count"])
    )


def _of_nvidia(assembly: str, cubin: bytes, shared: int) -> Compiled:
    """Read the resources off the machine code, which is where they are certain."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Compiled(assembly, usage["REG"], shared, usage["STACK"] + usage["LOCAL"])


def _cuobjdump() -> str:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump") or "cuobjdump"
