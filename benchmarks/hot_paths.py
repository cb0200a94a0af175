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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from vdu_fast import ops
from vdu_fast.arena import Arena
from vdu_fast.optim import UpdateRule, VariationalOptimizer, VariationalWeights

RESULTS = Path(__file__).parent / "results" / "hot_paths_cpu.csv"
KL_WEIGHT = 1e-6
COPIED = 36_000_000  # float32 numbers of the copy that bandwidths are compared with


@dataclass
class Row:
    """A question, its answer and its budget.

    Attributes:
        baselines, ours: functions without arguments, by name; the first of ours is the one with the budget.
        unit: what `units` counts.
        bytes: what the first of ours reads and writes, to set its time beside that of a copy in the same run.
        at_least: budget of the ratio to the fastest baseline (of `against`, if given).
        bandwidth_at_least: budget of the share of the copy bandwidth.
        part_at_most: budget of our time over that of the first baseline.
    """

    name: str
    baselines: dict[str, Callable[[], object]]
    ours: dict[str, Callable[[], object]]
    units: int
    at_least: float | None = None
    against: tuple[str, ...] = ()
    bandwidth_at_least: float | None = None
    part_at_most: float | None = None
    bytes: int = 0
    repeats: int = 7
    times: dict[str, list[float]] = field(default_factory=dict)


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


