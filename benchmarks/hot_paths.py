"""Do the CPU ops keep their budgets? `make bench` runs this.

Every row is one question: our op against its fair baselines, all in this process, interleaved, on the parameters of the
google/ddpm-cifar10-32 U-Net (35.7 million in about 300 tensors). The ratio is that of the medians, to the fastest
baseline. Every fast result is compared with the baseline's (or the reference's) before it is timed. Writes
benchmarks/results/hot_paths_cpu.csv and exits with 1 when a ratio misses its budget.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from baselines import KL_WEIGHT, Row, State, gradients, mean_only, sampling, spread, unet
from torch.nn import functional

from vdu_fast.arena import Arena
from vdu_fast.optim import UpdateRule, VariationalOptimizer, VariationalWeights

RESULTS = Path(__file__).parent / "results" / "hot_paths_cpu.csv"
COPIED = 36_000_000  # float32 numbers of the copy that bandwidths are compared with


def measure(row: Row) -> None:
    """Interleaved with each other and with a copy, after one warm-up of each."""
    source, target = torch.randn(COPIED), torch.empty(COPIED)
    calls = {**row.baselines, **row.ours, "copy": lambda: target.copy_(source)}
    for call in calls.values():
        call()
    row.times = {name: [] for name in calls}
    for _ in range(row.repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            row.times[name].append(time.perf_counter() - start)


def against_ivon(shapes: list[torch.Size]) -> Row | None:
    """A whole mean-field step in a user's loop: sampled weights, and the update."""
    try:
        import ivon
    except ImportError:
        print("ivon-opt is not installed: its row is left out", file=sys.stderr)
        return None
    generator = torch.Generator().manual_seed(0)

    def parameters() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.05) for shape in shapes]
        for p in made:
            p.grad = torch.randn(p.shape, generator=generator) * 1e-3
        return made

    theirs, mine = parameters(), parameters()
    ivon_optimizer = ivon.IVON(theirs, lr=1e-3, ess=1e6)
    optimizer = VariationalOptimizer(mine, 1e-3, lr=1e-3, kl_weight=1e-6, rule="natural_adam")

    def ivon_step() -> None:
        with ivon_optimizer.sampled_params(train=True):
            pass
        ivon_optimizer.step()

    def ours() -> None:
        with optimizer.sampled_weights(restore=False):
            pass
        optimizer.step()

    def ours_restoring() -> None:
        with optimizer.sampled_weights():
            pass
        optimizer.step()

    numel = sum(shape.numel() for shape in shapes)
    both = {"vdu_fast": ours, "vdu_fast, restoring": ours_restoring}
    return Row("mean-field step against ivon-opt", {"ivon": ivon_step}, both, numel, at_least=20)


def overhead(family: str, limit: float) -> Row:
    """What a step costs beside the bare network's forward and backward at batch 4."""
    network = unet()
    arena = Arena(network)
    rule = UpdateRule("natural_adam" if family == "mean_only" else "natural", 1e-6)
    center = arena.theta.clone()
    weights = VariationalWeights(center, torch.full_like(center, 1e-3), rule, family=family)
    x, t, target = torch.randn(4, 3, 32, 32), torch.tensor([10, 200, 500, 900]), torch.randn(4, 3, 32, 32)

    def network_only() -> None:
        arena.zero_grad()
        functional.mse_loss(network(x, t, return_dict=False)[0], target).backward()

    draws = iter(range(10**6))

    def step_only() -> None:
        draw = next(draws)
        weights.step_(arena.theta, arena.grad, kl_weight=KL_WEIGHT, draw=draw, next_draw=draw + 1)

    return Row(
        f"overhead, {family}",
        {"network": network_only},
        {"vdu_fast": step_only},
        arena.numel,
        part_at_most=limit,
        repeats=5,
    )


def import_seconds() -> float:
    """Seconds that `import vdu_fast` adds to `import torch`, the median of five fresh processes."""
    code = "import time, torch; a = time.perf_counter(); import vdu_fast; print(time.perf_counter() - a)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return statistics.median(float(run.stdout) for run in runs)


