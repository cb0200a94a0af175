"""Do the GPU ops keep their budgets? `make gpu` runs this, on a machine that has one.

The questions of hot_paths.py and a few more, at 100 million parameters: C++ and Triton against eager, _foreach and
torch.compile, interleaved, with CUDA events around every call and the launches queued up behind a pause. Shares of
bandwidth are of a copy measured in the same rounds. Writes benchmarks/results/hot_paths_gpu.csv and .md, and exits with
1 when a budget is missed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from baselines import KL_WEIGHT, Row, State, check_close, gradients, mean_only, sampling, spread, unet
from torch import Tensor
from torch.nn import functional

from vdu_fast import _native, ops
from vdu_fast.arena import Arena
from vdu_fast.optim import UpdateRule

RESULTS = Path(__file__).parent / "results" / "hot_paths_gpu.csv"
# Of the bandwidth, and ratios to a baseline, by what its name begins with. A kernel that moves its bytes this fast is
# as fast as any can be, so a question bound by bytes is held to the bandwidth; the rest to the ratios.
BANDWIDTH, RATIOS = 0.9, {"_foreach": 3.0, "compile": 1.3}
OVERHEAD = {"mean_only": 0.02, "mean_field": 0.04}  # of the network's forward and backward at batch 128
PAUSE = 3_000_000  # clock cycles: about the time that the host takes to launch a question's calls
BACKENDS = [name for name in ("cuda", "triton") if _native.ABSENCES[name] is None]


def milliseconds(call: Callable[[], object], rounds: int = 1) -> list[float]:
    """What one call takes on the device, without what the host needs to launch it."""
    events = []
    for _ in range(rounds):
        torch.cuda._sleep(PAUSE)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def by_backend(calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The first of ours under every backend that is here."""

    def under(name: str, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> list[float]:
            with _native.use_backend(name):
                return milliseconds(call)

        return run

    first = next(iter(calls.values()))
    return {name: under(name, first) for name in BACKENDS}


def measure(row: Row, copy: Callable[[], object]) -> None:
    """Milliseconds of everything, interleaved, after a warm-up. What cannot run here is left out and told."""
    plain = {**row.baselines, "copy": copy}
    calls = {name: (lambda call=call: milliseconds(call)) for name, call in plain.items()} | by_backend(row.ours)
    for name, call in list(calls.items()):
        try:
            for _ in range(3):
                call()
        except Exception as error:  # a baseline's compiler may fail in any way; ours may not
            if name in BACKENDS:
                raise
            print(f"  {name} cannot run here: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            del calls[name]
    row.times = {name: [] for name in calls}
    for _ in range(row.repeats):
        for name, call in calls.items():
            row.times[name] += call()


def normal(s: State) -> Row:
    return Row(
        "standard_normal",
        {"eager": lambda: s.theta.normal_()},
        {"ours": lambda: torch.ops.vdu_fast.standard_normal_(s.theta, torch.tensor(1), torch.tensor(2))},
        s.numel,
        bytes=4 * s.numel,
    )


def step_call(s: State, rule: str, noise_scale: float) -> Callable[[], object]:
    """The one-pass step, without reading its sums back as VariationalWeights does."""
    constants = UpdateRule(rule, 1e-4).constants(1, kl_weight=KL_WEIGHT, noise_scale=noise_scale)
    moments = {"first": s.first, "second": s.second} if "adam" in rule else {}

    def step() -> object:
        return ops.variational_step_(
            s.theta, s.grad, s.center, s.prior_std, s.z, constants, 1, 2, 3, rule=rule, **moments
        )

    return step


def mean_only_step(s: State, rule: str) -> Row:
    row = mean_only(s, rule)
    row.ours = {"ours": step_call(s, rule, 0.0)}
    return row


def mean_field_step(s: State) -> Row:
    """Sample at the new mean as well: _foreach sampling and the fused Adam step, one after the other."""
    sample, update = sampling(s).baselines["_foreach"], mean_only(s, "natural_adam")
    together = {"_foreach + fused Adam": lambda: (update.baselines["_foreach + fused Adam"](), sample())}
    ours = {"ours": step_call(s, "natural_adam", 1.0)}
    return Row("mean-field step, natural_adam", together, ours, s.numel, bytes=40 * s.numel)


def pictures(*flat: Tensor) -> list[Tensor]:
    """Flat tensors as batches of 3 x 32 x 32 pictures, as many as fit."""
    samples = flat[0].numel() // 3072
    return [t[: samples * 3072].view(samples, 3, 32, 32) for t in flat]


def mixed(x0: Tensor, signal: Tensor, eps: Tensor, noise: Tensor) -> Tensor:
    return signal.view(-1, 1, 1, 1) * x0 + noise.view(-1, 1, 1, 1) * eps


def squared_error(prediction: Tensor, eps: Tensor) -> Tensor:
    return (prediction - eps).square().flatten(1).sum(1)


def noising(s: State) -> Row:
    """add_noise over batches of 3 x 32 x 32 pictures, as many as there are parameters in all."""
    x0, out = pictures(s.mean, s.theta)
    signal, noise = (torch.rand(len(x0), device=x0.device) for _ in range(2))

    def eager() -> Tensor:
        return mixed(x0, signal, torch.randn_like(x0), noise)

    eps = ops.standard_normal(x0.shape, 1, 2, stream=1, device=x0.device)
    out.copy_(mixed(x0, signal, eps, noise))
    check_close("mix_noise", ops.mix_noise(x0, signal, noise, 1, 2), out)
    del eps
    ours = {"ours": lambda: ops.mix_noise(x0, signal, noise, 1, 2)}
    return Row("add_noise", {"eager": eager, "compile": torch.compile(eager)}, ours, x0.numel(), bytes=8 * x0.numel())


def loss(s: State) -> Row:
    """The error against regenerated noise; the baselines read noise that was stored."""
    prediction, eps = pictures(s.mean, s.theta)
    eps.normal_()

    def eager() -> Tensor:
        return squared_error(prediction, eps)

    ours = {"ours": lambda: ops.noise_prediction_loss(prediction, 1, 2, reduction="none")}
    own = ops.standard_normal(prediction.shape, 1, 2, stream=1, device=prediction.device)
    check_close("noise_prediction_loss", ours["ours"](), squared_error(prediction, own))
    del own
    baselines = {"eager": eager, "compile": torch.compile(eager)}
    return Row("noise_prediction_loss", baselines, ours, prediction.numel(), bytes=4 * prediction.numel())


def pair(s: State) -> Row:
    """Both of a training step: the baselines keep the noise that they draw, ours draws it a second time."""
    x0, prediction = pictures(s.mean, s.theta)
    signal, noise = (torch.rand(len(x0), device=x0.device) for _ in range(2))

    def noised() -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(x0)
        return mixed(x0, signal, eps, noise), eps

    compiled_noised, compiled_error = torch.compile(noised), torch.compile(squared_error)

    def ours() -> tuple[Tensor, Tensor]:
        return ops.mix_noise(x0, signal, noise, 1, 2), ops.noise_prediction_loss(prediction, 1, 2, reduction="none")

    baselines = {
        "eager": lambda: squared_error(prediction, noised()[1]),
        "compile": lambda: compiled_error(prediction, compiled_noised()[1]),
    }
    return Row("add_noise + noise_prediction_loss", baselines, {"ours": ours}, x0.numel(), bytes=12 * x0.numel())


# Bound by arithmetic: drawing a normal costs about as much as reading and writing 6 bytes on an H100.
DRAWING = ("standard_normal", "noise_prediction_loss", "add_noise + noise_prediction_loss")
# Held to no ratio: the noise that the baseline reads must have been drawn and stored before, as in the question that
# takes both together.
STORED_NOISE = ("noise_prediction_loss",)
QUESTIONS: dict[str, Callable[[State], Row]] = {
    "standard_normal": normal,
    "sample_weights": sampling,
    "sample + KL + gradients": gradients,
    "mean-only step, natural": lambda s: mean_only_step(s, "natural"),
    "mean-only step, natural_adam": lambda s: mean_only_step(s, "natural_adam"),
    "mean-field step, natural_adam": mean_field_step,
    "add_noise": noising,
    "noise_prediction_loss": loss,
    "add_noise + noise_prediction_loss": pair,
}


def report(row: Row, missed: list[str]) -> list[dict[str, object]]:
    """Print one question and return its rows for the table."""
    medians = {name: statistics.median(times) for name, times in row.times.items()}
    copied = 8 * row.units / medians["copy"]  # bytes per ms
    print(f"\n{row.name}   (copy: {copied / 1e6:.0f} GB/s)")
    lines = []
    for name, median in medians.items():
        share = row.bytes / median / copied
        line: dict[str, object] = {
            "case": row.name, "implementation": name, "ms": f"{median:.3f}", "spread": f"{spread(row.times[name]):.3f}",
            "share_of_copy_bandwidth": f"{share:.2f}" if name in BACKENDS else "",
        }  # fmt: skip
        at_the_limit = row.name not in DRAWING and share >= BANDWIDTH
        for start, budget in RATIOS.items() if name in BACKENDS else ():
            others = [medians[other] / median for other in medians if other.startswith(start)]
            if others:
                line[f"ratio_to{start if start[0] == '_' else '_' + start}"] = f"{min(others):.2f}"
                if min(others) < budget and not at_the_limit and row.name not in STORED_NOISE:
                    missed.append(f"{row.name}, {name}: {min(others):.2f} x {start}, budget {budget} x")
        if name in BACKENDS and share < BANDWIDTH and row.name not in DRAWING:
            missed.append(f"{row.name}, {name}: {share:.2f} of copy bandwidth, budget {BANDWIDTH}")
        print("  " + "  ".join(f"{value!s:>9}" if value is not line["implementation"] else f"{value!s:24}"
                               for key, value in line.items() if key != "case" and value != ""))  # fmt: skip
        lines.append(line)
    return lines


def overhead(missed: list[str]) -> list[dict[str, object]]:
    """What a step costs beside the network's forward and backward at batch 128, in bfloat16 autocast."""
    try:
        network = unet().cuda()
    except ImportError as error:
        print(f"\noverhead: left out, {error}", file=sys.stderr)
        return []
    arena = Arena(network)
    x, target = (torch.randn(128, 3, 32, 32, device="cuda") for _ in range(2))
    t = torch.randint(1000, (128,), device="cuda")
    s = State([arena.theta.shape], "cuda")
    s.flat |= {"theta": arena.theta, "grad": arena.grad, "center": arena.theta.clone()}

    def forward_and_backward() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            functional.mse_loss(network(x, t, return_dict=False)[0].float(), target).backward()

    for _ in range(3):
        forward_and_backward()
    bare = statistics.median(milliseconds(forward_and_backward, 7))
    lines: list[dict[str, object]] = [{"case": "overhead", "implementation": "network", "ms": f"{bare:.3f}"}]
    for family, budget in OVERHEAD.items():
        for backend, call in by_backend({"": step_call(s, "natural_adam", float(family == "mean_field"))}).items():
            times = [time for _ in range(10) for time in call()]
            part = statistics.median(times[3:]) / bare  # the first compile
            lines.append({"case": f"overhead, {family}", "implementation": backend, "ms": f"{part * bare:.3f}",
                          "share_of_network": f"{part:.4f}"})  # fmt: skip
            if part > budget:
                missed.append(f"overhead, {family}, {backend}: {part:.1%} of the network, budget {budget:.0%}")
    for line in lines:
        print("  ".join(map(str, line.values())))
    return lines


COLUMNS = (
    "case", "implementation", "ms", "spread", "share_of_copy_bandwidth", "ratio_to_foreach", "ratio_to_compile",
    "share_of_network",
)  # fmt: skip


def write(lines: list[dict[str, object]], missed: list[str], numel: int, path: Path) -> None:
    """The table with what it was measured on, and a summary in markdown beside it."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    where = {
        "device": torch.cuda.get_device_name(), "parameters": numel, "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip, "commit": commit, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *where])
        writer.writeheader()
        writer.writerows({**line, **where} for line in lines)
    text = ["# Hot paths on a GPU", "", ", ".join(f"{key} {value}" for key, value in where.items()), ""]
    text += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    text += ["| " + " | ".join(str(line.get(column, "")) for column in COLUMNS) + " |" for line in lines]
    text += ["", "Budgets missed:" if missed else "All budgets are kept.", "", *(f"- {miss}" for miss in missed)]
    path.with_suffix(".md").write_text("\n".join(text).rstrip() + "\n")
    print(f"\nwritten to {path} and {path.with_suffix('.md').name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=100 * 2**20, help="fewer are taken where memory is short")
    parser.add_argument("--only", default="", help="run the questions whose name contains this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not BACKENDS:
        print(f"nothing to measure: {'; '.join(map(str, _native.ABSENCES.values()))}", file=sys.stderr)
        return 1
    tensors = max(1, min(arguments.parameters, torch.cuda.mem_get_info()[0] // (4 * 50)) // 2**20)
    shapes = [torch.Size([1024, 1024])] * tensors
    missed: list[str] = []
    lines: list[dict[str, object]] = []
    for name, make in QUESTIONS.items():
        if arguments.only in name:
            state = State(shapes, "cuda")
            row = make(state)
            row.units = state.numel
            target = torch.empty_like(state.mean)
            measure(row, lambda target=target, state=state: target.copy_(state.mean))
            lines += report(row, missed)
            # After every question: a run that is cut off keeps what it has measured.
            write(lines, missed, 2**20 * tensors, arguments.output)
            del state, row, target
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    if arguments.only in "overhead":
        lines += overhead(missed)
    write(lines, missed, 2**20 * tensors, arguments.output)
    for miss in missed:
        print(f"MISSED  {miss}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
