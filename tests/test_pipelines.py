"""Pipelines load from and save to disk unchanged, and what cannot be unlearned is refused at the door."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import build_pipeline, build_tiny
from torch import nn

from vdu_fast.checkpoint import fingerprint
from vdu_fast.errors import InputError
from vdu_fast.pipelines import Denoiser, denoiser_of, load_pipeline, pick_device, save_pipeline

SHAPE = (1, 8, 8)


class Answering(nn.Module):
    """Answers with whatever `answer` makes of x_t, and remembers what it was called with."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.answer, self.calls = answer, []

    def forward(self, x_t, timesteps):
        self.calls.append((x_t, timesteps))
        return self.answer(x_t)


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: 2 * x,
        lambda x: (2 * x,),
        lambda x: SimpleNamespace(sample=2 * x),
        lambda x: torch.cat([2 * x, 5 + x], dim=1),  # learned variance beside the prediction
    ],
    ids=["tensor", "tuple", "object", "learned variance"],
)
def test_the_prediction_is_found_in_every_kind_of_output(scheduler, answer):
    x_t = torch.randn(3, *SHAPE)
    prediction = Denoiser(Answering(answer), scheduler, SHAPE).predict(x_t, torch.tensor([0, 5, 9]))
    assert torch.equal(prediction, 2 * x_t)


def test_the_network_sees_its_own_dtype_and_the_models_timesteps(scheduler):
    module = Answering(lambda x: x).bfloat16()
    Denoiser(module, scheduler, SHAPE).predict(torch.randn(2, *SHAPE), torch.tensor([4, 7]))
    x_t, timesteps = module.calls[0]
    assert x_t.dtype == torch.bfloat16
    assert timesteps.tolist() == [4, 7]


def test_evaluating_puts_the_mode_back_after_an_error(scheduler):
    module = build_tiny().train()
    denoiser = Denoiser(module, scheduler, SHAPE)

    def fail() -> None:
        with denoiser.evaluating():
            assert not module.training
            assert not torch.is_grad_enabled()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert module.training
    assert torch.is_grad_enabled()


def test_a_pipeline_comes_back_from_the_disk_as_it_was_saved(tmp_path):
    pipeline = build_pipeline("v_prediction")
    save_pipeline(pipeline, tmp_path / "out")
    loaded = load_pipeline(tmp_path / "out")
    assert fingerprint(loaded.unet) == fingerprint(pipeline.unet)
    denoiser = denoiser_of(loaded)
    assert denoiser.sample_shape == SHAPE
    assert denoiser.schedule.prediction_type == "v_prediction"
    assert len(denoiser.schedule) == 50


def test_saving_over_a_pipeline_replaces_it_and_leaves_other_files(tmp_path):
    pipeline = build_pipeline()
    save_pipeline(pipeline, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with torch.no_grad():
        pipeline.unet.conv_in.bias.add_(1)
    save_pipeline(pipeline, tmp_path)
    assert fingerprint(load_pipeline(tmp_path).unet) == fingerprint(pipeline.unet)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_missing_folder_and_a_folder_without_pipeline_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"--model .*absent does not exist"):
        load_pipeline(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no model_index\.json.*save_pretrained"):
        load_pipeline(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    pipeline = build_pipeline()
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match=r"holds only pickled weights .*safe_serialization=True"):
        load_pipeline(tmp_path)


def test_a_truncated_pipeline_is_refused(tmp_path):
    save_pipeline(build_pipeline(), tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="could not be loaded by diffusers"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize(
    "parts",
    [
        {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]},
        {"unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "VQModel"]},
        {"transformer": ["diffusers", "DiTTransformer2DModel"]},
    ],
    ids=["text", "latent", "transformer"],
)
def test_a_conditional_or_latent_pipeline_is_refused_before_it_is_loaded(tmp_path, parts):
    index = {"_class_name": "SomePipeline", "scheduler": ["diffusers", "DDPMScheduler"], **parts}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"is a SomePipeline of .*Supported: unconditional pixel-space"):
        load_pipeline(tmp_path)


def test_a_class_conditional_unet_is_refused():
    pipeline = build_pipeline(timesteps=10, num_class_embeds=10)
    with pytest.raises(InputError, match="has a conditional UNet2DModel"):
        denoiser_of(pipeline)


def test_a_device_is_taken_by_name_and_auto_leaves_a_module_on_its_accelerator():
    module = torch.nn.Linear(1, 1)
    assert pick_device("cpu", module).type == "cpu"
    assert pick_device("auto", module.to("meta")).type == "meta"
    for name in ("no-such-device", "hpu", "cuda:99"):
        with pytest.raises(InputError, match=f"device '{name}' cannot be used here"):
            pick_device(name, module)


def test_something_without_unet_or_without_size_is_refused():
    with pytest.raises(InputError, match="SimpleNamespace has no unet and scheduler"):
        denoiser_of(SimpleNamespace())
    pipeline = build_pipeline()
    pipeline.unet.register_to_config(sample_size=None)
    with pytest.raises(InputError, match="no sample_size; set it"):
        denoiser_of(pipeline)