def report(row: Row, missed: list[str]) -> list[dict[str, object]]:
    """Print one question and return its rows for the table; budgets that are missed are added to `missed`."""
    medians = {name: statistics.median(times) for name, times in row.times.items()}
    bandwidth = 8 * COPIED / medians["copy"]
    best = min(row.baselines, key=medians.__getitem__)
    lines = []
    print(f"\n{row.name}   (copy: {bandwidth / 1e9:.1f} GB/s)")
    for name in (*row.baselines, *row.ours):
        median = medians[name]
        ratio = medians[best] / median if name in row.ours else None
        share = row.bytes / median / bandwidth if name == "vdu_fast" and row.bytes else None
        line = {
            "case": row.name, "implementation": name, "ns_per_parameter": f"{1e9 * median / row.units:.3f}",
            "spread": f"{spread(row.times[name]):.3f}", "ratio_to_best_baseline": f"{ratio:.2f}" if ratio else "",
            "share_of_copy_bandwidth": f"{share:.2f}" if share else "",
        }  # fmt: skip
        lines.append(line)
        print(f"  {name:24} {line['ns_per_parameter']:>9} ns  +- {100 * spread(row.times[name]):3.0f}%", end="")
        print(f"   {ratio:6.2f} x {best}" if ratio else "", f"  {share:.0%} of copy bandwidth" if share else "")
        if name == "vdu_fast":
            missed += [f"{row.name}: {miss}" for miss in misses(row, medians, share)]
    return lines


def misses(row: Row, medians: dict[str, float], share: float | None) -> list[str]:
    """The budgets of a question that the first of ours does not keep."""
    ours, found = medians["vdu_fast"], []
    if row.at_least is not None:
        best = min(row.against or row.baselines, key=medians.__getitem__)
        print(f"  budget: {medians[best] / ours:.2f} x {best}, at least {row.at_least} x")
        if medians[best] / ours < row.at_least:
            found.append(f"{medians[best] / ours:.2f} x {best}, budget {row.at_least} x")
    if row.bandwidth_at_least is not None and share is not None and share < row.bandwidth_at_least:
        found.append(f"{share:.2f} of copy bandwidth, budget {row.bandwidth_at_least}")
    if row.part_at_most is not None:
        part = ours / medians[next(iter(row.baselines))]
        print(
            f"  budget: {100 * part:.1f}% of the network's forward and backward, at most {100 * row.part_at_most:.0f}%"
        )
        if part > row.part_at_most:
            found.append(f"{100 * part:.1f}% of the network, budget {100 * row.part_at_most:.0f}%")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument("--only", default="", help="run the questions whose name contains this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    shapes = [p.shape for p in unet().parameters()]
    questions: dict[str, Callable[[], Row | None]] = {
        "sample_weights": lambda: sampling(State(shapes)),
        "sample + KL + gradients": lambda: gradients(State(shapes)),
        "mean-only step, natural": lambda: mean_only(State(shapes), "natural"),
        "mean-only step, natural_adam": lambda: mean_only(State(shapes), "natural_adam"),
        "mean-field step against ivon-opt": lambda: against_ivon(shapes),
        "overhead, mean_only": lambda: overhead("mean_only", 0.03),
        "overhead, mean_field": lambda: overhead("mean_field", 0.10),
    }
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    missed: list[str] = []
    lines: list[dict[str, object]] = []
    for name, make in questions.items():
        if arguments.only in name and (row := make()) is not None:
            measure(row)
            lines += report(row, missed)
            torch._dynamo.reset()
    if arguments.only in "import":
        seconds = import_seconds()
        print(f"\nimport vdu_fast: {seconds:.3f} s on top of import torch, budget 0.1 s")
        lines.append({"case": "import", "implementation": "vdu_fast", "seconds": f"{seconds:.3f}"})
        if seconds > 0.1:
            missed.append(f"import vdu_fast: {seconds:.3f} s, budget 0.1 s")
    write(lines, arguments.output)
    for miss in missed:
        print(f"MISSED  {miss}")
    return 1 if missed else 0


def write(lines: list[dict[str, object]], path: Path) -> None:
    """The table, with what it was measured on."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    where = {
        "threads": torch.get_num_threads(), "isa": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
        "commit": commit, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    columns = [
        "case", "implementation", "ns_per_parameter", "spread", "ratio_to_best_baseline", "share_of_copy_bandwidth",
        "seconds", *where,
    ]  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({**line, **where} for line in lines)
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    sys.exit(main())
