"""`unlearn` from end to end on tiny models: every setting runs, nothing is half done, an interrupted run goes on."""

from __future__ import annotations

import copy
import json
import math
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from tiny import TinyDenoiser, build_pipeline, build_tiny, random_posterior
from torch import Tensor, nn

from vdu_fast import replay, unlearner
from vdu_fast.checkpoint import StoppedAtOnce, fingerprint, load_tensors, save_tensors
from vdu_fast.config import UnlearnConfig
from vdu_fast.data import ImageSet
from vdu_fast.errors import InputError
from vdu_fast.job import Observers
from vdu_fast.pipelines import Denoiser, denoiser_of, load_pipeline
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.replay import ReplayBank, build_bank
from vdu_fast.request_bank import BANK_FILE
from vdu_fast.unlearner import PASSED_ON, STATE_FILE, UnlearnResult, unlearn
from vdu_fast.unlearning_run import UnlearningRun

SCHEDULER = DDPMScheduler(num_train_timesteps=50)


def small(**settings) -> UnlearnConfig:
    defaults = {
        "batch_size": 6,
        "replay_batch_size": 6,
        "steps": 4,
        "check_every": 2,
        "check_size": 16,
        "save_every": 2,
    }
    defaults |= {"replay_samples": 12, "replay_sampler_steps": 6, "replay_states": 3, "bank_filter": "none"}
    return UnlearnConfig(**(defaults | {"learning_rate": 0.2} | settings))


def unlearn_tiny(images: Tensor, module: nn.Module | None = None, **options) -> UnlearnResult:
    module = module if module is not None else build_tiny()
    settings = {k: options.pop(k) for k in list(options) if k in UnlearnConfig.__dataclass_fields__}
    options = {"scheduler": SCHEDULER, "posterior": random_posterior(build_tiny())} | options
    return unlearn(module, images, config=small(**settings), **options)


def weights(model) -> Tensor:
    module = model if isinstance(model, nn.Module) else model.unet
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "natural", "learning_rate": 300.0},
        {"optimizer": "natural_sign", "momentum": 0.9},
        {"optimizer": "natural_adam"},
        {"optimizer": "adam", "learning_rate": 1e-3},
        {"family": "mean_field"},
        {"family": "mean_field", "learn_std": True, "samples_per_step": 2, "accumulate": 2},
        {"saturation": "none"},
        {"saturation": "npo"},
        {"weighting": "elbo", "timestep_window": (5, 40)},
        {"reduction": "sum", "gamma": 0.5, "replay_weight": 0.1},
        {"trust_region": 0.01, "max_gradient_norm": 0.5, "rollback": True},
        {"replay_weight": 0.0},
        {"sharpen": 2.0, "center": "posterior"},
        {"precision": "bfloat16"},
    ],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()),
)
def test_every_setting_runs_and_changes_the_model(images, settings):
    module = build_tiny()
    before = weights(module)
    result = unlearn_tiny(images, module, **settings)
    assert result.model is module
    assert result.steps == 4
    assert not torch.equal(weights(module), before)
    assert weights(module).isfinite().all()
    assert result.history[-1]["forget_ratio"] > 0
    assert (result.filter_report is None) == (settings.get("replay_weight") == 0)
    json.dumps(result.record(), allow_nan=False)


def test_the_record_tells_that_what_could_not_be_compiled_ran_uncompiled(images, monkeypatch):
    def without_a_compiler(*_):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(torch, "compile", lambda module, **_: without_a_compiler)
    record = unlearn_tiny(images, compile="default", channels_last=True).record()
    assert record["settings"]["compile"] == "default"
    assert record["execution"] == {"precision": "float32", "channels_last": True, "compile": "off"}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_pipeline_of_every_prediction_type_is_written_and_loads_again(images, tmp_path, prediction_type):
    pipeline = build_pipeline(prediction_type)
    posterior = random_posterior(pipeline.unet, scale=0.05)
    before = weights(pipeline)
    result = unlearn(pipeline, images, posterior=posterior, config=small(), output=tmp_path / "out")
    loaded = load_pipeline(tmp_path / "out")
    assert torch.equal(weights(loaded), weights(pipeline))
    assert not torch.equal(weights(pipeline), before)
    record = json.loads((tmp_path / "out" / "unlearn.json").read_text())
    assert record["weights"] == fingerprint(loaded.unet)
    assert record["steps"] == result.steps == 4
    assert record["settings"]["gamma"] == small().gamma
    assert record["stopped_because"] == "all 4 steps done"
    assert not (tmp_path / "out" / "resume").exists()


