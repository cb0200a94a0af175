"""How many arithmetic operations an op needs, counted while its reference runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vdu_fast import use_backend
from vdu_fast.benchmarks.parameters import State

# What moves, makes or reinterprets numbers and computes none.
_FREE = {
    "view", "clone", "copy_", "_to_copy", "empty", "empty_like", "zeros", "zeros_like", "ones_like", "full", "cat",
    "stack", "select", "slice", "unsqueeze", "expand", "reshape", "detach", "alias", "arange", "index", "transpose",
    "permute", "squeeze", "split", "split_with_sizes", "unbind", "_unsafe_view", "as_strided", "new_empty", "fill_",
    "scalar_tensor", "lift_fresh", "_local_scalar_dense", "contiguous", "view_as", "resize_",
}  # fmt: skip


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in _FREE and func.namespace == "aten":
            tensors = [t for t in (*args, result) if isinstance(t, Tensor)]
            # A reduction works on its input, everything else on its output.
            self.count += max((t.numel() for t in tensors), default=0)
        return result


COUNTED = 1 << 16


def operations_for(numel: int, call: Callable[[State], object]) -> int:
    """Elementwise operations of `call(state)` on `numel` parameters, counted on a small state under the reference.

    The integer operations that draw the noise are among them.
    """
    state = State([torch.Size([COUNTED])])
    for name in State.NAMES:
        getattr(state, name)
    with torch.no_grad(), use_backend("reference"), _Counting() as counting:
        call(state)
    return counting.count * numel // COUNTED
