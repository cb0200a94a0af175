"""The posterior's statistics against float64, its files, and the words of every refusal."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from safetensors.torch import save_file
from tiny import build_tiny
from torch import nn

from vdu_fast.errors import InputError
from vdu_fast.posterior import GaussianPosterior, PosteriorRecorder, RunningMoments, check_enough

SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "scale": ()}


def trajectory(count: int, seed: int = 0, spread: float = 1e-3) -> list[dict[str, torch.Tensor]]:
    """State dicts that differ by `spread` around weights of order one."""
    generator = torch.Generator().manual_seed(seed)
    start = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return [{n: t + spread * torch.randn(t.shape, generator=generator) for n, t in start.items()} for _ in range(count)]


def stacked(states: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    return torch.stack([state[name].double() for state in states])


@pytest.mark.parametrize("count", [2, 3, 10, 40])
def test_streaming_mean_and_variance_are_those_of_float64(count):
    states = trajectory(count)
    posterior = GaussianPosterior.from_checkpoints(states, shrink=0.0)
    for name in SHAPES:
        values = stacked(states, name)
        torch.testing.assert_close(posterior.mean[name].double(), values.mean(0), rtol=1e-6, atol=1e-7)
        # float32 weights of order one carry 6e-8 of rounding, a 1e-4 part of their deviations.
        torch.testing.assert_close(posterior.std[name].double(), values.var(0).sqrt(), rtol=2e-3, atol=0)


def test_streaming_survives_a_large_common_offset():
    # sum of squares minus square of the sum would lose all digits here.
    states = [{"w": torch.tensor([1000.0]) + d} for d in (0.0, 1.0, 2.0)]
    assert float(GaussianPosterior.from_checkpoints(states, shrink=0.0).std["w"]) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("shrink", [0.0, 0.3, 1.0, None])
def test_variances_shrink_to_the_mean_of_their_tensor(shrink):
    states = trajectory(5)
    posterior = GaussianPosterior.from_checkpoints(states, shrink=shrink)
    share = 1 / 5 if shrink is None else shrink
    for name in SHAPES:
        variance = stacked(states, name).var(0)
        expected = ((1 - share) * variance + share * variance.mean()).sqrt()
        torch.testing.assert_close(posterior.std[name].double(), expected, rtol=2e-3, atol=0)


def test_the_floor_bounds_the_standard_deviation():
    states = trajectory(3, spread=1e-4)
    posterior = GaussianPosterior.from_checkpoints(states, shrink=0.0, floor=1e-4)
    free = GaussianPosterior.from_checkpoints(states, shrink=0.0, floor=1e-9)
    for name in SHAPES:
        assert torch.equal(posterior.std[name], free.std[name].clamp(min=1e-4))
    assert any((free.std[name] < 1e-4).any() for name in SHAPES)


def test_a_weight_that_stood_still_in_a_moving_tensor_gets_a_positive_std():
    states = [{"w": torch.tensor([1.0, 2.0 + d])} for d in (0.0, 0.1, 0.2)]
    assert (GaussianPosterior.from_checkpoints(states).std["w"] > 0).all()
    assert float(GaussianPosterior.from_checkpoints(states, shrink=0.0, floor=1e-5).std["w"][0]) == pytest.approx(1e-5)


def test_the_source_says_how_it_was_estimated():
    source = GaussianPosterior.from_checkpoints(trajectory(4), shrink=0.25, floor=1e-5).source
    assert source == {"kind": "checkpoints", "count": "4", "shrink": "0.25", "floor": "1e-05"}


def test_checkpoints_may_be_files_folders_or_state_dicts_in_turn(tmp_path):
    states = trajectory(3)
    save_file(states[0], tmp_path / "one.safetensors")
    (tmp_path / "two" / "unet").mkdir(parents=True)
    save_file(states[1], tmp_path / "two" / "unet" / "diffusion_pytorch_model.safetensors")
    mixed = GaussianPosterior.from_checkpoints([tmp_path / "one.safetensors", str(tmp_path / "two"), states[2]])
    expected = GaussianPosterior.from_checkpoints(states)
    for name in SHAPES:
        assert torch.equal(mixed.std[name], expected.std[name])
        assert torch.equal(mixed.mean[name], expected.mean[name])


def test_integer_counters_in_a_state_dict_are_ignored():
    states = [state | {"num_batches_tracked": torch.tensor(i)} for i, state in enumerate(trajectory(3))]
    assert set(GaussianPosterior.from_checkpoints(states).std) == set(SHAPES)


def test_short_floats_are_accumulated_in_float32():
    states = trajectory(4, spread=0.1)
    halves = [{n: t.bfloat16() for n, t in state.items()} for state in states]
    posterior = GaussianPosterior.from_checkpoints(halves, shrink=0.0)
    expected = stacked(halves, "a.weight").var(0).sqrt()
    torch.testing.assert_close(posterior.std["a.weight"].double(), expected, rtol=1e-4, atol=1e-6)


def test_a_single_checkpoint_is_refused_and_fisher_is_named(tmp_path):
    with pytest.raises(InputError, match=r"at least two checkpoints, got 1.*--fisher --model"):
        GaussianPosterior.from_checkpoints(trajectory(1))
    with pytest.raises(InputError, match=r"at least two checkpoints, got 0"):
        GaussianPosterior.from_checkpoints([])
    with pytest.raises(InputError, match=r"--checkpoints got 1 file\(s\).*--fisher --model"):
        check_enough([tmp_path / "one.safetensors"])
    check_enough([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 2])
def test_nan_in_a_checkpoint_is_refused_with_its_name(tmp_path, bad, position):
    states = trajectory(3)
    states[position]["a.bias"][1] = bad
    paths = [tmp_path / f"step-{i}.safetensors" for i in range(3)]
    for path, state in zip(paths, states, strict=True):
        save_file(state, path)
    with pytest.raises(InputError, match=rf"step-{position}\.safetensors: a\.bias holds NaN or infinity"):
        GaussianPosterior.from_checkpoints(paths)


def test_checkpoints_of_another_model_are_refused_with_the_tensor():
    first, second = trajectory(2)
    missing = {n: t for n, t in second.items() if n != "scale"}
    with pytest.raises(InputError, match=r"checkpoint 1 has other parameters.*1 differ, first: scale"):
        GaussianPosterior.from_checkpoints([first, missing])
    with pytest.raises(InputError, match=r"checkpoint 1 has other parameters.*first: extra"):
        GaussianPosterior.from_checkpoints([first, second | {"extra": torch.ones(1)}])
    with pytest.raises(InputError, match=r"checkpoint 1: a\.bias has shape \(5,\), the first checkpoint's has \(4,\)"):
        GaussianPosterior.from_checkpoints([first, second | {"a.bias": torch.ones(5)}])


def test_equal_checkpoints_are_refused():
    state = trajectory(1)[0]
    with pytest.raises(InputError, match="are all equal, so they hold no variance: give different training steps"):
        GaussianPosterior.from_checkpoints([state, state, state])


def test_a_tensor_that_never_changes_is_left_out_with_a_warning_that_names_it(caplog):
    states = [state | {"scale": torch.tensor(1.0), "zeros": torch.zeros(2)} for state in trajectory(3)]
    with caplog.at_level(logging.WARNING, logger="vdu_fast"):
        posterior = GaussianPosterior.from_checkpoints(states)
    assert "2 of 4 tensors never change between the checkpoints (first: scale)" in caplog.text
    assert set(posterior.std) == set(posterior.mean) == {"a.weight", "a.bias"}
    moved = {name: torch.zeros(shape) for name, shape in SHAPES.items() if name != "scale"}
    posterior.check_fits(moved)
    says = r"1 of the model's 3 trainable parameters .*first: scale.*never changed .*--trainable.*another model"
    with pytest.raises(InputError, match=says):
        posterior.check_fits(moved | {"scale": torch.tensor(1.0)})


def test_where_no_parameter_is_known_only_another_model_is_suspected():
    posterior = GaussianPosterior.from_checkpoints(trajectory(3))
    with pytest.raises(InputError, match="2 of the model's 2 trainable") as error:
        posterior.check_fits({"other": torch.zeros(1), "another": torch.zeros(1)})
    assert "never changed" not in str(error.value)


@pytest.mark.parametrize("name", ["step.pt", "step.ckpt", "step.bin", "step.PTH", "step.pkl"])
def test_a_pickled_checkpoint_is_refused_without_loading_it(tmp_path, name):
    torch.save(trajectory(1)[0], tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} looks like a pickle.*safetensors\.torch\.save_file"):
        GaussianPosterior.from_checkpoints([tmp_path / name, tmp_path / name])


@pytest.mark.parametrize("shrink", [-0.1, 1.1, math.nan])
def test_a_shrink_outside_0_to_1_is_refused(shrink):
    with pytest.raises(InputError, match=r"shrink must be in \[0, 1\]"):
        GaussianPosterior.from_checkpoints(trajectory(2), shrink=shrink)


@pytest.mark.parametrize("floor", [0.0, -1.0, math.inf, math.nan])
def test_a_floor_that_is_not_positive_is_refused(floor):
    with pytest.raises(InputError, match="floor must be a positive number"):
        GaussianPosterior.from_checkpoints(trajectory(2), floor=floor)


def test_independent_runs_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="vdu_fast"):
        GaussianPosterior.from_checkpoints(trajectory(1, seed=1) + trajectory(1, seed=2))
    assert "they look like independent runs" in caplog.text


def test_one_trajectory_is_not_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="vdu_fast"):
        GaussianPosterior.from_checkpoints(trajectory(10, spread=0.1))
    assert not caplog.records


def test_save_and_load_give_the_same_posterior(tmp_path):
    posterior = GaussianPosterior.from_checkpoints(trajectory(3))
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = GaussianPosterior.load(tmp_path / "posterior.safetensors")
    assert loaded.source == posterior.source
    for name in SHAPES:
        assert torch.equal(loaded.std[name], posterior.std[name])
        assert torch.equal(loaded.mean[name], posterior.mean[name])


def test_a_posterior_without_mean_stays_without_mean(tmp_path):
    GaussianPosterior({"w": torch.ones(2)}).save(tmp_path / "p.safetensors", std_dtype=torch.bfloat16)
    loaded = GaussianPosterior.load(tmp_path / "p.safetensors")
    assert loaded.mean is None
    assert loaded.std["w"].dtype == torch.float32


def test_a_file_that_is_no_posterior_is_refused_with_how_to_make_one(tmp_path):
    save_file(trajectory(1)[0], tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"is not a posterior file.*vdu-fast posterior --checkpoints.*--fisher"):
        GaussianPosterior.load(tmp_path / "model.safetensors")


def fitting() -> tuple[GaussianPosterior, dict[str, nn.Parameter]]:
    module = build_tiny()
    return GaussianPosterior.constant(module, 0.1), dict(module.named_parameters())


def test_a_posterior_of_this_model_fits():
    posterior, parameters = fitting()
    posterior.check_fits(parameters)
    posterior.mean = {name: p.detach() for name, p in parameters.items()}
    posterior.check_fits(parameters)
    del parameters["time.bias"]  # it may know more than is asked for
    posterior.check_fits(parameters)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda p: p.std.pop("time.bias"),
            r"1 of the model's 6 trainable parameters are absent from it \(first: time\.bias\)",
        ),
        (
            lambda p: p.std.update({"time.bias": torch.ones(3)}),
            r"std of time\.bias has shape \(3,\), the model's has \(16,\)",
        ),
        (lambda p: p.std["time.bias"].fill_(math.nan), r"std of time\.bias holds NaN"),
        (
            lambda p: p.std["time.bias"][:1].fill_(0),
            r"std of time\.bias has zeros; estimate it again with a positive floor",
        ),
        (lambda p: setattr(p, "mean", {}), r"mean of encode\.weight has shape nothing"),
        (
            lambda p: setattr(p, "mean", {n: torch.full_like(t, math.inf) for n, t in p.std.items()}),
            r"mean of encode\.weight holds NaN or infinity",
        ),
    ],
    ids=["key", "shape", "nan", "zero", "no mean", "inf mean"],
)
def test_a_posterior_that_does_not_fit_is_refused_by_tensor(spoil, says):
    posterior, parameters = fitting()
    spoil(posterior)
    with pytest.raises(InputError, match=says):
        posterior.check_fits(parameters)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_a_constant_std_must_be_positive(std):
    with pytest.raises(InputError, match="std must be a positive number"):
        GaussianPosterior.constant(build_tiny(), std)


def test_the_recorder_gives_what_its_checkpoints_give():
    module = build_tiny()
    recorder = PosteriorRecorder(module, every=3, start=4)
    kept, recorded_at = [], []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for call in range(1, 20):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, math.sin(call + parameter.numel()))
        optimizer.step()
        if recorder.step():
            recorded_at.append(call)
            kept.append({n: p.detach().clone() for n, p in module.named_parameters()})
    assert recorded_at == [7, 10, 13, 16, 19]
    expected, got = GaussianPosterior.from_checkpoints(kept), recorder.posterior()
    for name in expected.std:
        assert torch.equal(got.std[name], expected.std[name])
        assert torch.equal(got.mean[name], expected.mean[name])


def recorded(module: nn.Module, times: int) -> PosteriorRecorder:
    recorder = PosteriorRecorder(module, every=1)
    advance(recorder, times)
    return recorder


def advance(recorder: PosteriorRecorder, times: int) -> None:
    for _ in range(times):
        with torch.no_grad():
            for parameter in recorder.module.parameters():
                parameter.mul_(1.01)
        recorder.step()


def test_a_posterior_given_out_does_not_move_with_further_records():
    recorder = recorded(build_tiny(), 3)
    posterior = recorder.posterior()
    before = {name: t.clone() for name, t in posterior.mean.items()}
    advance(recorder, 2)
    assert all(torch.equal(posterior.mean[name], before[name]) for name in before)


def test_the_recorder_can_take_its_mean_from_another_network():
    module, annealed = build_tiny(), build_tiny()
    posterior = recorded(module, 3).posterior(mean=annealed)
    for name, parameter in annealed.named_parameters():
        assert torch.equal(posterior.mean[name], parameter)
    with torch.no_grad():
        annealed.time.bias.add_(1)
    assert not torch.equal(posterior.mean["time.bias"], annealed.time.bias)


def test_a_restored_recorder_goes_on_exactly():
    whole = recorded(build_tiny(), 6).posterior()
    first = recorded(build_tiny(), 3)
    state = {name: t.clone() for name, t in first.state_dict().items()}
    second = PosteriorRecorder(first.module, every=1)
    second.load_state_dict(state)
    assert second.moments._apart == first.moments._apart > 0
    advance(second, 3)
    assert second.calls == 6
    for name in whole.std:
        assert torch.equal(second.posterior().std[name], whole.std[name])
        assert torch.equal(second.posterior().mean[name], whole.mean[name])


def test_a_restored_recorder_lies_where_its_module_does():
    recorder = PosteriorRecorder(build_tiny(), every=1)
    recorder.step()
    elsewhere = PosteriorRecorder(build_tiny().to("meta"), every=1)
    elsewhere.load_state_dict(recorder.state_dict())
    assert {t.device.type for t in [*elsewhere.moments.mean.values(), *elsewhere.moments.squares.values()]} == {"meta"}


def test_frozen_parameters_are_not_recorded():
    module = build_tiny()
    module.time.weight.requires_grad_(False)
    recorder = PosteriorRecorder(module, every=1)
    for _ in range(2):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1e-3 * parameter.requires_grad * torch.randn_like(parameter))
        recorder.step()
    assert set(recorder.posterior().std) == {n for n, p in module.named_parameters() if p.requires_grad}


def test_a_recorder_must_record():
    with pytest.raises(InputError, match="every must be at least 1, got 0"):
        PosteriorRecorder(build_tiny(), every=0)


def test_moments_do_not_alias_the_network():
    module, moments = build_tiny(), RunningMoments()
    moments.update(dict(module.named_parameters()))
    before = moments.mean["time.bias"].clone()
    with torch.no_grad():
        module.time.bias.add_(1)
    assert torch.equal(moments.mean["time.bias"], before)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda module: torch.compile(module, backend="eager")])
def test_a_wrapped_model_is_recorded_under_the_names_of_what_it_wraps(wrap):
    module = build_tiny()
    recorder = PosteriorRecorder(wrap(module), every=1)
    for _ in range(2):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.rand_like(parameter))
        recorder.step()
    posterior = recorder.posterior(mean=wrap(module))
    posterior.check_fits(dict(module.named_parameters()))
    GaussianPosterior.constant(wrap(module), 0.1).check_fits(dict(module.named_parameters()))


@pytest.mark.parametrize("prefix", ["module", "_orig_mod"])
def test_checkpoints_of_a_wrapped_model_are_told_as_such(prefix):
    states = [{f"{prefix}.{name}": t for name, t in state.items()} for state in trajectory(3)]
    posterior = GaussianPosterior.from_checkpoints(states)
    with pytest.raises(InputError, match=rf"begin with '{prefix}\.', .* the state_dict of model\.{prefix}, or strip"):
        posterior.check_fits({name: torch.zeros(shape) for name, shape in SHAPES.items()})
