"""Images per second of the whole unlearning loop on the digits, under every way to run it.

What the options do to PUL and u-FID is measured by benchmarks/loop_options.py. Compilation is asked of GPUs alone: on
the CPU it gained nothing (118 against 108 ms a step), and under torch 2.13 gave wrong gradients, which a run finds out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vdu_fast import use_backend
from vdu_fast.benchmarks.case import Case, Setting, question
from vdu_fast.config import UnlearnConfig

OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16"},
    "channels_last": {"channels_last": True},
    "bfloat16, channels_last": {"precision": "bfloat16", "channels_last": True},
}
GPU_OPTIONS: dict[str, dict[str, Any]] = {
    "no prefetch": {"prefetch": False},
    "compile": {"compile": "default"},
    "reduce-overhead": {"compile": "reduce-overhead"},
    "bfloat16, channels_last, reduce-overhead": {
        "precision": "bfloat16", "channels_last": True, "compile": "reduce-overhead",
    },
}  # fmt: skip
NEVER = 10**6  # steps: of the end, and between checks


def _stepping(setting: Setting, changes: dict[str, Any]) -> Callable[[], object]:
    """One step of a run with these settings, over and over."""
    from vdu_fast.data import load_images
    from vdu_fast.demo import shipped_model
    from vdu_fast.pipelines import denoiser_of, load_pipeline
    from vdu_fast.posterior import GaussianPosterior
    from vdu_fast.replay import build_bank
    from vdu_fast.unlearning_run import UnlearningRun

    denoiser = denoiser_of(load_pipeline(shipped_model()))
    denoiser.module.to(setting.device)
    posterior = GaussianPosterior.load(shipped_model() / "posterior.safetensors")
    bank = build_bank(denoiser, 64, sampler_steps=10, states=5)
    config = UnlearnConfig(steps=NEVER, check_every=NEVER, **changes)
    denoiser.execution = config.execution
    run = UnlearningRun(denoiser, load_images("digits:0", split="train").images, posterior, bank, config)
    return run.step


def _on_reference(step: Callable[[], object]) -> None:
    with use_backend("reference"):
        step()


@question("unlearning loop on digits", group="loop", needs=("diffusers", "sklearn"))
def loop(setting: Setting) -> Case:
    options = OPTIONS | (GPU_OPTIONS if setting.device.type == "cuda" else {})
    config = UnlearnConfig()
    plain = _stepping(setting, {})
    return Case(
        {"reference ops, float32": lambda: _on_reference(plain)},
        {name: _stepping(setting, changes) for name, changes in options.items()},
        config.batch_size + config.replay_batch_size,
        unit="image",
        repeats=9,
        per_backend=False,
    )
