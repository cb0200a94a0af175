"""Times block sizes on a device: what is behind `vdu-fast tune`.

Kernels with sums are left out: their sums have the same bits everywhere because their chunks have one size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton.testing

from vdu_fast import kernels
from vdu_fast.kernels import launch, tuned

CANDIDATES = ((512, 2), (512, 4), (1024, 2), (1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8), (4096, 16))


def calls(numel: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """Every kernel whose blocks may have any size, on `numel` elements."""
    mean, log_std, prior_mean, grad, out = (torch.zeros(numel, dtype=dtype, device=device) for _ in range(5))
    prior_std = torch.ones_like(mean)
    seed, step, one = torch.tensor(1), torch.tensor(2), torch.ones((), device=device)
    q = mean, log_std, prior_mean, prior_std
    return {
        "standard_normal": lambda: kernels.standard_normal_(out, seed, step),
        "sample_weights": lambda: kernels.sample_weights_([out], [mean], [log_std], seed, step),
        "sample_weights_backward": lambda: kernels.sample_weights_backward(grad, log_std, seed, step),
        "sample_whitened_weights": lambda: kernels.sample_whitened_weights_(
            [out], [prior_mean], [prior_std], [mean], [log_std], seed, step
        ),
        "gaussian_kl_backward": lambda: kernels.gaussian_kl_backward(one, *q, 3),
        "add_noise_gradient": lambda: kernels.add_noise_gradient_([out], [grad], seed, step),
    }


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of one call on the device."""
    return triton.testing.do_bench(call, return_mode="median")


def tune(
    device: torch.device, numel: int, time: Callable[[Callable[[], object]], float] = milliseconds
) -> Iterator[tuple[str, dict[tuple[int, int], float]]]:
    """For every kernel and width of operands: its key, and the milliseconds of every (block, warps)."""
    for dtype in (torch.float32, torch.bfloat16):
        for kernel, call in calls(numel, dtype, device).items():
            found = {}
            for size in CANDIDATES:
                with launch.block_size(size):
                    found[size] = time(call)
            yield tuned.size_key(kernel, narrow=dtype == torch.bfloat16), found


def best(times: dict[tuple[int, int], float]) -> tuple[int, int]:
    return min(times, key=times.__getitem__)
