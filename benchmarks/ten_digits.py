"""Does one default configuration forget any of the ten digits, and what does it cost?

Runs `vdu-fast demo --forget N --samples 1000` for N = 0..9 (finished demos in the folder are kept where their settings
are those of now), writes benchmarks/results/ten_digits.csv and prints the table of the README.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vdu_fast.config import UnlearnConfig
from vdu_fast.evaluation import EvaluationConfig
from vdu_fast.report import plain

SAMPLES = 1000
RESULTS = Path(__file__).parent / "results" / "ten_digits.csv"


def demo(digit: int, output: Path, threads: int | None) -> dict[str, Any]:
    """The metrics of one demo, which is run unless its folder has those of the same digit and settings already."""
    if not finished(digit, output):
        command = [sys.executable, "-m", "vdu_fast.cli", "demo", "--forget", str(digit), "--samples", str(SAMPLES)]
        command += ["--output", str(output)] + (["--threads", str(threads)] if threads else [])
        subprocess.run(command, check=True)
    return json.loads((output / "metrics.json").read_text())


def finished(digit: int, output: Path) -> bool:
    """Whether the folder holds the demo of this digit under the defaults of now."""
    path = output / "metrics.json"
    if not path.is_file():
        return False
    metrics = json.loads(path.read_text())
    settings = plain(asdict(UnlearnConfig()) | {"evaluation": asdict(EvaluationConfig(samples=SAMPLES))})
    return metrics["settings"] == settings and metrics["forgotten_class"]["name"] == str(digit)


def row(digit: int, metrics: dict[str, Any]) -> dict[str, Any]:
    u_fid, shares = metrics["u_fid"], metrics["shares"]
    return {
        "digit": digit,
        "samples_before": metrics["counts"]["forgotten_before"],
        "samples_after": metrics["counts"]["forgotten_after"],
        "pul": round(metrics["pul"], 1),
        "u_fid_original": round(u_fid["before"], 2),
        "u_fid_after": round(u_fid["after"], 2),
        "u_fid_oracle": round(u_fid["oracle"], 2),
        "u_fid_floor": round(u_fid["floor"], 2),
        "ratio_to_oracle": round(u_fid["after"] / u_fid["oracle"], 2),
        "least_kept_share": round(shares["kept_ratio_min"], 2),
        "least_kept_digit": shares["kept_ratio_min_class"],
        "retained_loss_ratio": round(metrics["retained_loss"]["ratio"], 3),
        "seconds_unlearn": round(metrics["seconds"]["unlearn"], 1),
        "seconds_total": round(metrics["seconds"]["total"], 1),
        "samples": metrics["counts"]["samples"],
        "sampler_steps": metrics["sampler"]["steps"],
        "torch": metrics["versions"]["torch"],
        "date": datetime.date.today().isoformat(),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| forget | drawn before, after | PUL | u-FID before | u-FID after | oracle | after / oracle | least kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['digit']} | {r['samples_before']}, {r['samples_after']} | {r['pul']} | {r['u_fid_original']} | "
        f"{r['u_fid_after']} | {r['u_fid_oracle']} | {r['ratio_to_oracle']} | "
        f"{100 * r['least_kept_share']:.0f}% (digit {r['least_kept_digit']}) |"
        for r in rows
    ]
    pul, ratio = [r["pul"] for r in rows], [r["ratio_to_oracle"] for r in rows]
    lines.append(
        f"| **median (worst)** | | **{statistics.median(pul):.1f} ({min(pul)})** | | | | "
        f"**{statistics.median(ratio):.2f} ({max(ratio)})** | "
        f"**{100 * statistics.median(r['least_kept_share'] for r in rows):.0f}% "
        f"({100 * min(r['least_kept_share'] for r in rows):.0f}%)** |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/ten-digits"), help="holds one demo folder per digit")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    rows = [row(digit, demo(digit, arguments.folder / f"demo-{digit}", arguments.threads)) for digit in range(10)]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