def test_flow_matching_modules_can_be_unlearned(images):
    result = unlearn_tiny(images, scheduler=FlowMatchEulerDiscreteScheduler(50))
    assert result.history[-1]["forget_ratio"] > 1


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda module: torch.compile(module, backend="eager")])
def test_a_wrapped_module_is_unlearned_and_written_as_what_it_wraps(images, tmp_path, wrap):
    plain, module = unlearn_tiny(images).model, build_tiny()
    wrapped = wrap(module)
    result = unlearn_tiny(images, wrapped, output=tmp_path)
    assert result.model is wrapped
    assert torch.equal(weights(module), weights(plain))
    assert set(load_file(tmp_path / "model.safetensors")) == set(module.state_dict())


def test_a_bare_module_is_written_as_safetensors(images, tmp_path):
    module = build_tiny()
    unlearn_tiny(images, module, output=tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in module.state_dict().items())


class Tied(TinyDenoiser):
    def __init__(self) -> None:
        super().__init__(timesteps=50)
        self.encode = nn.Linear(64, 64)
        self.time = nn.Linear(1, 64)
        self.decode = nn.Linear(64, 64)
        self.decode.weight = self.encode.weight


def test_tied_weights_stay_tied_and_are_written(images, tmp_path):
    module = Tied()
    unlearn_tiny(images, module, posterior=random_posterior(module), output=tmp_path)
    assert module.decode.weight is module.encode.weight
    written = load_file(tmp_path / "model.safetensors")
    assert torch.equal(written["decode.weight"], module.encode.weight)


def test_only_the_trainable_subset_changes(images):
    pipeline = build_pipeline()
    before = copy.deepcopy(pipeline.unet.state_dict())
    unlearn(
        pipeline,
        images,
        posterior=random_posterior(pipeline.unet),
        config=small(trainable=["mid_block.*", "conv_out.bias"]),
    )
    changed = {name for name, tensor in pipeline.unet.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("mid_block.") or name == "conv_out.bias" for name in changed)


def test_a_posterior_of_the_trainable_subset_is_enough(images):
    module = build_tiny()
    posterior = random_posterior(module)
    posterior = GaussianPosterior({name: t for name, t in posterior.std.items() if name.startswith("time.")})
    unlearn_tiny(images, module, posterior=posterior, trainable=["time.*"])


def test_a_posterior_file_and_an_image_set_are_accepted(images, tmp_path):
    random_posterior(build_tiny()).save(tmp_path / "p.safetensors")
    from_file = unlearn_tiny(ImageSet(images, None, (), "mine"), posterior=tmp_path / "p.safetensors")
    assert torch.equal(weights(from_file.model), weights(unlearn_tiny(images).model))


def test_target_and_rollback_are_reported(images):
    stopped = unlearn_tiny(images, target_ratio=1.0001, check_every=1, steps=50)
    assert "target_ratio 1.0001" in stopped.stopped_because
    assert stopped.steps < 50
    rolled = unlearn_tiny(images, rollback=True, check_every=1, learning_rate=3.0, replay_weight=50.0, steps=8)
    objectives = [record["objective"] for record in rolled.history]
    assert rolled.weights_from_step == 1 + objectives.index(min(objectives))
    assert rolled.steps == 8


