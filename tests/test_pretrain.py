"""Training ends in a pipeline and a posterior that fits it, and an interrupted run goes on to the same bits."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vdu_fast.checkpoint import StoppedAtOnce, load_tensors
from vdu_fast.data import ImageSet
from vdu_fast.errors import InputError
from vdu_fast.pipelines import denoiser_of, load_pipeline
from vdu_fast.posterior import GaussianPosterior, PosteriorRecorder
from vdu_fast.pretrain import STATE_FILE, PretrainConfig, Pretraining, build_unet, pretrain
from vdu_fast.sampling import sample_images


def small(**settings) -> PretrainConfig:
    defaults = {"steps": 8, "anneal_steps": 4, "batch_size": 4, "channels": (8,), "checkpoints": 2, "save_every": 3}
    return PretrainConfig(**(defaults | {"warmup_steps": 2} | settings))


@pytest.fixture
def data(images) -> ImageSet:
    return ImageSet(images, None, (), "random")


class Stop:
    """Raises KeyboardInterrupt out of on_step at the given step, and remembers the records."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.records = at, []

    def __call__(self, record) -> None:
        self.records.append(record)
        if record["step"] == self.at:
            raise KeyboardInterrupt


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors below a folder, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{name}": t for file in files for name, t in load_file(file).items()}


def assert_same_files(first: Path, second: Path) -> None:
    one, two = everything(first), everything(second)
    assert set(one) == set(two)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_a_run_leaves_pipeline_posterior_checkpoints_and_a_record(data, tmp_path):
    seen = Stop()
    out = pretrain(data, tmp_path / "out", small(), on_step=seen)
    pipeline = load_pipeline(out)
    parameters = dict(pipeline.unet.named_parameters())
    posterior = GaussianPosterior.load(out / "posterior.safetensors")
    posterior.check_fits(parameters)
    assert posterior.mean is None  # it is the model beside it
    checkpoints = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert checkpoints == ["step-000006.safetensors", "step-000008.safetensors"]
    assert not (out / "resume").exists()
    record = json.loads((out / "pretrain.json").read_text())
    assert record["settings"]["steps"] == 8
    assert record["data"] == {"name": "random", "images": 12}
    assert record["parameters"] == sum(p.numel() for p in parameters.values())
    assert len(record["losses"]) == 12
    assert [r["step"] for r in seen.records] == list(range(1, 13))
    assert seen.records[0]["total"] == 12
    assert sample_images(denoiser_of(pipeline), 2, steps=3).isfinite().all()


def test_the_posteriors_variance_is_that_of_the_kept_checkpoints(data, tmp_path):
    out = pretrain(data, tmp_path / "out", small(checkpoints=4))
    recorded = GaussianPosterior.load(out / "posterior.safetensors")
    again = GaussianPosterior.from_checkpoints(sorted((out / "checkpoints").iterdir()))
    assert recorded.source["count"] == "4"
    for name in recorded.std:
        assert torch.equal(recorded.std[name], again.std[name].bfloat16().float())


def test_training_lowers_the_loss(tmp_path):
    flat = ImageSet(torch.full((4, 1, 8, 8), 0.5), None, (), "flat")
    run = Pretraining(flat, small(steps=60, batch_size=16, learning_rate=3e-3))
    for _ in range(60):
        run.train_step()
    assert sum(run.losses[-10:]) < 0.7 * sum(run.losses[:10])


def test_the_learning_rate_warms_up_stays_and_anneals_to_zero(data):
    run = Pretraining(data, small(steps=10, warmup_steps=4, anneal_steps=5, learning_rate=1.0))
    rates = []
    for step in range(run.total):
        run.step = step
        rates.append(run.learning_rate())
    assert rates == pytest.approx([0.25, 0.5, 0.75] + 7 * [1.0] + [1.0, 0.8, 0.6, 0.4, 0.2])


