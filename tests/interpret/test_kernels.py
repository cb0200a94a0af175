"""Every op in Triton against the reference: in float32 and float16 the same bits, in bfloat16 the interpreter's."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest
import torch
from operands import BF16, CALLS, CONSTANTS, F16, F32, F64, OFFSETS, Operands, assert_same_bits, bits
from torch import Tensor

from vdu_fast import _native, kernels, ops, reference, rng
from vdu_fast.errors import InputError
from vdu_fast.kernels import launch, tune, tuned

SIZES = (0, 1, 3, 63, 1000)
# Sizes and offsets that take more than one program, whole ones and a last one; 2,064 is a multiple of 16.
LARGER = [(3001, 0), (2064, 0), (3001, 2**34 + 3)]


def module(name: str) -> ModuleType:
    """A module of the package; as attributes, those named like an op are the op."""
    return import_module(f"vdu_fast.kernels.{name}")


def under(backend: str, name: str, make: Operands, offset: int = 0) -> dict[str, Tensor]:
    with _native.use_backend(backend):
        return CALLS[name](make, offset)


def test_the_kernels_run_here_and_are_what_is_called(monkeypatch):
    assert kernels.INTERPRETED
    with _native.use_backend("triton"):
        assert set(_native.backends()["gaussian_kl"].values()) == {"triton"}
        monkeypatch.setattr(launch, "launch", lambda *a, **k: pytest.fail("called"))
        with pytest.raises(pytest.fail.Exception):
            ops.sample_weights(torch.zeros(3), torch.zeros(3), 0)
    assert _native.backend_of("cpu") != "triton"
    ops.sample_weights(torch.zeros(3), torch.zeros(3), 0)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("name", CALLS)
def test_every_element_has_the_bits_of_the_reference(name, dtype):
    for size in SIZES:
        for offset in (0, 1, 2, 3, 2**34 + 3) if size == 63 else (3,):
            got = under("triton", name, Operands(size, dtype), offset)
            assert_same_bits(got, under("reference", name, Operands(size, dtype), offset), sums=False)


@pytest.mark.parametrize("name", [name for name in CALLS if "small samples" not in name])
def test_more_than_one_program_gives_the_bits_of_the_reference(name):
    for size, offset in LARGER:
        got = under("triton", name, Operands(size), offset)
        assert_same_bits(got, under("reference", name, Operands(size), offset), sums=False)


@pytest.mark.parametrize("name", CALLS)
def test_bfloat16_is_off_by_one_rounding_at_most(name):
    # The interpreter cuts bfloat16 off where a GPU rounds to nearest.
    got, expected = (under(backend, name, Operands(1000, BF16), 5) for backend in ("triton", "reference"))
    for key, tensor in got.items():
        other = expected[key]
        if tensor.dtype == BF16 and tensor.numel():
            assert int((bits(tensor).int() - bits(other).int()).abs().max()) <= 1, key
        else:
            assert_same_bits({key: tensor}, {key: other}, sums=False)


def test_normals_have_the_bits_of_the_reference_over_many_programs():
    n = torch.empty(2**18 + 5)
    kernels.standard_normal_(n, torch.tensor(-7), torch.tensor(2**32 + 9), stream=2**32 - 1, offset=2**33)
    assert torch.equal(bits(n), bits(rng.standard_normal(len(n), -7, 9, stream=2**32 - 1, offset=2**33)))


def test_a_list_of_tensors_has_the_bits_of_the_flat_buffer():
    mean, log_std = (rng.standard_normal(2500, 0, k) for k in (1, 2))
    sizes = [7, 0, 1, 1030, 1462]
    flat, parts = torch.empty(2500), torch.empty(2500)
    seed, step = torch.tensor(1), torch.tensor(2)
    kernels.sample_weights_([flat], [mean], [log_std], seed, step, offset=6)
    kernels.sample_weights_(parts.split(sizes), mean.split(sizes), log_std.split(sizes), seed, step, offset=6)
    assert torch.equal(bits(flat), bits(parts))


STATE = ("z", "first", "second", "log_std", "std_first", "std_second")


def step(split: list[int], constants: Tensor, seeds: list[Tensor], op=kernels.variational_step_) -> list[Tensor]:
    """The step of "adam" with the std learned, over one buffer in parts: sums, weights and state."""
    make = Operands(sum(split))
    theta, grad, center, prior_std = make(), make(), make(), make.positive()
    state = {name: make.positive() if name.endswith("second") else make() for name in STATE}
    lists = [tensor.split(split) for tensor in (theta, grad, center, prior_std, *state.values())]
    sums = op(*lists, [], constants, *seeds, 3, offset=2)
    return [sums, theta, *state.values()]


def test_the_step_over_a_list_has_the_bits_of_the_flat_step():
    seeds = [torch.tensor(k) for k in (1, 2, 3)]
    flat = step([2200], CONSTANTS.tensor(), seeds)
    parts = step([7, 0, 1100, 1093], CONSTANTS.tensor(), seeds)
    expected = step([2200], CONSTANTS.tensor(), seeds, reference.variational_step_)
    torch.testing.assert_close(flat[0], parts[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(flat[0], expected[0], rtol=1e-6, atol=0)
    for a, b, c in zip(flat[1:], parts[1:], expected[1:], strict=True):
        assert torch.equal(bits(a), bits(b))
        assert torch.equal(bits(a), bits(c))


def test_one_launch_updates_and_one_adds_up(monkeypatch):
    kernels_run = []
    real = launch.launch
    monkeypatch.setattr(launch, "launch", lambda kernel, *a, **k: (kernels_run.append(kernel), real(kernel, *a, **k)))
    monkeypatch.setattr(module("sums"), "launch", launch.launch)
    step([2200], CONSTANTS.tensor(), [torch.tensor(k) for k in (1, 2, 3)])
    assert [kernel.__name__ for kernel in kernels_run] == ["variational_step_kernel", "fold_kernel"]


@pytest.fixture
def on_the_device(monkeypatch):
    """Scalars are read from memory by the kernels, as those are that lie on a GPU."""
    for name in ("standard_normal", "sample_weights", "add_noise", "noise_prediction_loss", "variational_step"):
        monkeypatch.setattr(module(name), "integer", lambda value, name, like: value)
    monkeypatch.setattr(module("variational_step"), "_constants", lambda constants, like: (None, constants))


@pytest.mark.parametrize("noise_scale", [0.0, 0.5, 1.0])
@pytest.mark.usefixtures("on_the_device")
def test_scalars_in_device_memory_give_the_same_bits(noise_scale):
    constants = CONSTANTS._replace(noise_scale=noise_scale).tensor()
    seeds = [torch.tensor(k) for k in (2**40 + 1, 2, 2**32 + 3)]
    got = step([1500], constants, seeds)
    for a, b in zip(got[1:], step([1500], constants, seeds, reference.variational_step_)[1:], strict=True):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.usefixtures("on_the_device")
@pytest.mark.parametrize("name", ["standard_normal", "sample_weights", "mix_noise", "noise_prediction_loss, v"])
def test_seeds_in_device_memory_give_the_same_bits(name):
    got = under("triton", name, Operands(63), 3)
    assert_same_bits(got, under("reference", name, Operands(63), 3), sums=False)


@pytest.mark.parametrize("size", [1, 63, 1500])
def test_gradients_through_autograd_are_those_of_the_reference(size):
    make = Operands(size)
    tensors = [make(), make(), make(), make.positive(), make(4, size), make(4, size)]
    weight, limit = torch.tensor([1.0, 2.0, 0.5, 1.0]), torch.tensor([1e9, 1e9, 0.0, 1e9])

    def objective(backend: str) -> list[Tensor]:
        mean, log_std, center, prior_std, images, prediction = (t.clone().requires_grad_() for t in tensors)
        with _native.use_backend(backend):
            theta = ops.sample_weights(mean, log_std, 1, 2, offset=3)
            whitened = ops.sample_whitened_weights(center, prior_std, theta, 1, 2, noise_scale=0.5)
            x_t = ops.add_noise(images, torch.tensor([0, 1, 1, 0]), torch.tensor([0.9, 0.3]), 1, 2)
            options = {"weight": weight, "saturation": "hinge", "limit": limit}
            loss = ops.noise_prediction_loss(prediction + x_t * whitened, 1, 2, **options)
            kl = ops.gaussian_kl(mean, log_std, center, prior_std) + ops.quadratic_penalty(mean, center, prior_std)
            (loss + 1e-3 * kl).backward()
        return [t.grad for t in (mean, log_std, center, prior_std, images, prediction)]

    for got, expected in zip(objective("triton"), objective("reference"), strict=True):
        # Sums in another order, and gradients added up in float32 by autograd.
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["sample_weights", "gaussian_kl", "variational_step_, adam", "welford_update_"])
def test_float64_goes_to_the_reference(name):
    got = under("triton", name, Operands(63, F64), 3)
    assert_same_bits(got, under("reference", name, Operands(63, F64), 3), sums=True)


def test_offsets_of_every_kind_give_the_noise_of_their_index():
    for offset in OFFSETS:
        n = torch.empty(70)
        kernels.standard_normal_(n, torch.tensor(1), torch.tensor(2), offset=offset)
        assert torch.equal(bits(n), bits(rng.standard_normal(70, 1, 2, offset=offset))), offset


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 4), (5, 2), (3, 1, 5, 7), (2, 4, 300), (1100, 3)])
def test_batches_of_any_shape(shape):
    with _native.use_backend("triton"):
        x = rng.standard_normal(shape, 3)
        got = ops.mix_noise(x, torch.linspace(0, 1, shape[0]), torch.linspace(1, 2, shape[0]), 5, 6)
    expected = reference.mix_noise(x, torch.linspace(0, 1, shape[0]), torch.linspace(1, 2, shape[0]), 5, 6)
    assert torch.equal(bits(got), bits(expected))


def test_a_step_without_elements_gives_zeros():
    got = step([0], CONSTANTS.tensor(), [torch.tensor(k) for k in (1, 2, 3)])
    assert got[0].tolist() == [0.0, 0.0]


def test_what_a_launcher_cannot_take_is_an_error_that_names_it():
    x, seed = torch.zeros(4), torch.tensor(0)
    with pytest.raises(InputError, match=r"seed must be an int64 tensor of one element, got torch\.float32"):
        kernels.sample_weights(x, x, torch.tensor(0.0), seed)
    with pytest.raises(InputError, match="signal must have 4 elements, one per sample"):
        kernels.mix_noise(x, torch.zeros(3), x, seed, seed)
    with pytest.raises(InputError, match=r"mean must have as many elements, tensor by tensor"):
        kernels.sample_weights_([x], [x[:3]], [x], seed, seed)
    with pytest.raises(InputError, match="out must be contiguous"):
        kernels.standard_normal_(torch.zeros(4, 4).t()[1:], seed, seed)
    with pytest.raises(InputError, match=r"constants must be float64 \[13\], got torch\.float32 \[13\]"):
        kernels.variational_gradient_norm([x], [x], [x], torch.zeros(13), 0)


def test_tuning_times_every_size_and_remembers_the_fastest(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ran = []

    def time(call) -> float:
        call()
        ran.append(launch.block("any", torch.zeros(1))["BLOCK"])
        return 1 / ran[-1]

    cpu = torch.device("cpu")
    found = {key: tune.best(times) for key, times in tune.tune(cpu, 70, time)}
    assert set(ran) == {block for block, _ in tune.CANDIDATES}
    assert set(found.values()) == {(4096, 8)}
    assert {"sample_weights, 16-bit", "gaussian_kl_backward, 32-bit"} <= set(found)
    assert tuned.remember(cpu, found) == tmp_path / "vdu_fast" / "triton_blocks.json"
    assert tuned.block("sample_weights", cpu, narrow=True) is None  # the interpreter has sizes of its own
    assert tuned._remembered()[tuned.device_key(cpu)]["sample_weights, 16-bit"] == [4096, 8]
    tuned.cache_file().write_text("{")
    tuned._remembered.cache_clear()
    assert tuned._remembered() == {}
    tuned._remembered.cache_clear()