def test_a_bank_is_read_where_there_is_one_and_made_where_there_is_none(images, tmp_path):
    path, drawn = tmp_path / "bank.safetensors", []
    observers = Observers(on_sample=drawn.append)
    first = unlearn_tiny(images, bank=path, observers=observers)
    assert sum(drawn) == 12
    assert len(ReplayBank.load(path)) == 12
    second = unlearn_tiny(images, bank=str(path), observers=observers)
    third = unlearn_tiny(images, bank=ReplayBank.load(path), observers=observers)
    assert sum(drawn) == 12
    assert torch.equal(weights(first.model), weights(second.model))
    assert torch.equal(weights(first.model), weights(third.model))


def test_a_bank_of_another_model_is_refused(images, tmp_path):
    other = build_tiny()
    nn.init.zeros_(other.time.bias)
    bank = build_bank(Denoiser(other, SCHEDULER, (1, 8, 8)), 12, sampler_steps=6, states=3)
    bank.save(tmp_path / "bank.safetensors")
    for given in (bank, tmp_path / "bank.safetensors"):
        with pytest.raises(InputError, match="was drawn from a model with other weights"):
            unlearn_tiny(images, bank=given)


def test_the_function_space_term_holds_the_model_back(images):
    """With a large lambda the model moves less in what it predicts on its own samples."""
    free, held = (unlearn_tiny(images, replay_weight=w, steps=20, check_every=20) for w in (1e-6, 100.0))
    assert held.history[-1]["replay_check"] < 0.5 * free.history[-1]["replay_check"]


def test_observers_hear_of_samples_steps_and_decisions(images):
    steps, drawn, said = [], [], []
    unlearn_tiny(images, observers=Observers(steps.append, drawn.append, said.append))
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert all(record["total"] == 4 and record["images_per_second"] > 0 for record in steps)
    assert sum(drawn) == 12
    assert any("12 images" in line for line in said)