def test_without_annealing_and_warm_up_the_rate_is_constant(data):
    run = Pretraining(data, small(anneal_steps=0, warmup_steps=0, learning_rate=0.5))
    assert run.total == 8
    assert run.learning_rate() == 0.5


def test_the_average_is_exponential_after_its_start(data):
    run = Pretraining(data, small(ema_decay=0.9))
    average = run.average[0].clone()
    for step in range(12):
        run.train_step()
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * next(run.unet.parameters()).detach()
        torch.testing.assert_close(run.average[0], average, rtol=1e-5, atol=1e-6)
    assert torch.equal(next(run.averaged_unet().parameters()), run.average[0])


@pytest.mark.parametrize("at", [1, 4, 6, 8, 11, 12])
def test_an_interrupted_run_resumes_to_the_same_bits(data, tmp_path, at):
    whole = pretrain(data, tmp_path / "whole", small())
    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        pretrain(data, part, small(), on_step=Stop(at))
    assert (part / STATE_FILE).is_file()
    assert not (part / "model_index.json").exists()
    rest = Stop()
    pretrain(data, part, small(), resume=True, on_step=rest)
    assert [record["step"] for record in rest.records] == list(range(at + 1, 13))
    assert_same_files(part, whole)
    losses = [json.loads((folder / "pretrain.json").read_text())["losses"] for folder in (part, whole)]
    assert losses[0] == losses[1]
    assert not (part / "resume").exists()


def test_ctrl_c_twice_within_a_step_leaves_the_last_save_and_not_half_a_step(data, tmp_path, monkeypatch):
    whole, part, record = tmp_path / "whole", tmp_path / "part", PosteriorRecorder.step
    pretrain(data, whole, small())

    def interrupted_record(recorder: PosteriorRecorder) -> bool:
        if recorder.calls == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return record(recorder)

    monkeypatch.setattr(PosteriorRecorder, "step", interrupted_record)
    with pytest.raises(StoppedAtOnce):
        pretrain(data, part, small())
    assert int(load_file(part / STATE_FILE)["step"]) == 6
    monkeypatch.setattr(PosteriorRecorder, "step", record)
    pretrain(data, part, small(), resume=True)
    assert_same_files(whole, part)


def test_a_run_whose_last_save_is_old_resumes_to_the_same_bits(data, tmp_path):
    """As after kill -9: the state is that of step 3, though step 7 is done and a checkpoint of step 6 is written."""
    whole = pretrain(data, tmp_path / "whole", small())
    part, state = tmp_path / "part", []

    def keep_an_old_state(record) -> None:
        if record["step"] == 4:
            state.append((part / STATE_FILE).read_bytes())
        if record["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(data, part, small(), on_step=keep_an_old_state)
    (part / STATE_FILE).write_bytes(state[0])
    assert int(load_tensors(part / STATE_FILE)[0]["step"]) == 3
    pretrain(data, part, small(), resume=True)
    assert_same_files(part, whole)


def test_two_runs_of_one_seed_are_equal_and_of_two_are_not(data, tmp_path):
    runs = [pretrain(data, tmp_path / str(i), small(seed=seed)) for i, seed in enumerate((1, 1, 2))]
    assert_same_files(runs[0], runs[1])
    one, other = everything(runs[0]), everything(runs[2])
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_building_a_network_does_not_touch_the_global_generator():
    before = torch.random.get_rng_state()
    build_unet(small(), 1, 8)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_type_is_trained_and_saved(data, tmp_path, prediction_type):
    out = pretrain(data, tmp_path / "out", small(prediction_type=prediction_type))
    assert load_pipeline(out).scheduler.config.prediction_type == prediction_type


def test_resuming_with_other_settings_or_data_is_refused_and_keeps_the_state(data, images, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pretrain(data, tmp_path, small(), on_step=Stop(4))
    state = (tmp_path / STATE_FILE).read_bytes()
    for other in (small(learning_rate=0.5), small(seed=1)):
        with pytest.raises(InputError, match="the interrupted run had other settings"):
            pretrain(data, tmp_path, other, resume=True)
    with pytest.raises(InputError, match="the interrupted run had other settings"):
        pretrain(ImageSet(images[:5], None, (), "random"), tmp_path, small(), resume=True)
    assert (tmp_path / STATE_FILE).read_bytes() == state


def test_overwriting_leaves_no_checkpoint_of_the_earlier_run(data, tmp_path):
    # A posterior over checkpoints of two runs would be one of nothing.
    pretrain(data, tmp_path, small(steps=12))
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        pretrain(data, tmp_path, small())
    pretrain(data, tmp_path, small(), overwrite=True)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-000006.safetensors",
        "step-000008.safetensors",
    ]
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("saved", [False, True])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_save(data, tmp_path, saved):
    def poison(record) -> None:
        if record["step"] == (4 if saved else 1):
            data.images.fill_(math.nan)

    says = (
        r"the training loss became nan at step 5\. The state of the last save is kept"
        if saved
        else r"at step 2\. Start"
    )
    with pytest.raises(InputError, match=says):
        pretrain(data, tmp_path / "out", small(), on_step=poison)
    assert (tmp_path / "out" / STATE_FILE).is_file() == saved
    if saved:
        state, _ = load_tensors(tmp_path / "out" / STATE_FILE)
        assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())


