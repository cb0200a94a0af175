"""What every Triton kernel takes on every architecture: registers, shared memory, spills, bytes per element.

Compiled ahead of time, so no GPU is needed. Writes benchmarks/results/triton_kernels.csv.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import triton

from vdu_fast.kernels import ahead

RESULTS = Path(__file__).parent / "results" / "triton_kernels.csv"
KINDS = {"sm_80": "cuda 8", "sm_90": "cuda", "gfx942": "hip"}


def rows(target: str) -> list[dict[str, object]]:
    """One row per kernel."""
    found = []
    for case in ahead.cases(KINDS[target]):
        code = ahead.compile_case(case, ahead.TARGETS[target])
        row = {
            "kernel": case.name, "target": target, "registers": code.registers, "spilled_bytes": code.spilled_bytes,
            "shared_bytes": code.shared_bytes, "bytes_per_element": case.bytes_per_element,
            "elements_per_program": case.constants.get("BLOCK", ahead.TILE), "warps": case.warps,
            "triton": triton.__version__,
        }  # fmt: skip
        found.append(row)
        print(f"{target:8}{case.name:52}{code.registers:4} registers {code.shared_bytes:6} B shared")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    table = [row for target in KINDS for row in rows(target)]
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    print(f"written to {arguments.output}")
    spilled = [f"{row['kernel']} on {row['target']}" for row in table if row["spilled_bytes"]]
    print("\n".join(f"SPILLS  {name}" for name in spilled), end="")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
