"""The CUDA ops give the bits of the reference element by element, and its sums up to the order of addition.

On a GPU, or with the kernels run by threads of the host: test_cuda_emulation.py builds them and runs this file again.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from vdu_fast import _native, reference
from vdu_fast.reference import RULES, StepConstants

EMULATION = os.environ.get("VDU_FAST_TEST_EMULATION")
if EMULATION:
    torch.ops.load_library(EMULATION)  # takes the place of the CPU ops in this process
else:
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        pytest.mark.skipif(_native.ABSENCES["cuda"] is not None, reason=f"no CUDA ops: {_native.ABSENCES['cuda']}"),
    ]
needs_a_device = pytest.mark.skipif(bool(EMULATION), reason="host threads have no CUDA device")

OPS = torch.ops.vdu_fast
DEVICE = "cpu" if EMULATION else "cuda"
SIZES = [0, 3, 2**13 + 7] if EMULATION else [0, 1, 3, 63, 1000, 2**20 + 7]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED, STEP = torch.tensor(7**20), torch.tensor(11)
CONSTANTS = StepConstants(
    learning_rate=0.03, std_learning_rate=0.02, momentum=0.9, beta1=0.9, one_minus_beta1=0.1, beta2=0.99,
    one_minus_beta2=0.01, eps=1e-8, bias_correction=0.7, kl_weight=0.01, gradient_scale=0.5, clip=0.8, noise_scale=0.6,
)  # fmt: skip


def forbid_waiting(forbidden: bool) -> None:
    if not EMULATION:
        torch.cuda.set_sync_debug_mode("error" if forbidden else "default")


@pytest.fixture(autouse=True)
def _no_op_waits_for_the_device():
    forbid_waiting(True)
    yield
    forbid_waiting(False)


def to_cpu(tensor: Tensor) -> Tensor:
    """The test's own copy, which may wait."""
    forbid_waiting(False)
    copy = tensor.cpu()
    forbid_waiting(True)
    return copy


def to_device(tensor: Tensor) -> Tensor:
    forbid_waiting(False)
    copy = tensor.to(DEVICE, copy=True)
    forbid_waiting(True)
    return copy


def same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.device.type == DEVICE and ours.dtype == theirs.dtype and torch.equal(to_cpu(ours), theirs)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(to_cpu(ours), theirs, rtol=1e-5, atol=1e-6)


def values(n: int, dtype: torch.dtype = torch.float32, salt: int = 0, positive: bool = False) -> Tensor:
    x = torch.randn(n, generator=torch.Generator().manual_seed(1000 + salt)) * 0.3
    return (x.exp() if positive else x).to(dtype)


def unaligned(tensor: Tensor, shift: int) -> Tensor:
    """The same elements `shift` places behind the start of an allocation."""
    buffer = torch.zeros(tensor.numel() + shift, dtype=tensor.dtype, device=tensor.device)
    view = buffer[shift:].view(tensor.shape)
    view.copy_(tensor)
    return view


def split(tensor: Tensor, sizes: list[int]) -> list[Tensor]:
    """As tensors of these sizes, and one with the rest, each an allocation of its own."""
    return [part.clone() for part in tensor.split([*sizes, tensor.numel() - sum(sizes)])]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("offset", range(6))
@pytest.mark.parametrize("n", SIZES)
def test_normals(n, offset, dtype):
    ours, theirs = torch.empty(n, dtype=dtype, device=DEVICE), torch.empty(n, dtype=dtype)
    OPS.standard_normal_(ours, SEED, STEP, stream=3, offset=offset)
    reference.standard_normal_(theirs, SEED, STEP, stream=3, offset=offset)
    assert same(ours, theirs)


def test_normals_of_a_seed_in_device_memory():
    ours, theirs = torch.empty(1000, device=DEVICE), torch.empty(1000)
    OPS.standard_normal_(ours, to_device(SEED), to_device(STEP), stream=0, offset=2**34 + 1)
    reference.standard_normal_(theirs, SEED, STEP, stream=0, offset=2**34 + 1)
    assert same(ours, theirs)


