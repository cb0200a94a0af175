"""What a step costs beside the bare network's forward and backward.

On the CPU at batch 4 of the 35.7 million parameter U-Net, and at batch 128 of the digits'; on a GPU at batch 128 of the
larger, in bfloat16 autocast. Beside it the eager figure: penalty and fused Adam by _foreach, and a draw.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from vdu_fast.arena import Arena
from vdu_fast.benchmarks.case import Budget, Calls, Case, Setting, question
from vdu_fast.benchmarks.cases import mean_only_step, sample_weights
from vdu_fast.benchmarks.parameters import State, cifar_unet, digits_unet, shapes_of

PARTS = {"cpu": {"mean_only": 0.03, "mean_field": 0.10}, "cuda": {"mean_only": 0.02, "mean_field": 0.04}}


def _eager(s: State, family: str) -> Callable[[], object]:
    """The same work by torch alone."""
    update = mean_only_step.baselines(s)["_foreach + fused Adam"]
    if family == "mean_only":
        return update
    draw = sample_weights.baselines(s)["_foreach"]
    return lambda: (update(), draw())


def _case(setting: Setting, network: nn.Module, batch: int, family: str) -> Case:
    device = setting.device
    network.to(device).train()
    config = network.config
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)  # type: ignore[union-attr]
    x, target = (torch.randn(shape, device=device) for _ in range(2))
    t = torch.randint(1000, (batch,), device=device)
    s = State(shapes_of(network), device)
    eager = _eager(s, family)
    arena = Arena(network)
    # The step moves the network's own weights, by next to nothing.
    s.theta, s.grad, s.center = arena.theta, arena.grad, arena.theta.clone()
    for name in ("z", "first", "second"):
        getattr(s, name).zero_()
    rule = "natural_adam" if family == "mean_only" or device.type == "cuda" else "natural"

    def forward_and_backward() -> None:
        arena.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            prediction = network(x, t, return_dict=False)[0]
        functional.mse_loss(prediction.float(), target).backward()

    calls: Calls = {"network, forward and backward": forward_and_backward}
    step = mean_only_step.step(s, rule, noise_scale=float(family == "mean_field"))
    return Case(
        calls,
        {"vdu_fast": step, "eager": eager} if device.type == "cpu" else {"vdu_fast": step},
        arena.numel,
        # The state of a small network stays in the caches, and its bytes cost nothing.
        bytes=mean_only_step.BYTES[rule] * arena.numel if arena.numel > 10**7 else 0,
        budget=Budget(part=PARTS[device.type][family]),
        repeats=5,
    )


@question("overhead at 35.7 M, mean-only", group="step", needs=("diffusers",))
def mean_only(setting: Setting) -> Case:
    return _case(setting, cifar_unet(), 4 if setting.device.type == "cpu" else 128, "mean_only")


@question("overhead at 35.7 M, mean-field", group="step", needs=("diffusers",))
def mean_field(setting: Setting) -> Case:
    return _case(setting, cifar_unet(), 4 if setting.device.type == "cpu" else 128, "mean_field")


@question("overhead on digits, mean-only", group="step", devices=("cpu",), needs=("diffusers",), quick=True)
def digits(setting: Setting) -> Case:
    return _case(setting, digits_unet(), 128, "mean_only")
