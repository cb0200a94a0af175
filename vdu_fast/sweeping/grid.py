"""What a sweep tries, how it measures, and what one measurement holds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from typing import Any

from vdu_fast.config import UnlearnConfig
from vdu_fast.errors import InputError

# The settings of `unlearn` that a sweep finds.
SWEPT = ("gamma", "replay_weight", "hinge_ratio", "forget_share", "replay_guidance", "steps")
# Those that would end a run somewhere else than at the number of steps that is measured.
REFUSED = ("target_ratio", "rollback")


@dataclass(frozen=True)
class Setting:
    """One run of a sweep, which is measured at several numbers of steps."""

    replay_weight: float
    hinge_ratio: float
    gamma: float
    forget_share: float
    replay_guidance: float

    @property
    def name(self) -> str:
        """What its file is called."""
        return (
            f"lambda-{self.replay_weight:g}-hinge-{self.hinge_ratio:g}-gamma-{self.gamma:g}"
            f"-share-{self.forget_share:g}-guidance-{self.replay_guidance:g}"
        )

    def describe(self) -> str:
        """One line for people."""
        return (
            f"lambda {self.replay_weight:g}, hinge {self.hinge_ratio:g}, gamma {self.gamma:g}, forgetting in "
            f"{self.forget_share:g} of the steps, guidance {self.replay_guidance:g}"
        )

    def applied(self, config: UnlearnConfig, steps: int) -> UnlearnConfig:
        """The settings of `unlearn` that end where this one was measured after `steps`."""
        return replace(config, **asdict(self), steps=steps)


@dataclass(frozen=True)
class Point:
    """What a sweep measured of one setting after one number of steps.

    Attributes:
        replay_weight, hinge_ratio, gamma, forget_share, replay_guidance, steps: the settings.
        forgotten: of the fresh samples, how many the filter calls forgotten; `forgotten_before`, of the original's.
        pul: estimated percentage unlearned, 100 (forgotten_before - forgotten) / forgotten_before.
        distance: kept distance, see `vdu_fast.sweeping.signals`.
        ratio: `distance` over that of the original model's own kept samples: 1 is as good as nothing lost.
        replay_distance: mean squared distance to the original's predictions on replayed states.
        forget_ratio: forget loss, after / before.
    """

    replay_weight: float
    hinge_ratio: float
    gamma: float
    forget_share: float
    replay_guidance: float
    steps: int
    forgotten: int
    forgotten_before: int
    pul: float
    distance: float
    ratio: float
    replay_distance: float
    forget_ratio: float

    @property
    def setting(self) -> Setting:
        return Setting(**{field.name: getattr(self, field.name) for field in fields(Setting)})


@dataclass
class SweepConfig:
    """What a sweep tries and how it measures.

    Args:
        replay_weights: values of lambda (--replay_weight of `unlearn`).
        hinge_ratios: values of --hinge_ratio of `unlearn`.
        gammas: values of --gamma of `unlearn`.
        forget_shares: values of --forget_share of `unlearn`; try [0.5,1] on a model that forgets fast.
        replay_guidances: values of --replay_guidance of `unlearn`; try [0,1] on small pictures.
        step_counts: numbers of steps. One run serves them all: it goes on at the full learning rate, and anneals a copy
            of its state for each.
        least_forgotten: estimated PUL in percent that the chosen setting must reach; among those that do, the one that
            keeps most is chosen.
        samples: images drawn from every unlearned model, all from one starting noise; four times as many are drawn from
            the original, once.
        sampler_steps: network evaluations per image.
        sample_seed: of the starting noise, which nothing else draws from, whatever its seed.
    """

    replay_weights: list[float] = field(default_factory=lambda: [2.0, 4.0, 8.0, 16.0])
    hinge_ratios: list[float] = field(default_factory=lambda: [2.0, 4.0])
    gammas: list[float] = field(default_factory=lambda: [0.05, 0.3])
    forget_shares: list[float] = field(default_factory=lambda: [1.0])
    replay_guidances: list[float] = field(default_factory=lambda: [0.0])
    step_counts: list[int] = field(default_factory=lambda: [50, 100])
    least_forgotten: float = 98.0
    samples: int = 300
    sampler_steps: int = 50
    sample_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("replay_weights", "hinge_ratios", "gammas", "forget_shares", "replay_guidances", "step_counts"):
            values = getattr(self, name)
            if not values:
                raise InputError(f"--{name} is empty; give one or more numbers, as in --{name} [2,4].")
            setattr(self, name, sorted(set(values)))
        for name in ("replay_weights", "hinge_ratios"):
            if not all(math.isfinite(value) and value > 0 for value in getattr(self, name)):
                raise InputError(f"--{name} must be positive numbers, got {getattr(self, name)}.")
        if not all(0 <= gamma < 1 for gamma in self.gammas):
            raise InputError(f"--gammas must be in [0, 1), got {self.gammas}.")
        if not all(0 < share <= 1 for share in self.forget_shares):
            raise InputError(f"--forget_shares must be above 0 and at most 1, got {self.forget_shares}.")
        if not all(math.isfinite(strength) and strength >= 0 for strength in self.replay_guidances):
            raise InputError(f"--replay_guidances must be finite and 0 or more, got {self.replay_guidances}.")
        if min(self.step_counts) < 1:
            raise InputError(f"--step_counts must be at least 1, got {self.step_counts}.")
        if not 0 < self.least_forgotten <= 100:
            raise InputError(f"--least_forgotten is a percentage above 0 and at most 100, got {self.least_forgotten}.")
        if self.samples < 8:
            raise InputError(f"--samples must be at least 8, got {self.samples}; below 100 little can be told.")
        if self.sampler_steps < 1:
            raise InputError(f"--sampler_steps must be at least 1, got {self.sampler_steps}.")

    def settings(self) -> list[Setting]:
        """Every combination, one run each; those that replay the same bank are next to each other."""
        others = (self.replay_weights, self.hinge_ratios, self.gammas, self.forget_shares)
        return [Setting(*values, strength) for strength in self.replay_guidances for values in product(*others)]

    def measured_by(self) -> dict[str, Any]:
        """What decides the measurements of one setting; not the other settings, and not the choice."""
        return {name: getattr(self, name) for name in ("step_counts", "samples", "sampler_steps", "sample_seed")}


def check_base(config: UnlearnConfig, grid: SweepConfig) -> None:
    """InputError where the settings that all runs share cannot be swept."""
    default = UnlearnConfig()
    for name in REFUSED:
        if getattr(config, name) != getattr(default, name):
            raise InputError(
                f"--{name} ends a run elsewhere than at the numbers of steps that a sweep measures; leave it out. "
                "--step_counts are the numbers of steps to choose from."
            )
    for name in ("forget_share", "replay_guidance"):
        if getattr(config, name) != getattr(default, name):
            raise InputError(
                f"{name} {getattr(config, name)}: a sweep tries the values of its grid; name them there, as in "
                f"--{name}s [{getattr(config, name)}]."
            )
    if config.bank_filter == "classifier":
        raise InputError(
            "--bank_filter classifier: a sweep takes no classifier. Use positive_unlabelled or none; what it finds can "
            "be used with another filter."
        )
    if config.bank_filter == "none" and max(grid.replay_guidances) > 0:
        raise InputError(
            f"--replay_guidances {grid.replay_guidances}: without a --bank_filter nothing tells what is unwanted. Use "
            "positive_unlabelled, or leave it at [0]."
        )
    if config.saturation != "hinge" and len(grid.hinge_ratios) > 1:
        raise InputError(
            f"--hinge_ratios {grid.hinge_ratios} would all be the same run: only --saturation hinge has a hinge, not "
            f"{config.saturation}. Give one value."
        )
