"""Do the ways to run the network change what is forgotten and what is kept? Only their speed should differ.

Runs the demo of some digits under every option and writes benchmarks/results/loop_options.csv: PUL and u-FID. Their
speed is a question of benchmarks/cases/loop_options.py.
The float32 row of a digit is what its others are compared with. Finished runs in the folder are kept.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
from pathlib import Path
from typing import Any

import torch

from vdu_fast.benchmarks.cases.loop_options import OPTIONS
from vdu_fast.config import UnlearnConfig
from vdu_fast.demo import run_demo
from vdu_fast.records import decisive, without_off
from vdu_fast.report import plain

RESULTS = Path(__file__).parent / "results" / "loop_options.csv"
SAMPLES = 1000


def measured(digit: int, changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The metrics of one demo, which is run unless its folder holds that of the same settings already."""
    config, path = UnlearnConfig(**changes), folder / "metrics.json"
    if path.is_file():
        metrics = json.loads(path.read_text())
        known = {name: value for name, value in metrics["settings"].items() if name != "evaluation"}
        if without_off(UnlearnConfig, known) == plain(decisive(config)):
            return metrics
    return run_demo(folder, forget=digit, samples=SAMPLES, config=config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=int, nargs="*", default=[0, 3, 8])
    parser.add_argument("--folder", type=Path, default=Path("runs/loop-options"), help="holds one demo folder per run")
    arguments = parser.parse_args()
    rows = []
    for digit in arguments.digits:
        for name, changes in OPTIONS.items():
            folder = arguments.folder / f"{digit}-{name.replace(', ', '-')}"
            metrics = measured(digit, changes, folder)
            u_fid = metrics["u_fid"]
            rows.append({
                "digit": digit, "option": name, "pul": round(metrics["pul"], 1), "u_fid": round(u_fid["after"], 3),
                "u_fid_oracle": round(u_fid["oracle"], 3), "samples": SAMPLES,
                "threads": torch.get_num_threads(), "torch": torch.__version__,
                "date": datetime.date.today().isoformat(),
            })  # fmt: skip
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            with RESULTS.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
