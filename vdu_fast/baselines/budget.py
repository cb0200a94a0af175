"""One currency for what a method costs: network evaluations per image, a backward pass at twice a forward pass."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn

from vdu_fast.config import UnlearnConfig
from vdu_fast.filters import FEATURE_LEVELS, MOST_FORGET_IMAGES

FORWARD, BACKWARD = 1, 2


class EvaluationCounter:
    """Counts what passes through a network; a context manager.

    An image that passes forward counts 1. Where autograd is on, its backward pass is taken for granted and it counts 3;
    a second backward pass through one graph has to be reported by `add_backward`.

    Args:
        module: the network, called with the images as its first positional argument.
        limit: what may be spent; None is no limit.

    Attributes:
        spent: evaluations so far.
    """

    def __init__(self, module: nn.Module, limit: int | None) -> None:
        self.module, self.limit, self.spent = module, limit, 0

    def __enter__(self) -> EvaluationCounter:
        self._handle = self.module.register_forward_hook(self._count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._handle.remove()

    def _count(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.spent += len(inputs[0]) * (FORWARD + BACKWARD if torch.is_grad_enabled() else FORWARD)

    def add_backward(self, images: int) -> None:
        """Count one more backward pass through a graph that was counted already."""
        self.spent += BACKWARD * images

    def times(self, cost: int) -> int | None:
        """How often `cost` evaluations can still be paid; None without a limit."""
        return None if self.limit is None else max(0, (self.limit - self.spent) // cost)


def evaluations_of_unlearn(config: UnlearnConfig, forget_images: int) -> int:
    """What `unlearn` spends under these settings when no guard stops it: the budget that all methods get.

    Bank, filter, steps, the measurements before the first step and those on the way.
    """
    replay = config.replay_weight > 0
    checks = -(-config.steps // config.check_every)
    # At the start the forget loss, and its course over the timesteps on four times as many samples.
    spent = (1 + 4 + checks) * config.check_size
    images = config.forget_batches * config.batch_size + (config.steps * config.replay_batch_size if replay else 0)
    # npo asks the model before unlearning, too.
    asked = config.forget_steps * config.batch_size if config.saturation == "npo" else 0
    spent += config.accumulate * config.samples_per_step * ((FORWARD + BACKWARD) * images + FORWARD * asked)
    if replay:
        spent += config.replay_samples * config.replay_sampler_steps
        # The bank measures on as many states as it has trajectories, at most.
        spent += checks * min(config.check_size, config.replay_samples)
    if replay and config.bank_filter == "positive_unlabelled":
        spent += len(FEATURE_LEVELS) * (config.replay_samples + min(forget_images, MOST_FORGET_IMAGES))
    return spent
