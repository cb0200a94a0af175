"""The Triton kernels on a GPU: the CPU's bits, no waiting for the device, and CUDA graphs that replay with new values.

Bits that the interpreter cannot vouch for, such as the rounding to bfloat16, are checked here.
"""

from __future__ import annotations

import pytest
import torch
from operands import BF16, CALLS, CONSTANTS, F16, F32, LARGE, OFFSETS, Operands, assert_same_bits, bits
from torch import Tensor

from vdu_fast import _native, kernels, ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or HIP device"),
    pytest.mark.skipif(_native.ABSENCES["triton"] is not None, reason=f"no Triton: {_native.ABSENCES['triton']}"),
]

# (size, offset): every path of a kernel once, since each is compiled: aligned or not, one program or more, a last
# one that is not whole.
EVERY_PATH = ((0, 3), (63, 1), (1000, 3), (1000, 0), (2064, 0), (3001, 0))
FORMS = {F32: EVERY_PATH, BF16: ((1000, 3), (2064, 0)), F16: ((1000, 3), (2064, 0))}


class OnDevice(Operands):
    """The same operands on the GPU."""

    def __call__(self, *shape: int, **options: bool) -> Tensor:
        return super().__call__(*shape, **options).cuda()


@pytest.fixture(autouse=True)
def triton_serves():
    with _native.use_backend("triton"):
        assert _native.backend_of("cuda") == "triton"
        yield


def on_gpu(name: str, size: int, dtype: torch.dtype, offset: int) -> dict[str, Tensor]:
    return {key: tensor.cpu() for key, tensor in CALLS[name](OnDevice(size, dtype), offset).items()}


def on_cpu(name: str, size: int, dtype: torch.dtype, offset: int) -> dict[str, Tensor]:
    with _native.use_backend("reference"):
        return CALLS[name](Operands(size, dtype), offset)


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("name", CALLS)
def test_every_element_has_the_bits_of_the_cpu(name, dtype):
    for size, offset in FORMS[dtype]:
        assert_same_bits(on_gpu(name, size, dtype, offset), on_cpu(name, size, dtype, offset), sums=False)


def test_one_element():
    for name in ("sample_weights", "mix_noise", "gaussian_kl", "variational_step_, adam"):
        assert_same_bits(on_gpu(name, 1, F32, 0), on_cpu(name, 1, F32, 0), sums=False)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_normals_have_the_same_bits_on_every_backend(backend):
    if _native.ABSENCES[backend] is not None:
        pytest.skip(f"no {backend}: {_native.ABSENCES[backend]}")
    for offset in OFFSETS:
        with _native.use_backend(backend):
            n = ops.standard_normal(LARGE, 2**63 + 5, 7, offset=offset, device="cuda")
        with _native.use_backend("reference"):
            assert torch.equal(bits(n.cpu()), bits(ops.standard_normal(LARGE, 2**63 + 5, 7, offset=offset)))


def test_sums_have_the_same_bits_from_run_to_run():
    make = OnDevice(LARGE)
    tensors = make(), make(), make(), make.positive()
    assert len({float(ops.gaussian_kl(*tensors)) for _ in range(5)}) == 1


STATE = ("z", "first", "second", "log_std", "std_first", "std_second")


def step_operands(make: Operands) -> list[list[Tensor]]:
    """The lists of variational_step_ under "adam" with the std learned, but for noise_grad."""
    flat = [make(), make(), make(state=True), make.positive(state=True)]
    flat += [make.positive(state=True) if name.endswith("second") else make(state=True) for name in STATE]
    return [[tensor] for tensor in flat]


def test_no_op_waits_for_the_device():
    make = OnDevice(5003, BF16)
    lists, scalars = step_operands(make), [torch.tensor(k) for k in (1, 2, 3)]
    x, noise = make(8, 5003), torch.rand(8).cuda()
    args = [[], CONSTANTS.tensor(), *scalars, 3]
    kernels.variational_step_(*lists, *args)  # compiling may wait
    kernels.mix_noise(x, noise, noise, *scalars[:2])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.variational_step_(*lists, *args)
        kernels.mix_noise(x, noise, noise, *scalars[:2])
        kernels.noise_prediction_error(x, None, None, noise, *scalars[:2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_replays_with_new_seeds_draws_and_constants():
    ours, theirs = step_operands(OnDevice(5003)), step_operands(Operands(5003))
    start = [[tensor.clone() for tensor in tensors] for tensors in ours]
    constants = CONSTANTS.tensor().cuda()
    scalars = [torch.tensor(k).cuda() for k in (1, 2, 3)]

    def step() -> Tensor:
        return kernels.variational_step_(*ours, [], constants, *scalars, 3)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = step()
    for (tensor,), (first,) in zip(ours, start, strict=True):
        tensor.copy_(first)
    for draw in range(3):
        now = CONSTANTS._replace(learning_rate=0.01 * (draw + 1)).tensor()
        values = [torch.tensor(2**40 + draw), torch.tensor(draw), torch.tensor(draw + 1)]
        constants.copy_(now)
        for target, value in zip(scalars, values, strict=True):
            target.copy_(value)
        graph.replay()
        expected = reference.variational_step_(*theirs, [], now, *values, 3)
        for (a,), (b,) in zip(ours, theirs, strict=True):
            assert torch.equal(bits(a.cpu()), bits(b))
        torch.testing.assert_close(sums.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_through_autograd_and_compilation():
    make = OnDevice(5003)
    tensors = make(), make(), make(), make.positive()
    seed = torch.tensor(3)

    def objective(mean: Tensor, log_std: Tensor, center: Tensor, prior_std: Tensor) -> Tensor:
        theta = ops.sample_weights(mean, log_std, seed)
        return theta.square().sum() + ops.gaussian_kl(mean, log_std, center, prior_std)

    def gradients(function) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        function(*leaves).backward()
        return [t.grad for t in leaves]

    expected = gradients(objective)
    for got, want in zip(gradients(torch.compile(objective, fullgraph=True)), expected, strict=True):
        torch.testing.assert_close(got, want)