def test_images_that_do_not_fit_a_unet_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"needs square images, wide has 8 x 10; give --resize"):
        pretrain(ImageSet(torch.zeros(2, 1, 8, 10), None, (), "wide"), tmp_path / "out", small())
    with pytest.raises(
        InputError, match=r"images of 9 x 9 cannot be halved 1 times: give fewer --channels or --resize"
    ):
        pretrain(ImageSet(torch.zeros(2, 1, 9, 9), None, (), "odd"), tmp_path / "out", small(channels=(8, 8)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"anneal_steps": -1}, "anneal_steps must be 0 or more"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive number"),
        ({"learning_rate": math.nan}, "learning_rate must be a positive number"),
        ({"max_gradient_norm": -1.0}, "max_gradient_norm must be a positive number"),
        ({"checkpoints": 1}, r"checkpoints must be between 2 and steps / 2 = 4, got 1"),
        ({"checkpoints": 5}, r"checkpoints must be between 2 and steps / 2 = 4, got 5"),
        ({"prediction_type": "velocity"}, "prediction_type must be epsilon, v_prediction or sample"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ({"channels": ()}, "channels must be multiples of 8"),
        ({"channels": (12,)}, "channels must be multiples of 8"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_unusable_settings_are_refused_by_name(settings, says):
    with pytest.raises(InputError, match=says):
        small(**settings)


def test_the_device_is_the_one_named(data):
    run = Pretraining(data, small(device="meta"))
    assert {p.device.type for p in [*run.unet.parameters(), *run.average]} == {"meta"}


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(data, tmp_path):
    with pytest.raises(InputError, match="device 'abacus' cannot be used here"):
        pretrain(data, tmp_path / "out", small(device="abacus"))
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_a_gpu_is_interrupted_and_resumed_there(data, tmp_path):
    whole = pretrain(data, tmp_path / "whole", small(device="cuda"))
    with pytest.raises(KeyboardInterrupt):
        pretrain(data, tmp_path / "parts", small(device="cuda"), on_step=Stop(at=5))
    parts = pretrain(data, tmp_path / "parts", small(device="cuda"), resume=True)
    on_cpu = pretrain(data, tmp_path / "cpu", small(device="cpu"))
    one, two, three = everything(whole), everything(parts), everything(on_cpu)
    assert set(one) == set(two) == set(three)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
        if "posterior" not in name:
            torch.testing.assert_close(one[name], three[name], rtol=0.05, atol=5e-3)
    assert json.loads((whole / "pretrain.json").read_text())["device"] == "cuda"
