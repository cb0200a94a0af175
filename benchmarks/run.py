"""Asks the questions of benchmarks/cases and holds the answers to their budgets: `make bench` and `make gpu` run this.

    python benchmarks/run.py                          everything, on the CPU; writes benchmarks/results/cpu.csv and .md
    python benchmarks/run.py --only sample_weights    questions whose name contains it; writes nothing unless --output
    python benchmarks/run.py --device cuda
    python benchmarks/run.py --base main --only step  beside another commit, in turns; refuses while the tests are red

Exits with 1 when a budget is missed, or with --base when this commit is slower.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that is not installed, as on the machine of `make gpu`

from vdu_fast import _native  # noqa: E402
from vdu_fast.benchmarks.case import Line, Question, load_questions  # noqa: E402
from vdu_fast.benchmarks.measure import GPU_BACKENDS  # noqa: E402
from vdu_fast.benchmarks.suite import ask, chosen, make_setting  # noqa: E402
from vdu_fast.benchmarks.tables import (  # noqa: E402
    environment,
    missed_budgets,
    shown,
    write_csv,
    write_markdown,
)
from vdu_fast.errors import InputError  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="TEXT", help="questions whose name contains one of these"
    )
    parser.add_argument("--groups", nargs="*", default=[], choices=("ops", "step", "loop", "machine"))
    parser.add_argument("--output", type=Path, help="the CSV; a .md is written beside it")
    parser.add_argument("--base", metavar="REV", help="compare with this commit")
    parser.add_argument("--list", action="store_true", help="list the questions and end")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{q.group:8} {q.name}" for q in load_questions().values()))
        return 0
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch finds no CUDA device here", file=sys.stderr)
        return 2
    if arguments.device == "cuda" and all(_native.ABSENCES[name] for name in GPU_BACKENDS):
        print(f"error: no backend serves the GPU: {'; '.join(map(str, _native.ABSENCES.values()))}", file=sys.stderr)
        return 2
    try:
        questions = chosen(arguments.only, groups=arguments.groups)
        if arguments.base is not None:
            from vdu_fast.benchmarks.versus import compare

            return compare(arguments.base, questions, arguments.device, arguments.threads)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    whole = not (arguments.only or arguments.groups)
    return run(
        questions, arguments.device, arguments.output or (RESULTS / f"{arguments.device}.csv" if whole else None)
    )


def run(questions: list[Question], device: str, output: Path | None) -> int:
    setting = make_setting(torch.device(device), quick=False)
    where, lines, failed = environment(setting.device, setting.numel), list[Line](), list[str]()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    for answer in ask(questions, setting):
        print(f"\n{answer.question.name}" + (f": left out, {answer.left_out}" if answer.left_out else ""), flush=True)
        for line in answer.lines:
            print("  " + told(line), flush=True)
        lines += answer.lines
        failed += [answer.question.name] if answer.failed else []
        if output is not None:  # after every question: a run that is cut off keeps what it has measured
            write_csv(output, lines, where)
            write_markdown(output.with_suffix(".md"), lines, where)
    if output is not None:
        print(f"\nwritten to {output} and {output.with_suffix('.md').name}")
    missed = missed_budgets(lines)
    print("\n".join([*(f"MISSED  {miss}" for miss in missed), *(f"FAILED  {name}" for name in failed)]))
    return 1 if missed or failed else 0


def told(line: Line) -> str:
    """One line for people."""
    words = [f"{line['implementation']:40}"]
    if "milliseconds" in line:
        words.append(f"{line['milliseconds']:10.3f} ms +-{100 * line['spread']:3.0f}%")
    if "ns_per_unit" in line:
        words.append(f"{line['ns_per_unit']:9.4g} ns/{line['unit']}")
    if "ratio_to_best_baseline" in line:
        words.append(f"{line['ratio_to_best_baseline']:6.2f} x {line['best_baseline']}")
    if "share_of_copy_bandwidth" in line:
        words.append(f"{line['share_of_copy_bandwidth']:.0%} of copy")
    if "part_of_network" in line:
        words.append(f"{line['part_of_network']:.1%} of the network")
    for name in ("bytes_per_parameter", "budget", "note"):
        if name in line:
            words.append(f"{name.replace('_', ' ')}: {shown(line[name])}" if name != "note" else str(line[name]))
    return "  ".join(words)


if __name__ == "__main__":
    sys.exit(main())
