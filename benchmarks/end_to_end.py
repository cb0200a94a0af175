"""Is unlearning the shipped digits faster on the native ops than on the reference, and are the weights the same?

Alternates the two backends over the loop of one request (bank made once), and prints the medians and whether the final
weights are equal bit for bit.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from vdu_fast import use_backend
from vdu_fast.config import UnlearnConfig
from vdu_fast.data import load_images
from vdu_fast.demo import shipped_model
from vdu_fast.pipelines import denoiser_of, load_pipeline
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.replay import build_bank
from vdu_fast.unlearner import unlearn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    model, config = shipped_model(), UnlearnConfig()
    images = load_images("digits:0", split="train")
    posterior = GaussianPosterior.load(model / "posterior.safetensors")
    original = denoiser_of(load_pipeline(model))
    bank = build_bank(original, config.replay_samples)
    seconds: dict[str, list[float]] = {"reference": [], "cpu": []}
    weights: dict[str, torch.Tensor] = {}
    for _ in range(repeats):
        for backend in seconds:
            pipeline = load_pipeline(model)
            with use_backend(backend):
                result = unlearn(pipeline, images, posterior=posterior, config=config, bank=bank)
            seconds[backend].append(result.seconds["steps"])
            weights[backend] = torch.cat([p.detach().flatten() for p in pipeline.unet.parameters()])
    for backend, times in seconds.items():
        told = ", ".join(f"{t:.2f}" for t in times)
        print(f"{backend:10} {statistics.median(times):.2f} s for {config.steps} steps (of {told})")
    equal = torch.equal(weights["reference"], weights["cpu"])
    print(f"final weights {'equal bit for bit' if equal else 'differ'}")


if __name__ == "__main__":
    main()
