"""The README's Python examples run as they stand, in a folder that holds the files they name."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build_pipeline
from torch import nn

import vdu_fast
from vdu_fast import UnlearnConfig
from vdu_fast.posterior import GaussianPosterior

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = build_pipeline()
    pipeline.save_pretrained("my-pipeline")
    GaussianPosterior.constant(pipeline.unet, 0.01).save("posterior.safetensors")
    Path("pictures-of-it").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pictures-of-it/{number}.png")
    return pipeline


def test_unlearning_example_changes_the_pipeline_and_saves_it(workplace, monkeypatch):
    example = next(code for code in EXAMPLES if "unlearn(" in code)
    # The example stands unchanged; only what "the defaults" are is smaller here.
    bank = {"replay_samples": 8, "replay_sampler_steps": 4, "replay_states": 2, "replay_batch_size": 4}
    small = functools.partial(UnlearnConfig, steps=2, **bank)
    monkeypatch.setattr(vdu_fast, "UnlearnConfig", small, raising=False)
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["result"].steps == 2  # type: ignore[attr-defined]
    assert Path("clean-pipeline/model_index.json").is_file()
    before = dict(workplace.unet.named_parameters())
    after = dict(scope["pipeline"].unet.named_parameters())  # type: ignore[attr-defined]
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_recorder_example_writes_a_posterior(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = next(code for code in EXAMPLES if "PosteriorRecorder(" in code)
    unet = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)

    class NoisyOptimizer:
        def step(self) -> None:
            optimizer.zero_grad()
            (unet(torch.randn(4, 3)) - torch.randn(4, 2)).square().mean().backward()
            optimizer.step()

    scope = {"unet": unet, "loader": range(2300), "optimizer": NoisyOptimizer()}
    exec(compile(example, "README.md", "exec"), scope)
    GaussianPosterior.load("posterior.safetensors").check_fits(dict(unet.named_parameters()))


def test_examples_of_the_optimizer_and_the_ops_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    functions = next(code for code in EXAMPLES if "ops.add_noise(" in code)
    loop = next(code for code in EXAMPLES if "VariationalOptimizer(" in code)

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return self.layer(x_t) + timesteps[:, None] / 1000

    model = Denoiser()
    before = model.layer.weight.detach().clone()
    vectors = {name: torch.full((6,), 0.1, requires_grad=True) for name in ("mean", "log_std")}
    scope = {
        "torch": torch, "model": model, "seed": 1, "alphas_cumprod": torch.linspace(0.99, 0.01, 1000),
        "loader": [torch.randn(3, 4) for _ in range(4)],
        "prior_mean": torch.zeros(6), "prior_std": torch.ones(6), **vectors,
    }  # fmt: skip
    GaussianPosterior.constant(model, 0.01).save("posterior.safetensors")
    exec(compile(functions, "README.md", "exec"), scope)
    assert all(tensor.grad.abs().min() > 0 for tensor in vectors.values())  # type: ignore[union-attr]
    exec(compile(loop, "README.md", "exec"), scope)
    assert not torch.equal(model.layer.weight, before)
