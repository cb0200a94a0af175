"""How the network is run changes its speed, and its results by rounding only."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from tiny import TinyDenoiser, build_pipeline, build_tiny

from vdu_fast.config import UnlearnConfig
from vdu_fast.errors import InputError
from vdu_fast.evaluation import EvaluationConfig
from vdu_fast.execution import Execution
from vdu_fast.pipelines import Denoiser, denoiser_of
from vdu_fast.rng import standard_normal
from vdu_fast.sampling import sample_images

SHAPE = (1, 8, 8)


@pytest.fixture
def states():
    return standard_normal((3, *SHAPE), 1), torch.tensor([3, 20, 45])


@pytest.mark.parametrize(
    ("execution", "tolerance"),
    [(Execution(channels_last=True), 1e-5), (Execution("bfloat16"), 0.05), (Execution("bfloat16", True), 0.05)],
)
def test_predictions_stay_those_of_the_plain_network(states, execution, tolerance):
    denoiser = denoiser_of(build_pipeline())
    with torch.no_grad():
        plain = denoiser.predict(*states)
        denoiser.execution = execution
        other = denoiser.predict(*states)
    assert other.dtype == plain.dtype
    torch.testing.assert_close(other, plain, rtol=tolerance, atol=tolerance * float(plain.abs().max()))


def test_bfloat16_is_autocast_and_leaves_the_weights_alone(states):
    denoiser = denoiser_of(build_pipeline())
    seen = []
    denoiser.module.conv_out.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    denoiser.execution = Execution("bfloat16")
    prediction = denoiser.predict(*states)
    prediction.square().mean().backward()
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in denoiser.module.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in denoiser.module.parameters()} == {torch.float32}


def test_channels_last_reaches_the_convolutions():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = Denoiser(torch.nn.Sequential(), DDPMScheduler(50), (3, 8, 8))
        denoiser.module = _Layout()
    denoiser.execution = Execution(channels_last=True)
    denoiser.predict(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))
    assert denoiser.module.seen == [True]


class _Layout(torch.nn.Module):
    """Notes whether its input was in the channels-last layout."""

    def __init__(self):
        super().__init__()
        self.scale, self.seen = torch.nn.Parameter(torch.ones(())), []

    def forward(self, x_t, timesteps):
        self.seen.append(x_t.is_contiguous(memory_format=torch.channels_last) and not x_t.is_contiguous())
        return self.scale * x_t


class _Counting(TinyDenoiser):
    """Keeps the sizes of the batches that it is compiled for: Dynamo runs this Python once for each."""

    sizes: tuple[int, ...] = ()

    def forward(self, x_t, timesteps):
        self.sizes = (*self.sizes, len(x_t))
        return super().forward(x_t, timesteps)


def test_a_compiled_network_sees_one_batch_size_and_draws_the_same_images(monkeypatch):
    compiled = []

    def compile_eagerly(module, **options):
        compiled.append(options)
        return module

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = _Counting()
    denoiser = Denoiser(module, DDPMScheduler(50), SHAPE)
    seen = []
    plain = sample_images(denoiser, 5, steps=2, seed=4, batch_size=2)
    assert set(module.sizes) == {1, 2}
    denoiser.execution, module.sizes = Execution(compile="max-autotune"), ()
    finished = []
    images = sample_images(
        denoiser, 5, steps=2, seed=4, batch_size=2, progress=finished.append, observer=lambda *args: seen.append(args)
    )
    assert set(module.sizes) == {2}
    assert compiled == [{"mode": "max-autotune", "dynamic": False}]
    assert finished == [2, 2, 1]
    assert [len(x_t) for _, _, x_t, _ in seen] == [2, 2, 2, 2, 1, 1]
    torch.testing.assert_close(images, plain, rtol=1e-5, atol=1e-6)


def test_a_really_compiled_network_predicts_the_same(states):
    denoiser = Denoiser(build_tiny(), DDPMScheduler(50), SHAPE)
    plain = denoiser.predict(*states)
    denoiser.execution = Execution(compile="default")
    compiled = denoiser.predict(*states, repeated=True)
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    # The weights are looked up at every call: training goes on behind a compiled network.
    with torch.no_grad():
        denoiser.module.decode.bias.add_(1)
    torch.testing.assert_close(denoiser.predict(*states, repeated=True), plain + 1, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [UnlearnConfig, EvaluationConfig])
def test_settings_say_how_the_network_is_run(settings):
    assert settings().execution == Execution()
    given = settings(precision="bfloat16", channels_last=True, compile="reduce-overhead")
    assert given.execution == Execution("bfloat16", True, "reduce-overhead")
    with pytest.raises(InputError, match="compile must be one of off, default, reduce-overhead, max-autotune"):
        settings(compile="yes")
    with pytest.raises(InputError, match="precision must be one of float32, bfloat16"):
        settings(precision="half")


class _Dropping(torch.nn.Module):
    """The network as a compiler that loses the gradient of everything before its last layer would run it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x_t, timesteps):
        time = (timesteps.to(x_t.dtype) / self.module.timesteps)[:, None]
        hidden = torch.tanh(self.module.encode(x_t.flatten(1)) + self.module.time(time))
        return self.module.decode(hidden.detach()).reshape(-1, *self.module.shape)


def test_a_compiler_that_drops_gradients_is_found_out_and_not_used(states, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda module, **_: _Dropping(module))
    denoiser = Denoiser(build_tiny(), DDPMScheduler(50), SHAPE)
    denoiser.execution = Execution("bfloat16", compile="default")
    plain = denoiser.predict(*states)
    torch.testing.assert_close(denoiser.predict(*states, repeated=True), plain, rtol=0.1, atol=0.1)
    denoiser.check_compiled(*states)
    assert denoiser.execution == Execution("bfloat16")
    assert "4 of 6 parameters a wrong gradient (encode.weight, ...)" in caplog.text
    assert all(p.grad is None for p in denoiser.module.parameters())


def test_a_compiler_that_keeps_gradients_is_used(states, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    denoiser = Denoiser(build_tiny(), DDPMScheduler(50), SHAPE)
    denoiser.execution = Execution(compile="default")
    denoiser.check_compiled(*states)
    assert denoiser.execution == Execution(compile="default")
    assert not caplog.records


def test_where_nothing_can_be_compiled_the_network_runs_uncompiled(states, monkeypatch, caplog):
    def without_a_compiler(*_):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(torch, "compile", lambda module, **_: without_a_compiler)
    denoiser = Denoiser(build_tiny(), DDPMScheduler(50), SHAPE)
    plain = denoiser.predict(*states)
    denoiser.execution = Execution(compile="default")
    assert torch.equal(denoiser.predict(*states, repeated=True), plain)
    assert denoiser.execution.compile == "off"
    assert "runs uncompiled: no C++ compiler was found" in caplog.text
