"""How the network is run: precision, memory layout, compilation. What it computes stays the same, but for rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Precision = Literal["float32", "bfloat16"]
CompileMode = Literal["off", "default", "reduce-overhead", "max-autotune"]


@dataclass(frozen=True)
class Execution:
    """The ways to run a network.

    Attributes:
        precision: "bfloat16" is autocast: weights, gradients and what surrounds the network stay as they are.
        channels_last: hand the network its input in the channels-last layout, which convolutions then keep.
        compile: mode of torch.compile, for calls that come often with one shape; "reduce-overhead" replays CUDA graphs.
    """

    precision: Precision = "float32"
    channels_last: bool = False
    compile: CompileMode = "off"

    def compiled(self, module: nn.Module) -> Callable[..., Any]:
        """The module, compiled where these settings say so. Compilation happens in the first call of every shape."""
        if self.compile == "off":
            return module
        return torch.compile(module, mode=None if self.compile == "default" else self.compile, dynamic=False)

    def call(self, network: Callable[..., Any], x_t: Tensor, timesteps: Tensor) -> Any:
        """What `network` gives for x_t [B, C, H, W], computed in this layout and precision."""
        if self.channels_last:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        if self.compile == "reduce-overhead" and x_t.is_cuda:
            # The graph's outputs are overwritten by its next replay, which begins here.
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return network(x_t, timesteps)


# Of a parameter's gradient under compilation, where the parameter has more than this share of the whole gradient.
WRONG, SIZEABLE = 0.2, 0.01


def differing_gradients(
    eager: Callable[[], Tensor], compiled: Callable[[], Tensor], parameters: Mapping[str, Tensor]
) -> list[str]:
    """Names of the parameters whose gradient differs between two ways to compute one loss by more than rounding does.

    torch.compile can drop gradients without a word: seen with torch 2.13 on the CPU, where all that lies before the
    first upsampling of a U-Net had a gradient of zero, and a run forgot half of what it should.
    """
    names, tensors = list(parameters), list(parameters.values())
    right, other = (
        [None if g is None else g.detach().double() for g in torch.autograd.grad(loss(), tensors, allow_unused=True)]
        for loss in (eager, compiled)
    )
    whole = sum(float(g.square().sum()) for g in right if g is not None) ** 0.5
    differing = []
    for name, a, b in zip(names, right, other, strict=True):
        norm = 0.0 if a is None else float(a.norm())
        if a is not None and norm > SIZEABLE * whole:
            away = norm if b is None else float((a - b).norm())
            if not away <= WRONG * norm:  # NaN is not
                differing.append(name)
    return differing