@needs_a_device
def test_noise_of_many_chunks_is_that_of_its_parts():
    n, length = 2**27 + 5, 40_000  # a block takes four chunks
    ours = torch.empty(n, dtype=torch.bfloat16, device=DEVICE)
    OPS.standard_normal_(ours, SEED, STEP, stream=3, offset=0)
    for start in (0, 3 * 4096 - 7, n - length):
        theirs = torch.empty(length, dtype=torch.bfloat16)
        reference.standard_normal_(theirs, SEED, STEP, stream=3, offset=start)
        assert same(ours[start : start + length], theirs)


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("n", SIZES)
def test_sampled_weights(n, offset, dtype, shift):
    a, b, c = (values(n, dtype, salt=k, positive=k == 1) for k in range(3))
    x, y, w = (unaligned(to_device(t), shift) for t in (a, b, c))
    assert same(
        OPS.sample_weights(x, w, SEED, STEP, offset=offset), reference.sample_weights(a, c, SEED, STEP, offset=offset)
    )
    assert same(
        OPS.sample_weights_backward(x, w, SEED, STEP, offset=offset),
        reference.sample_weights_backward(a, c, SEED, STEP, offset=offset),
    )
    for noise_scale in (0.0, 0.7):
        options = {"noise_scale": noise_scale, "offset": offset}
        assert same(
            OPS.sample_whitened_weights(x, y, w, SEED, STEP, **options),
            reference.sample_whitened_weights(a, b, c, SEED, STEP, **options),
        )


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("pieces", [[], [5, 0, 1, 250, 4096], [3] * 200])
def test_a_list_has_the_bits_of_the_flat_weights(pieces, out_dtype):
    n = 20_011
    center, prior_std, z, log_std = (values(n, salt=k, positive=k == 1) for k in range(4))
    flat = torch.empty(n, dtype=out_dtype)
    lists = [split(to_device(t), pieces) for t in (flat, center, prior_std, z, log_std)]
    for states in ([center, log_std], [center, prior_std, z, []], [center, prior_std, z, log_std]):
        picked = {id(t): part for t, part in zip((center, prior_std, z, log_std), lists[1:], strict=True)}
        ours = [picked[id(t)] if isinstance(t, Tensor) else [] for t in states]
        theirs = [[t] if isinstance(t, Tensor) else [] for t in states]
        name = "sample_weights_" if len(states) == 2 else "sample_whitened_weights_"
        getattr(OPS, name)(lists[0], *ours, SEED, STEP, offset=1)
        getattr(reference, name)([flat], *theirs, SEED, STEP, offset=1)
        assert same(torch.cat(lists[0]), flat)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    "shape",
    [
        (0, 4), (3, 0), (1, 1), (5, 3, 7), (4, 3, 32, 32), (2, 1, 81, 83), (3, 5124),
        pytest.param((70_000, 2), marks=needs_a_device),  # more samples than rows of blocks
    ],
)  # fmt: skip
def test_noising_and_its_error(shape, dtype):
    n = torch.Size(shape).numel()
    x0, prediction = values(n, dtype).reshape(shape), values(n, dtype, salt=1).reshape(shape)
    signal, noise, grad = (values(shape[0], salt=k) for k in (2, 3, 4))
    if shape[0] > 1:
        grad[1] = 0
    on_device = [to_device(t) for t in (x0, prediction, signal, noise, grad)]
    assert same(
        OPS.mix_noise(on_device[0], *on_device[2:4], SEED, STEP), reference.mix_noise(x0, signal, noise, SEED, STEP)
    )
    for with_x0, with_signal, with_noise in ((0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 1, 0), (1, 1, 1)):
        kinds = (with_x0, with_signal, with_noise)
        theirs = [t if kind else None for t, kind in zip((x0, signal, noise), kinds, strict=True)]
        ours = [t if kind else None for t, kind in zip((on_device[0], *on_device[2:4]), kinds, strict=True)]
        error = OPS.noise_prediction_error(on_device[1], *ours, SEED, STEP)
        close(error, reference.noise_prediction_error(prediction, *theirs, SEED, STEP))
        assert same(
            OPS.noise_prediction_error_backward(on_device[4], on_device[1], *ours, SEED, STEP),
            reference.noise_prediction_error_backward(grad, prediction, *theirs, SEED, STEP),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_divergences_and_their_gradients(n, dtype):
    grad, mean, log_std, prior_mean, prior_std = (values(n, dtype, salt=k, positive=k == 4) for k in range(5))
    tensors = (mean, log_std, prior_mean, prior_std)
    ours = [to_device(t) for t in tensors]
    scale = torch.tensor(0.37)
    close(OPS.gaussian_kl(*ours), reference.gaussian_kl(*tensors))
    for needs in (15, 5, 8):
        for a, b in zip(
            OPS.gaussian_kl_backward(to_device(scale), *ours, needs),
            reference.gaussian_kl_backward(scale, *tensors, needs),
            strict=True,
        ):
            assert same(a, b)
    three = [ours[0], *ours[2:]], [mean, prior_mean, prior_std]
    close(OPS.quadratic_penalty(*three[0]), reference.quadratic_penalty(*three[1]))
    for a, b in zip(
        OPS.quadratic_penalty_backward(to_device(scale), *three[0], 13),
        reference.quadratic_penalty_backward(scale, *three[1], 13),
        strict=True,
    ):
        assert same(a, b)
    options = {"kl_weight": 0.1, "offset": 3}
    found = OPS.variational_gradients(to_device(grad), *ours, SEED, STEP, **options)
    expected = reference.variational_gradients(grad, *tensors, SEED, STEP, **options)
    close(found[0], expected[0])
    assert same(found[1], expected[1])
    assert same(found[2], expected[2])
    into = [torch.zeros_like(t) for t in found[1:]]
    kl = OPS.variational_gradients_(*into, to_device(grad), *ours, SEED, STEP, **options)
    assert all(torch.equal(to_cpu(a), to_cpu(b)) for a, b in zip((kl, *into), found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_welford(n, dtype):
    mean, squares, value = values(n), values(n, salt=1, positive=True), values(n, dtype, salt=2)
    ours = [to_device(t) for t in (mean, squares, value)]
    found, expected = OPS.welford_update_(*ours, 3), reference.welford_update_(mean, squares, value, 3)
    assert same(ours[0], mean)
    assert same(ours[1], squares)
    close(found, expected)


NAMES = (
    "theta",
    "grad",
    "center",
    "prior_std",
    "z",
    "first",
    "second",
    "log_std",
    "std_first",
    "std_second",
    "noise_grad",
)


def step_tensors(n: int, rule: str, learned: bool, momentum: bool, dtype: torch.dtype, collected: bool = False):
    """The lists of variational_step_, in its order; None where there is no such state."""
    positive = {"prior_std", "second", "std_second"}
    present = {"theta", "grad", "center", "prior_std", "z"}
    present |= {"first"} if momentum or "adam" in rule else set()
    present |= {"second"} if "adam" in rule else set()
    present |= {"log_std", "std_first", "std_second"} if learned else set()
    present |= {"noise_grad"} if collected else set()
    return [
        values(n, dtype if name in ("theta", "grad") else torch.float32, salt=k, positive=name in positive)
        if name in present
        else None
        for k, name in enumerate(NAMES)
    ]


def run_step(lists, rule, constants=CONSTANTS, offset=0, scalars=(SEED, STEP, STEP + 1), implementation=OPS):
    constants = constants.tensor() if isinstance(constants, StepConstants) else constants
    step = implementation.variational_step_
    return step(*lists, constants, *scalars, RULES.index(rule), offset=offset)


def one(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("learned", "collected"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", SIZES)
def test_a_step(n, rule, momentum, learned, collected, dtype):
    theirs = step_tensors(n, rule, learned, momentum, dtype, collected)
    ours = [None if t is None else unaligned(to_device(t), k % 3) for k, t in enumerate(theirs)]
    norms = [
        implementation.variational_gradient_norm(
            one(tensors[1]), one(tensors[4]), one(tensors[3]), CONSTANTS.tensor(), RULES.index(rule)
        )
        for implementation, tensors in ((OPS, ours), (reference, theirs))
    ]
    close(*norms)
    for offset in (0, 1):
        found = run_step([one(t) for t in ours], rule, offset=offset)
        expected = run_step([one(t) for t in theirs], rule, offset=offset, implementation=reference)
        for name, a, b in zip(NAMES, ours, theirs, strict=True):
            assert a is None or same(a, b), name
        assert found.device.type == DEVICE
        close(found, expected)


@pytest.mark.parametrize("learned", [False, True])
def test_a_step_without_noise_ends_at_the_mean(learned):
    theirs = step_tensors(1000, "natural_adam", learned, True, torch.float32)
    ours = [None if t is None else to_device(t) for t in theirs]
    for tensors, implementation in ((ours, OPS), (theirs, reference)):
        constants = CONSTANTS._replace(noise_scale=0.0)
        run_step([one(t) for t in tensors], "natural_adam", constants, implementation=implementation)
    assert same(ours[0], theirs[0])


@pytest.mark.parametrize("learned", [False, True])
def test_a_step_in_float64_is_that_of_the_reference(learned):
    tensors = [None if t is None else t.double() for t in step_tensors(1003, "adam", learned, True, torch.float32)]
    ours = [None if t is None else to_device(t) for t in tensors]
    found = run_step([one(t) for t in ours], "adam")
    expected = run_step([one(t) for t in tensors], "adam", implementation=reference)
    for a, b in zip(ours, tensors, strict=True):
        assert a is None or torch.allclose(to_cpu(a), b, rtol=1e-12, atol=1e-12)
    close(found, expected)


@pytest.mark.parametrize("pieces", [[5, 0, 1, 250, 4096, 12], [1024] * 90, [3] * 200])
def test_a_step_of_lists_is_that_of_the_flat_weights(pieces):
    flat = [
        None if t is None else to_device(t) for t in step_tensors(100_003, "natural_adam", True, True, torch.bfloat16)
    ]
    lists = [[] if t is None else split(t, pieces) for t in flat]
    found = run_step(lists, "natural_adam", offset=2)
    expected = run_step([one(t) for t in flat], "natural_adam", offset=2)
    for parts, whole in zip(lists, flat, strict=True):
        assert whole is None or same(torch.cat(parts), to_cpu(whole))
    # Sums have the same bits too, as long as no chunk of 4,096 elements holds more tensors than go into a launch.
    if max(pieces) >= 100:
        assert same(found, to_cpu(expected))
    close(found, to_cpu(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_collected_noise_gradients(n, dtype):
    total, grad = values(n), values(n, dtype, salt=1)
    ours = to_device(total)
    OPS.add_noise_gradient_([ours], [to_device(grad)], SEED, STEP, scale=0.25, offset=5)
    reference.add_noise_gradient_([total], [grad], SEED, STEP, scale=0.25, offset=5)
    assert same(ours, total)


def test_sums_have_the_same_bits_from_run_to_run():
    tensors = [to_device(values(SIZES[-1], salt=k, positive=k == 3)) for k in range(4)]
    assert len({float(to_cpu(OPS.gaussian_kl(*tensors))) for _ in range(5)}) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_elements_do_not_depend_on_where_the_operands_lie(dtype):
    """Aligned, whole items go through a kernel with nothing asked; one element further, each is looked at."""
    flat = [to_device(values(2 * 4096 + 100, dtype, salt=k, positive=k == 4)) for k in range(5)]
    images = [to_device(values(3 * 5128, dtype, salt=k)).reshape(3, 5128) for k in range(2)]
    signal, noise = (to_device(values(3, salt=k)) for k in (7, 8))
    outcomes = []
    for shift in (0, 1):
        grad, mean, log_std, prior_mean, prior_std = (unaligned(t, shift) for t in flat)
        prediction, x0 = (unaligned(t, shift) for t in images)
        outcomes.append([
            *OPS.variational_gradients(grad, mean, log_std, prior_mean, prior_std, SEED, STEP, kl_weight=0.1, offset=4),
            OPS.noise_prediction_error(prediction, x0, signal, noise, SEED, STEP),
            OPS.mix_noise(x0, signal, noise, SEED, STEP),
            OPS.sample_weights(mean, log_std, SEED, STEP, offset=4),
        ])  # fmt: skip
    for aligned, shifted in zip(*outcomes, strict=True):
        assert same(aligned, to_cpu(shifted))


@needs_a_device
def test_a_captured_step_replays_with_new_seeds_draws_and_constants():
    theirs = step_tensors(5003, "natural_adam", True, True, torch.bfloat16)
    start = [None if t is None else to_device(t) for t in theirs]
    ours = [None if t is None else t.clone() for t in start]
    constants, scalars = to_device(CONSTANTS.tensor()), [to_device(t) for t in (SEED, STEP, STEP + 1)]
    torch.cuda.set_sync_debug_mode("default")  # capture itself waits
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_step([one(t) for t in ours], "natural_adam", constants, scalars=scalars)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = run_step([one(t) for t in ours], "natural_adam", constants, scalars=scalars)
    for tensor, first in zip(ours, start, strict=True):
        if tensor is not None:
            tensor.copy_(first)
    for draw in range(3):
        k = CONSTANTS._replace(learning_rate=0.01 * (draw + 1))
        now = (SEED + draw, STEP + draw, STEP + draw + 1)
        constants.copy_(k.tensor())
        for target, value in zip(scalars, now, strict=True):
            target.copy_(value)
        graph.replay()
        expected = run_step([one(t) for t in theirs], "natural_adam", k, scalars=now, implementation=reference)
        for name, a, b in zip(NAMES, ours, theirs, strict=True):
            assert a is None or torch.equal(a.cpu(), b), name
        torch.testing.assert_close(sums.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param({"z": lambda t: t.cpu()}, "z must be on the device", marks=needs_a_device),
        ({"z": lambda t: t.bfloat16()}, "z is state and must be float32"),
        ({"theta": lambda t: t.double()}, "theta must not be float64"),
        ({"first": lambda t: t[:5]}, "first must have as many elements"),
    ],
)
def test_misuse_names_the_argument(change, says):
    tensors = dict(zip(NAMES, step_tensors(40, "adam", False, True, torch.float32), strict=True))
    forbid_waiting(False)
    lists = [[] if t is None else [change.get(n, lambda x: x)(t.to(DEVICE))] for n, t in tensors.items()]
    with pytest.raises(RuntimeError, match=says):
        run_step(lists, "adam")