def unet() -> torch.nn.Module:
    """The google/ddpm-cifar10-32 shape: 35.7 million parameters."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        act_fn="silu",
        attention_head_dim=None,
        norm_num_groups=32,
    )


class State:
    """mu, rho, mu*, sigma*, gradients and moments: flat, and as one tensor per parameter."""

    NAMES = ("mean", "log_std", "center", "prior_std", "grad", "theta", "z", "first", "second", "d_mean", "d_log_std")

    def __init__(self, shapes: list[torch.Size]) -> None:
        self.numels = [shape.numel() for shape in shapes]
        self.numel = sum(self.numels)
        generator = torch.Generator().manual_seed(0)
        self.flat = {name: torch.randn(self.numel, generator=generator) * 0.01 for name in self.NAMES}
        self.flat["log_std"].sub_(5.0)
        self.flat["prior_std"].abs_().add_(1e-3)
        self.flat["second"].square_()
        self.lists = {
            name: [part.view(shape) for part, shape in zip(t.split(self.numels), shapes, strict=True)]
            for name, t in self.flat.items()
        }

    def __getattr__(self, name: str) -> Tensor:
        return self.__dict__["flat"][name]


def check_close(name: str, got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not error < tolerance:
        raise SystemExit(f"{name} is wrong by {error:.1e}; a wrong result is not timed")


def sampling(s: State) -> Row:
    lists = s.lists

    def eager() -> None:
        for theta, mean, log_std in zip(lists["theta"], lists["mean"], lists["log_std"], strict=True):
            theta.copy_(mean + log_std.exp() * torch.randn_like(mean))

    def foreach() -> None:
        noise = [torch.randn_like(m) for m in lists["mean"]]
        torch._foreach_mul_(noise, torch._foreach_exp(lists["log_std"]))
        torch._foreach_add_(noise, lists["mean"])
        torch._foreach_copy_(lists["theta"], noise)

    @torch.compile
    def compiled_body(mean: Tensor, log_std: Tensor) -> Tensor:
        return mean + log_std.exp() * torch.randn_like(mean)

    def ours() -> None:
        ops.sample_weights_(s.theta, s.mean, s.log_std, 1, 2)

    ours()
    check_close("sample_weights_", s.theta, s.mean + s.log_std.exp() * ops.standard_normal(s.numel, 1, 2))
    return Row(
        "sample_weights",
        {"eager": eager, "_foreach": foreach, "compile": lambda: compiled_body(s.mean, s.log_std)},
        {
            "vdu_fast": ours,
            "vdu_fast Tensor[]": lambda: ops.sample_weights_(lists["theta"], lists["mean"], lists["log_std"], 1, 2),
        },
        s.numel,
        at_least=6,
        bytes=12 * s.numel,
    )


def gradients(s: State) -> Row:
    """Sample, KL, and gradients in mean and log_std, given the gradient in the sample."""

    def body(
        n: Tensor, mean: Tensor, log_std: Tensor, center: Tensor, prior_std: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        std = log_std.exp()
        theta = mean + std * n
        scaled, ratio = (mean - center) / prior_std, std / prior_std
        kl = (0.5 * ratio.square() + 0.5 * scaled.square() - ratio.log() - 0.5).sum()
        d_mean = grad + KL_WEIGHT * scaled / prior_std
        return theta, kl, d_mean, grad * n * std + KL_WEIGHT * (ratio.square() - 1)

    compiled_body = torch.compile(body)
    arguments = ("mean", "log_std", "center", "prior_std", "grad")

    def eager() -> object:
        return [body(torch.randn_like(t[0]), *t) for t in zip(*(s.lists[a] for a in arguments), strict=True)]

    def foreach() -> object:
        mean, log_std, center, prior_std, grad = (s.lists[a] for a in arguments)
        n = [torch.randn_like(m) for m in mean]
        std = torch._foreach_exp(log_std)
        noise = torch._foreach_mul(std, n)
        theta = torch._foreach_add(mean, noise)
        scaled = torch._foreach_sub(mean, center)
        torch._foreach_div_(scaled, prior_std)
        ratio = torch._foreach_div(std, prior_std)
        log_ratio = torch._foreach_log(ratio)
        torch._foreach_mul_(ratio, ratio)
        pieces = zip(ratio, scaled, log_ratio, strict=True)
        kl = sum(0.5 * r.sum() + 0.5 * q.square().sum() - g.sum() for r, q, g in pieces)
        torch._foreach_div_(scaled, prior_std)
        d_mean = torch._foreach_add(grad, scaled, alpha=KL_WEIGHT)
        torch._foreach_mul_(noise, grad)
        torch._foreach_sub_(ratio, 1)
        torch._foreach_add_(noise, ratio, alpha=KL_WEIGHT)
        return theta, kl, d_mean, noise

    def compiled() -> object:
        return compiled_body(torch.randn_like(s.mean), *(getattr(s, a) for a in arguments))

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        ops.sample_weights_(s.theta, s.mean, s.log_std, 1, 2)
        return ops.variational_gradients(s.grad, s.mean, s.log_std, s.center, s.prior_std, 1, 2, kl_weight=KL_WEIGHT)

    kl, d_mean, d_log_std = ours()
    expected = body(ops.standard_normal(s.numel, 1, 2), *(getattr(s, a) for a in arguments))
    names, results = ("theta", "KL", "d_mean", "d_log_std"), (s.theta, kl, d_mean, d_log_std)
    for name, got, want in zip(names, results, expected, strict=True):
        check_close(f"variational_gradients: {name}", got, want)
    return Row(
        "sample + KL + gradients",
        {"eager": eager, "_foreach": foreach, "compile": compiled},
        {"vdu_fast": ours},
        s.numel,
        at_least=3,
        bytes=40 * s.numel,
    )


def mean_only(s: State, rule: str) -> Row:
    """Penalty and update around mu*: eager with torch's fused Adam on the weights, ours in whitened coordinates."""
    parameters = [torch.nn.Parameter(t.clone()) for t in s.lists["theta"]]
    center, prior_std = s.lists["center"], s.lists["prior_std"]
    precision = [std.square().reciprocal() for std in prior_std]
    for p, g in zip(parameters, s.lists["grad"], strict=True):
        p.grad = g.clone()
    adam = torch.optim.Adam(parameters, lr=1e-5, fused=True)
    one = torch.nn.Parameter(s.theta.clone())
    one.grad = s.grad.clone()
    flat_adam = torch.optim.Adam([one], lr=1e-5, fused=True)
    flat_precision = s.prior_std.square().reciprocal()

    @torch.no_grad()
    def foreach() -> object:
        away = torch._foreach_sub(parameters, center)
        pull = torch._foreach_mul(away, precision)
        penalty = sum(0.5 * (a * p).sum() for a, p in zip(away, pull, strict=True))
        torch._foreach_add_([p.grad for p in parameters], pull, alpha=KL_WEIGHT)
        adam.step()
        return penalty

    @torch.no_grad()
    def flat_eager() -> object:
        away = one - s.center
        pull = away * flat_precision
        penalty = 0.5 * (away * pull).sum()
        one.grad.add_(pull, alpha=KL_WEIGHT)
        flat_adam.step()
        return penalty

    @torch.compile
    def compiled_body(
        theta: Tensor, grad: Tensor, center: Tensor, precision: Tensor, first: Tensor, second: Tensor
    ) -> Tensor:
        away = theta - center
        pull = away * precision
        g = grad + KL_WEIGHT * pull
        first.mul_(0.9).add_(g, alpha=0.1)
        second.mul_(0.99).addcmul_(g, g, value=0.01)
        theta.addcdiv_(first, second.sqrt() + 1e-8, value=-1e-5)
        return 0.5 * (away * pull).sum()

    clones = {name: getattr(s, name).clone() for name in ("theta", "first", "second")}

    def compiled() -> object:
        return compiled_body(clones["theta"], s.grad, s.center, flat_precision, clones["first"], clones["second"])

    update = UpdateRule(rule, 1e-4)
    weights = VariationalWeights(s.center, s.prior_std, update)

    def ours() -> object:
        return weights.step_(s.theta, s.grad, kl_weight=KL_WEIGHT)

    ours()
    direction = s.prior_std * s.grad
    expected = -1e-4 * (direction if rule == "natural" else direction.sign())
    sizeable = direction.abs() > 1e-8  # the first step of Adam is the sign, until its eps is felt
    check_close(f"variational_step_ {rule}", weights.z[sizeable], expected[sizeable], 1e-3)
    return Row(
        f"mean-only step, {rule}",
        {"_foreach + fused Adam": foreach, "flat + fused Adam": flat_eager, "compile": compiled},
        {"vdu_fast": ours},
        s.numel,
        at_least=4.5,
        against=("_foreach + fused Adam", "flat + fused Adam"),
        bandwidth_at_least=0.7,
        bytes=(24 if rule == "natural" else 40) * s.numel,
    )


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
        with optimizer.sampled_weights():
            pass
        optimizer.step()

    numel = sum(shape.numel() for shape in shapes)
    return Row("mean-field step against ivon-opt", {"ivon": ivon_step}, {"vdu_fast": ours}, numel, at_least=20)


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


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles over the median."""
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / statistics.median(times)


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
