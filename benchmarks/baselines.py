"""The questions that the benchmarks of the hot paths ask on the CPU and on a GPU, with their fair baselines.

Every fast result is compared with a baseline's (or the reference's) before it is timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vdu_fast import ops
from vdu_fast.optim import UpdateRule, VariationalWeights

KL_WEIGHT = 1e-6


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

    def __init__(self, shapes: list[torch.Size], device: torch.device | str = "cpu") -> None:
        self.numels = [shape.numel() for shape in shapes]
        self.numel = sum(self.numels)
        generator = torch.Generator(device).manual_seed(0)
        self.flat = {name: torch.randn(self.numel, generator=generator, device=device) * 0.01 for name in self.NAMES}
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


def noise(s: State) -> Tensor:
    """The normals that the draws of the questions below use."""
    return ops.standard_normal(s.numel, 1, 2, device=s.theta.device)


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles over the median."""
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / statistics.median(times)


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
    check_close("sample_weights_", s.theta, s.mean + s.log_std.exp() * noise(s))
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

    given = {name: torch.empty_like(s.mean) for name in ("noise", "theta", "d_mean", "d_log_std")}

    @torch.compile
    def compiled_into_body(
        n: Tensor, theta: Tensor, d_mean: Tensor, d_log_std: Tensor, tensors: tuple[Tensor, ...]
    ) -> Tensor:
        made = body(n, *tensors)
        theta.copy_(made[0])
        d_mean.copy_(made[2])
        d_log_std.copy_(made[3])
        return made[1]

    def compiled_into() -> object:
        given["noise"].normal_()
        return compiled_into_body(*given.values(), tuple(getattr(s, a) for a in arguments))

    operands = (s.grad, s.mean, s.log_std, s.center, s.prior_std, 1, 2)

    def ours() -> Tensor:
        ops.sample_weights_(s.theta, s.mean, s.log_std, 1, 2)
        return ops.variational_gradients_(s.d_mean, s.d_log_std, *operands, kl_weight=KL_WEIGHT)

    def ours_fresh() -> tuple[Tensor, Tensor, Tensor]:
        ops.sample_weights_(s.theta, s.mean, s.log_std, 1, 2)
        return ops.variational_gradients(*operands, kl_weight=KL_WEIGHT)

    expected = body(noise(s), *(getattr(s, a) for a in arguments))
    kl = ours()
    fresh_kl, *fresh = ours_fresh()
    names = ("theta", "KL", "d_mean", "d_log_std")
    for results in ((s.theta, kl, s.d_mean, s.d_log_std), (s.theta, fresh_kl, *fresh)):
        for name, got, want in zip(names, results, expected, strict=True):
            check_close(f"variational_gradients: {name}", got, want)
    return Row(
        "sample + KL + gradients",
        {"eager": eager, "_foreach": foreach, "compile": compiled, "compile, given results": compiled_into},
        {"vdu_fast": ours, "vdu_fast, fresh results": ours_fresh},
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
