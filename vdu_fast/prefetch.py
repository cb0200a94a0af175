"""The next minibatch is made while the device works on this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Prefetcher:
    """Minibatches for a GPU: the next one is gathered into pinned memory while the device works on this one.

    On the CPU, whose cores the network needs, a batch is made when it is asked for.

    Args:
        batch: makes the tensors of minibatch `step`, a function of `step` alone.
        device: where they go.
        enabled: False makes every batch when it is asked for on a GPU as well.
    """

    def __init__(self, batch: Callable[[int], Sequence[Tensor]], device: torch.device, *, enabled: bool = True) -> None:
        self._batch, self._device = batch, device
        self._pool = ThreadPoolExecutor(1, "vdu_fast-prefetch") if enabled and device.type == "cuda" else None
        self._next: tuple[int, Future[list[Tensor]]] | None = None

    def __call__(self, step: int) -> list[Tensor]:
        """The tensors of minibatch `step`, on the device."""
        if self._pool is None:
            return [tensor.to(self._device) for tensor in self._batch(step)]
        ahead, self._next = self._next, None
        tensors = ahead[1].result() if ahead is not None and ahead[0] == step else self._pinned(step)
        self._next = step + 1, self._pool.submit(self._pinned, step + 1)
        return [tensor.to(self._device, non_blocking=True) for tensor in tensors]

    def _pinned(self, step: int) -> list[Tensor]:
        return [tensor.pin_memory() for tensor in self._batch(step)]

    def close(self) -> None:
        """End the thread; batches are made when asked for from now on."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = self._next = None
