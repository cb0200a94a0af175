"""The settings of unlearning: one definition that Python, command-line flags and YAML files share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from vdu_fast.errors import InputError, check_choices
from vdu_fast.execution import CompileMode, Execution, Precision
from vdu_fast.objective import ObjectiveReduction, Saturation
from vdu_fast.optim import Family, OptimizerName
from vdu_fast.schedule import TimestepWeighting

BankFilter = Literal["positive_unlabelled", "classifier", "none"]


@dataclass
class UnlearnConfig:
    """Settings of `unlearn` and `vdu-fast unlearn`.

    Args:
        family: "mean_only" moves the mean of q and evaluates the network there; "mean_field" evaluates it at samples
            theta = mu + sigma n.
        learn_std: under "mean_field", let log sigma move too; otherwise q keeps the posterior's sigma.
        samples_per_step: weight samples averaged per step under "mean_field".
        optimizer: "natural_adam" (Adam in whitened coordinates), "natural" (natural gradient), "natural_sign", or
            "adam" (plain Adam, which ignores the posterior and needs a rate like 1e-4).
        learning_rate: in posterior standard deviations per step for the natural rules, in weight units for "adam".
        momentum: of "natural" and "natural_sign".
        steps: optimizer steps at most; a guard may stop earlier.
        anneal: share of the steps, at their end, over which the learning rate falls linearly to zero; 0 is never.
        forget_share: share of the steps, at their start, in which the forget term acts, where there is a replay bank;
            in those after them the bank alone repairs what forgetting cost, and the forget batch passes through an
            uncompiled network no more. 1 is always. target_ratio may end a run before its repair, and what rollback
            goes by has the forget term in it all the time.
        batch_size: forget images per step.
        replay_batch_size: replayed states per step.
        accumulate: minibatches averaged into one step.
        gamma: weight of the parameter-space term B against the forget term, in [0, 1).
        replay_weight: lambda, weight of the function-space term B_f; 0 turns the replay bank off.
        reduction: "mean" or "sum"; decides what gamma and lambda mean (see vdu_fast.objective).
        weighting: C_t, "simple" or "elbo".
        timestep_window: [low, high) of timesteps on which the forget term acts; null is all.
        saturation: how the forget term lets go: "hinge" at hinge_ratio, "npo" softly, or "none" (unbounded).
        hinge_ratio: under "hinge", a sample is let go when its error reaches this multiple of what the forget data had
            at that timestep before.
        npo_beta: under "npo", in units of 1 / what the error was at that timestep before.
        target_ratio: stop when the forget loss on a fixed batch with fixed noise reaches this multiple of its start.
        trust_region: the forget term acts only while B per parameter is below this.
        max_gradient_norm: clip the gradient, in the coordinates of the optimizer, to this norm.
        rollback: end with the checked state whose objective on the fixed batch is best, not with the last one.
        trainable: shell patterns over parameter names; the rest of the model is left untouched.
        sharpen: power p of the posterior's metric, sigma <- sigma^p / rms(sigma)^(p - 1); 1 leaves it as it is.
        center: mu*, the "model"'s own weights or the "posterior"'s mean.
        replay_samples: trajectories in a new bank.
        replay_sampler_steps: sampler steps of a new bank.
        replay_states: states kept of each trajectory.
        replay_focus: share of the replayed states of a step, in [0, 1], that comes from the quarter of the bank which
            the filter finds most like what must go: that pays most for it. The rest comes from all; 0 is no focus.
        replay_guidance: how far replayed predictions are moved to those of a model that never drew what must go (see
            vdu_fast.guidance), where noise leaves open what a state will be: 1 is by Bayes' rule, 0 leaves them.
        bank_filter: how the unwanted is kept out of the bank: "positive_unlabelled" needs nothing but the forget
            images, "classifier" uses one you give, "none" keeps everything.
        feature_module: name of the submodule whose output the positive_unlabelled filter reads; null finds mid_block.
        max_dropped: the filter may drop at most this share of the bank.
        check_every: steps between measurements on the fixed batch.
        check_size: size of that batch.
        inference_batch_size: images per network call of the bank, its filter and the measurements, which need no
            gradient. Lower it where large pictures run out of memory; it changes results by float rounding only.
        save_every: steps between saves of the state that --resume needs.
        precision: "float32" or "bfloat16" (autocast of the network, wherever it is called).
        channels_last: run the network in the channels-last memory layout.
        compile: "off", or a mode of torch.compile ("default", "reduce-overhead", "max-autotune") for the network calls
            of the steps and the bank. Compiling takes a minute or more, and pays for large networks on a GPU, where
            "reduce-overhead" replays CUDA graphs.
        prefetch: on a GPU, gather the next minibatch while the device works on this one.
        device: "auto" takes CUDA where there is one.
        seed: of batches, timesteps, noise and the bank.
    """

    family: Family = "mean_only"
    learn_std: bool = False
    samples_per_step: int = 1
    optimizer: OptimizerName = "natural_adam"
    learning_rate: float = 0.02
    momentum: float = 0.0
    steps: int = 100
    anneal: float = 0.5
    forget_share: float = 1.0
    batch_size: int = 64
    replay_batch_size: int = 64
    accumulate: int = 1
    gamma: float = 0.05
    replay_weight: float = 4.0
    reduction: ObjectiveReduction = "mean"
    weighting: TimestepWeighting = "simple"
    timestep_window: tuple[int, int] | None = None
    saturation: Saturation = "hinge"
    hinge_ratio: float = 3.0
    npo_beta: float = 1.0
    target_ratio: float | None = None
    trust_region: float | None = None
    max_gradient_norm: float | None = None
    rollback: bool = False
    trainable: list[str] = field(default_factory=lambda: ["*"])
    sharpen: float = 1.0
    center: Literal["model", "posterior"] = "model"
    replay_samples: int = 1000
    replay_sampler_steps: int = 50
    replay_states: int = 10
    replay_focus: float = 0.5
    replay_guidance: float = field(default=0.0, metadata={"off": 0.0})
    bank_filter: BankFilter = "positive_unlabelled"
    feature_module: str | None = None
    max_dropped: float = 0.5
    check_every: int = 10
    check_size: int = 256
    inference_batch_size: int = 250
    save_every: int = 25
    precision: Precision = "float32"
    channels_last: bool = False
    compile: CompileMode = "off"
    prefetch: bool = True
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.gamma < 1:
            raise InputError(
                f"gamma must be in [0, 1), got {self.gamma}: at 0 no weight is tied, near 1 nothing is forgotten."
            )
        for name in (
            "samples_per_step",
            "steps",
            "batch_size",
            "replay_batch_size",
            "accumulate",
            "replay_samples",
            "replay_sampler_steps",
            "replay_states",
            "check_every",
            "check_size",
            "inference_batch_size",
            "save_every",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in (
            "learning_rate",
            "hinge_ratio",
            "npo_beta",
            "target_ratio",
            "trust_region",
            "max_gradient_norm",
            "sharpen",
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be a positive number, got {value}.")
        if self.target_ratio is not None and self.target_ratio <= 1:
            raise InputError(f"target_ratio must be above 1, the forget loss at the start, got {self.target_ratio}.")
        if not (math.isfinite(self.replay_weight) and self.replay_weight >= 0):
            raise InputError(f"replay_weight must be 0 or a positive number, got {self.replay_weight}.")
        if not (math.isfinite(self.replay_guidance) and self.replay_guidance >= 0):
            raise InputError(
                f"replay_guidance must be 0 (off) or a positive number, 1 by Bayes' rule, got {self.replay_guidance}."
            )
        if self.replay_guidance > 0 and self.bank_filter == "none":
            raise InputError(
                "replay_guidance needs a bank_filter that tells what is unwanted: use 'positive_unlabelled' or "
                "'classifier', or leave replay_guidance at 0."
            )
        if not 0 <= self.replay_focus <= 1:
            raise InputError(
                f"replay_focus must be in [0, 1], the share of a replay batch that is like what must go, got "
                f"{self.replay_focus}."
            )
        if not 0 <= self.anneal <= 1:
            raise InputError(f"anneal must be in [0, 1], the share of the steps that is annealed, got {self.anneal}.")
        if not 0 < self.forget_share <= 1:
            raise InputError(
                f"forget_share must be above 0 and at most 1, the share of the steps that forget, got "
                f"{self.forget_share}."
            )
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be in [0, 1), got {self.momentum}.")
        if not 0 < self.max_dropped < 1:
            raise InputError(f"max_dropped must be between 0 and 1, got {self.max_dropped}.")
        if self.learn_std and self.family != "mean_field":
            raise InputError("learn_std needs family mean_field: under mean_only q has a fixed standard deviation.")
        if self.samples_per_step > 1 and self.family != "mean_field":
            raise InputError("samples_per_step above 1 needs family mean_field: under mean_only all samples are equal.")
        if self.timestep_window is not None:
            self.timestep_window = (int(self.timestep_window[0]), int(self.timestep_window[1]))
            if not 0 <= self.timestep_window[0] < self.timestep_window[1]:
                raise InputError(
                    f"timestep_window must be [low, high) with 0 <= low < high, got {self.timestep_window}."
                )
        # list() would take a lone pattern apart, and the "*" in it would then match everything.
        self.trainable = [self.trainable] if isinstance(self.trainable, str) else list(self.trainable)

    @property
    def forget_steps(self) -> int:
        """How many steps the forget term acts in, from the first on."""
        return max(1, round(self.forget_share * self.steps)) if self.replay_weight > 0 else self.steps

    @property
    def forget_batches(self) -> int:
        """How many steps have a forget batch: a compiled network is called at one size only."""
        return self.steps if self.execution.compile != "off" else self.forget_steps

    @property
    def execution(self) -> Execution:
        """How the network is run."""
        return Execution(self.precision, self.channels_last, self.compile)