class Interrupting:
    """Raises KeyboardInterrupt out of on_step, once, at the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, record) -> None:
        if record["step"] == self.step:
            raise KeyboardInterrupt


GUIDED = {
    "replay_guidance": 1.0,
    "bank_filter": "positive_unlabelled",
    "feature_module": "encode",
    "replay_samples": 40,
    # A schedule of 50 timesteps leaves too little noise.
    "scheduler": DDPMScheduler(num_train_timesteps=1000),
}
VARIANTS = [
    {},
    {"family": "mean_field", "learn_std": True, "accumulate": 2},
    {"optimizer": "natural_sign", "momentum": 0.9, "rollback": True, "check_every": 1, "learning_rate": 2.0},
    {"replay_weight": 0.0, "saturation": "npo", "optimizer": "adam", "learning_rate": 1e-3},
    {"forget_share": 0.5},
    GUIDED,
]


class Bright(nn.Module):
    """Two classes by how bright the picture is, without being sure."""

    def __init__(self, sharpness: float = 1.0) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def forward(self, pictures: Tensor) -> Tensor:
        brightness = self.sharpness * pictures.mean(dim=(1, 2, 3))
        return torch.stack((brightness - 2, -brightness), dim=1)


def test_a_guided_bank_leads_elsewhere_and_says_so(images):
    said, modules = [], [build_tiny(), build_tiny()]
    by_classifier = GUIDED | {"bank_filter": "classifier", "max_dropped": 0.1, "classifier": Bright()}
    by_classifier["forget_label"] = 0
    result = unlearn_tiny(images, modules[0], observers=Observers(on_message=said.append), **by_classifier)
    unlearn_tiny(images, modules[1], **by_classifier | {"replay_guidance": 0.0})
    assert not torch.equal(*map(weights, modules))
    found = result.record()["filter"]
    assert f"guidance: {found['guided_states']} replayed states" in "\n".join(said)
    assert 0 < found["guided_states"] <= 40 * 3
    assert 0 < found["guided_dropped"] <= found["dropped"]


def test_images_too_far_apart_to_guide_are_said_before_the_first_step(images):
    says = r"replay_guidance 1\.0: the 40 replayed images lie too far apart.*Raise replay_samples .*, or leave it at 0"
    with pytest.raises(InputError, match=says):
        unlearn_tiny(images, **GUIDED | {"scheduler": SCHEDULER})


@pytest.mark.parametrize(
    "settings", VARIANTS, ids=["defaults", "mean_field", "rollback", "without bank", "repair", "guided"]
)
@pytest.mark.parametrize("at", [1, 3, 7, 8])
def test_an_interrupted_run_resumes_to_the_same_bits(images, tmp_path, settings, at):
    settings = {"steps": 8, "save_every": 3} | settings
    whole = unlearn_tiny(images, **settings)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        unlearn_tiny(images, output=out, observers=Observers(on_step=Interrupting(at)), **settings)
    assert (out / STATE_FILE).is_file()
    assert (out / BANK_FILE).is_file() == (settings.get("replay_weight") != 0)
    seen = []
    resumed = unlearn_tiny(images, output=out, resume=True, observers=Observers(on_step=seen.append), **settings)
    assert [record["step"] for record in seen] == list(range(at + 1, 9))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.weights_from_step == whole.weights_from_step
    assert resumed.history == whole.history
    assert torch.equal(load_file(out / "model.safetensors")["time.bias"], whole.model.time.bias)
    assert not (out / "resume").exists()


def test_the_time_of_a_run_is_that_of_all_its_parts(images, tmp_path, monkeypatch):
    now = iter(range(10**6))
    monkeypatch.setattr(unlearner.time, "perf_counter", lambda: float(next(now)))
    result = unlearn_tiny(images)
    parts = {name: value for name, value in result.seconds.items() if name != "unlearn"}
    assert set(parts) == {"bank", "filter", "steps"}
    assert result.seconds["unlearn"] == sum(parts.values()) > max(parts.values()) > 0
    assert set(unlearn_tiny(images, replay_weight=0.0).seconds) == {"steps", "unlearn"}


def test_a_resumed_run_counts_the_time_before_it(images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        unlearn_tiny(images, output=out, observers=Observers(on_step=Interrupting(3)))
    state, metadata = load_tensors(out / STATE_FILE)
    saved = json.loads(metadata["seconds"])
    assert set(saved) == {"bank", "filter", "steps"}
    assert min(saved.values()) > 0
    long = {"bank": 1000.0, "filter": 2000.0, "steps": 4000.0}
    save_tensors(out / STATE_FILE, state, metadata | {"seconds": json.dumps(long)})
    seconds = unlearn_tiny(images, output=out, resume=True).seconds
    assert all(long[name] <= seconds[name] < long[name] + 100 for name in long)
    assert seconds["unlearn"] == pytest.approx(sum(seconds[name] for name in long))
    assert json.loads((out / "unlearn.json").read_text())["seconds"] == seconds


def test_ctrl_c_twice_within_a_step_leaves_the_last_save_and_not_half_a_step(images, tmp_path, monkeypatch):
    out, check = tmp_path / "out", UnlearningRun._check
    whole = unlearn_tiny(images, check_every=1)

    def interrupted_check(run: UnlearningRun) -> dict[str, float]:
        if run.step_number == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return check(run)

    monkeypatch.setattr(UnlearningRun, "_check", interrupted_check)
    with pytest.raises(StoppedAtOnce):
        unlearn_tiny(images, check_every=1, output=out)
    assert int(load_file(out / STATE_FILE)["step"]) == 2
    monkeypatch.setattr(UnlearningRun, "_check", check)
    resumed = unlearn_tiny(images, check_every=1, output=out, resume=True)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.history == whole.history


def test_a_run_whose_last_save_is_old_resumes_to_the_same_bits(images, tmp_path):
    """As after kill -9: the state is the periodic one, some steps back."""
    whole = unlearn_tiny(images, steps=8)
    out, states = tmp_path / "out", {}

    def copy_state(record) -> None:
        states[int(record["step"])] = (out / STATE_FILE).read_bytes()
        if record["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unlearn_tiny(images, steps=8, output=out, observers=Observers(on_step=copy_state), save_every=3)
    assert states[3] == states[5] != states[6]  # written every third step only
    (out / STATE_FILE).write_bytes(states[5])
    resumed = unlearn_tiny(images, steps=8, output=out, resume=True, save_every=3)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.history == whole.history


def test_an_interrupted_run_leaves_the_weights_reached_and_a_free_module(images, tmp_path):
    module = build_tiny()
    before = weights(module)
    with pytest.raises(KeyboardInterrupt):
        unlearn_tiny(images, module, output=tmp_path / "out", observers=Observers(on_step=Interrupting(2)))
    assert not torch.equal(weights(module), before)
    assert len({p.untyped_storage().data_ptr() for p in module.parameters()}) == 6
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"gamma": 0.4},
        {"timestep_window": (5, 40)},
        {"optimizer": "natural"},
        {"posterior": random_posterior(build_tiny(), seed=6)},
        {"images": torch.zeros(12, 1, 8, 8)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_resuming_as_another_run_is_refused_and_keeps_the_state(images, tmp_path, change):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        unlearn_tiny(images, output=out, observers=Observers(on_step=Interrupting(2)))
    state = (out / STATE_FILE).read_bytes()
    change = dict(change)
    with pytest.raises(InputError, match=r"is of a run with another model, posterior, forget data or settings"):
        unlearn_tiny(change.pop("images", images), output=out, resume=True, **change)
    assert (out / STATE_FILE).read_bytes() == state
    unlearn_tiny(images, output=out, resume=True)


def test_resuming_with_another_model_is_refused(images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        unlearn_tiny(images, output=out, observers=Observers(on_step=Interrupting(2)), replay_weight=0.0)
    other = build_tiny()
    nn.init.zeros_(other.time.bias)
    with pytest.raises(InputError, match="is of a run with another model"):
        unlearn_tiny(images, other, output=out, resume=True, replay_weight=0.0)


def test_resume_needs_an_output_folder_with_a_run_in_it(images, tmp_path):
    with pytest.raises(InputError, match="resume needs the output folder"):
        unlearn_tiny(images, resume=True)
    with pytest.raises(InputError, match="nothing to resume"):
        unlearn_tiny(images, output=tmp_path / "out", resume=True)


def test_a_full_output_folder_is_refused_before_any_work(images, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    module, drawn = build_tiny(), []
    before = weights(module)
    with pytest.raises(InputError, match="exists and is not empty"):
        unlearn_tiny(images, module, output=tmp_path, observers=Observers(on_sample=drawn.append))
    assert not drawn
    assert torch.equal(weights(module), before)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    unlearn_tiny(images, module, output=tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


class Overflowing(TinyDenoiser):
    """Gives NaN where its output bias has moved far: what an unbounded ascent ends in."""

    begin: Tensor | None = None

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        far = self.begin is not None and float((self.decode.bias.detach() - self.begin).abs().max()) > 0.05
        return super().forward(x_t, timesteps) * (math.nan if far else 1.0)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights(images, tmp_path):
    module = Overflowing(timesteps=50)
    module.load_state_dict(build_tiny().state_dict())
    module.begin = module.decode.bias.detach().clone()
    with pytest.raises(InputError, match=r"nan.*the last that were measured and finite, are kept.*Lower learning_rate"):
        unlearn_tiny(
            images,
            module,
            output=tmp_path / "out",
            optimizer="natural_sign",
            learning_rate=1.0,
            steps=50,
            replay_weight=0.0,
            saturation="none",
        )
    with torch.no_grad():
        assert module(images, torch.zeros(12)).isfinite().all()
    assert float((module.decode.bias.detach() - module.begin).abs().max()) > 0.005  # the last good ones, not the first
    assert len({p.untyped_storage().data_ptr() for p in module.parameters()}) == 6
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / STATE_FILE).is_file()
    kept = load_file(tmp_path / "out" / "last-good" / "model.safetensors")
    assert torch.equal(kept["decode.bias"], module.decode.bias)
    unlearn_tiny(images, output=tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "last-good").exists()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda images: images[0], r"must be a float tensor \[N, C, H, W\] with N >= 1, got \[1, 8, 8\]"),
        (lambda images: images[:0], r"with N >= 1, got \[0, 1, 8, 8\]"),
        (lambda images: "digits", "got str"),
        (lambda images: images * 255, r"must lie in \[-1, 1\]; scale 8-bit images by x / 127\.5 - 1"),
        (lambda images: images * math.nan, r"must lie in \[-1, 1\]"),
    ],
)
def test_unusable_forget_images_are_refused(images, spoil, says):
    with pytest.raises(InputError, match=says):
        unlearn_tiny(spoil(images))


def test_images_of_another_size_are_refused_with_resize():
    pipeline = build_pipeline()
    with pytest.raises(InputError, match="--resize"):
        unlearn(pipeline, torch.zeros(3, 1, 6, 6), posterior=random_posterior(pipeline.unet), config=small())
    with pytest.raises(InputError, match="channel"):
        unlearn(pipeline, torch.zeros(3, 3, 8, 8), posterior=random_posterior(pipeline.unet), config=small())


def test_a_bare_module_needs_its_scheduler(images):
    with pytest.raises(InputError, match="a bare module needs scheduler"):
        unlearn_tiny(images, scheduler=None)


def test_a_posterior_of_another_model_is_refused(images):
    pipeline = build_pipeline()
    with pytest.raises(InputError, match="absent from it"):
        unlearn_tiny(images, posterior=random_posterior(pipeline.unet))
    wrong = random_posterior(build_tiny())
    wrong.std["time.bias"] = torch.ones(3)
    with pytest.raises(InputError, match=r"std of time\.bias has shape \(3,\)"):
        unlearn_tiny(images, posterior=wrong)


def test_a_classifier_filter_needs_classifier_and_label(images):
    with pytest.raises(InputError, match=r"needs classifier=.*forget_label="):
        unlearn_tiny(images, bank_filter="classifier")


@pytest.mark.parametrize(
    ("settings", "count", "says"),
    [
        ({"bank_filter": "positive_unlabelled", "feature_module": "encode"}, 7, "at least 8 forget images, got 7"),
        ({"bank_filter": "positive_unlabelled"}, 12, "no such submodule"),
        ({"bank_filter": "classifier"}, 12, "needs classifier="),
        ({"replay_batch_size": 64}, 12, "fewer than replay_batch_size 64"),
        ({"replay_sampler_steps": 51}, 12, "51 is more than the model's 50 timesteps; pass --replay_sampler_steps 50"),
    ],
)
def test_what_the_bank_cannot_serve_is_refused_before_it_is_drawn(images, tmp_path, settings, count, says):
    drawn, out = [], tmp_path / "out"
    with pytest.raises(InputError, match=says):
        unlearn_tiny(images[:count], output=out, observers=Observers(on_sample=drawn.append), **settings)
    assert drawn == []
    assert not out.exists()


def test_a_bank_too_large_for_the_memory_is_refused_before_it_is_drawn(images, tmp_path, monkeypatch):
    drawn, bank = [], tmp_path / "bank.safetensors"
    unlearn_tiny(images, bank=bank)
    monkeypatch.setattr(replay, "available_memory", lambda: 1)
    with pytest.raises(InputError, match="Lower --replay_samples"):
        unlearn_tiny(images, observers=Observers(on_sample=drawn.append))
    assert drawn == []
    unlearn_tiny(images, bank=bank)  # there already
    unlearn_tiny(images, replay_weight=0.0)  # needs none


@pytest.mark.parametrize("bank_filter", ["positive_unlabelled", "classifier"])
def test_no_more_images_than_allowed_pass_through_a_network_at_once(images, bank_filter):
    module, judge, seen = build_tiny(), nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), []
    for network in (module, judge):
        network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    settings = {"bank_filter": bank_filter, "feature_module": "encode", "inference_batch_size": 4}
    step = {"batch_size": 2, "replay_batch_size": 2}
    unlearn_tiny(images, module, classifier=judge, forget_label=0, check_size=9, **settings, **step)
    assert max(seen) == 4


def test_a_model_with_nan_is_refused(images):
    module = build_tiny()
    posterior = random_posterior(module)
    nn.init.constant_(module.time.bias, math.nan)
    with pytest.raises(InputError, match=r"the model's time\.bias holds NaN"):
        unlearn_tiny(images, module, posterior=posterior)


def test_too_small_a_bank_is_refused(images):
    with pytest.raises(InputError, match=r"fewer than replay_batch_size 64"):
        unlearn_tiny(images, replay_batch_size=64)


def test_a_run_is_a_function_of_its_seed(images):
    one, two, other = (weights(unlearn_tiny(images, seed=seed).model) for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_the_result_can_be_saved_by_diffusers(images, tmp_path):
    pipeline = build_pipeline()
    unlearn(pipeline, images, posterior=random_posterior(pipeline.unet), config=small()).model.save_pretrained(tmp_path)
    assert torch.equal(weights(load_pipeline(Path(tmp_path))), weights(pipeline))
    assert denoiser_of(pipeline).sample_shape == (1, 8, 8)


def test_a_bank_file_serves_later_requests_which_record_what_it_was_made_with(images, tmp_path):
    path, messages = tmp_path / "bank.safetensors", []
    unlearn_tiny(images, bank=path)
    for change in ({"seed": 1}, {"replay_samples": 13}, {"replay_states": 2}, {"replay_sampler_steps": 5}):
        result = unlearn_tiny(images, bank=path, observers=Observers(on_message=messages.append), **change)
        assert result.record()["bank"] == ReplayBank.load(path).made_from | {"images": 12}
        assert any(str(path) in message for message in messages)


class TestABankThatIsPassedOn:
    # A schedule of 50 timesteps leaves too little noise to lead elsewhere.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "bank_filter": "classifier",
        "classifier": Bright(20.0),
        "forget_label": 0,
        "max_dropped": 0.9,
        "replay_samples": 100,
        "scheduler": DDPMScheduler(num_train_timesteps=1000),
        "pass_on_bank": True,
    }

    def test_it_serves_the_model_that_was_made_and_holds_what_is_left(self, images, tmp_path):
        first, out, module, drawn, said = tmp_path / "1.safetensors", tmp_path / "out", build_tiny(), [], []
        how = self.SETTINGS | {"observers": Observers(on_sample=drawn.append, on_message=said.append)}
        result = unlearn_tiny(images, module, bank=first, output=out, **how)
        original, left = ReplayBank.load(first), ReplayBank.load(out / PASSED_ON)
        was, now = fingerprint(build_tiny()), fingerprint(module)
        assert left.made_from == original.made_from | {"model": now, "drawn_by": was}
        rows = (left.images[:, None] == original.images).flatten(2).all(dim=2).nonzero()[:, 1]
        assert len(left) == len(rows) == 100 - result.filter_report.dropped < 100
        assert torch.equal(left.x_t, original.x_t[rows])
        moved = (left.predictions != original.predictions[rows]).flatten(2).any(dim=2).sum()
        assert 0 < moved < left.timesteps.numel()
        assert f"for the next request: {len(left)} images, {moved} of their states led elsewhere" in said
        again = unlearn_tiny(images, module, bank=out / PASSED_ON, output=tmp_path / "both", **how)
        assert sum(drawn) == 100  # by the first model, and by no other
        assert again.record()["bank"] == left.made_from | {"images": len(left)}
        last = ReplayBank.load(tmp_path / "both" / PASSED_ON)
        assert last.made_from == left.made_from | {"model": fingerprint(module)}
        assert len(last) == len(left) - again.filter_report.dropped
        with pytest.raises(InputError, match="serves only the model that this request has made"):
            unlearn_tiny(images, bank=left, **self.SETTINGS | {"pass_on_bank": False})

    def test_it_serves_a_pipeline_that_comes_back_in_another_precision(self, images, tmp_path):
        pipeline, out = build_pipeline(), tmp_path / "out"
        pipeline.unet.to(torch.bfloat16)
        how = {**self.SETTINGS, "scheduler": None, "replay_sampler_steps": 3}
        unlearn_tiny(images, pipeline, posterior=random_posterior(pipeline.unet), output=out, **how)
        back = load_pipeline(out)
        assert back.unet.dtype == torch.float32
        ReplayBank.load(out / PASSED_ON).check_fits(denoiser_of(back))

    def test_a_request_is_the_same_whether_it_passes_its_bank_on_or_not(self, images, tmp_path):
        alone = unlearn_tiny(images, **self.SETTINGS | {"pass_on_bank": False})
        passing = unlearn_tiny(images, output=tmp_path / "out", **self.SETTINGS)
        assert torch.equal(weights(alone.model), weights(passing.model))

    def test_an_interrupted_request_passes_it_on_when_it_is_resumed(self, images, tmp_path):
        whole, out = tmp_path / "whole", tmp_path / "out"
        unlearn_tiny(images, output=whole, **self.SETTINGS)
        with pytest.raises(KeyboardInterrupt):
            unlearn_tiny(images, output=out, observers=Observers(on_step=Interrupting(2)), **self.SETTINGS)
        assert not (out / PASSED_ON).exists()
        unlearn_tiny(images, output=out, resume=True, **self.SETTINGS)
        resumed, expected = (ReplayBank.load(folder / PASSED_ON) for folder in (out, whole))
        assert resumed.made_from == expected.made_from
        assert torch.equal(resumed.predictions, expected.predictions)
        assert not (out / "resume").exists()

    def test_one_of_an_earlier_run_does_not_stay_beside_a_new_model(self, images, tmp_path):
        unlearn_tiny(images, output=tmp_path, **self.SETTINGS)
        unlearn_tiny(images, output=tmp_path, overwrite=True, **self.SETTINGS | {"pass_on_bank": False})
        assert not (tmp_path / PASSED_ON).parent.exists()

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"scheduler": SCHEDULER}, "images of the bank that is passed on lie too far apart"),
            ({"max_dropped": 0.02}, "images of the bank that is passed on may hold some of it"),
        ],
    )
    def test_it_is_said_where_the_next_request_may_bring_it_back(self, images, tmp_path, caplog, settings, says):
        unlearn_tiny(images, output=tmp_path, **self.SETTINGS)
        assert caplog.text == ""
        unlearn_tiny(images, output=tmp_path, overwrite=True, **self.SETTINGS | settings)
        assert says in caplog.text

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"output": None}, "needs an output folder"),
            ({"replay_weight": 0.0}, "without replay.*no bank to pass on"),
            ({"bank_filter": "none"}, "still holds what this request forgets"),
        ],
    )
    def test_what_cannot_be_passed_on_is_refused_before_a_bank_is_drawn(self, images, tmp_path, settings, says):
        drawn, out = [], tmp_path / "out"
        observers = Observers(on_sample=drawn.append)
        with pytest.raises(InputError, match=says):
            unlearn_tiny(images, **{"output": out, "observers": observers} | self.SETTINGS | settings)
        assert drawn == []
        assert not out.exists()

    def test_weights_from_before_it_are_refused(self, images, tmp_path):
        module = build_tiny()
        unlearn_tiny(images, module, output=tmp_path / "out", **self.SETTINGS)
        bank = tmp_path / "out" / PASSED_ON
        with pytest.raises(InputError, match="center 'posterior' starts from the weights before it"):
            unlearn_tiny(images, module, bank=bank, center="posterior", **self.SETTINGS | {"pass_on_bank": False})


def test_overwriting_draws_a_bank_of_its_own(images, tmp_path):
    out, drawn = tmp_path / "out", []
    with pytest.raises(KeyboardInterrupt):
        unlearn_tiny(images, output=out, observers=Observers(on_step=Interrupting(2)))
    other = build_tiny()
    nn.init.zeros_(other.time.bias)
    unlearn_tiny(images, other, output=out, overwrite=True, observers=Observers(on_sample=drawn.append))
    assert sum(drawn) == 12
