"""The ops as torch sees them: derivatives, shapes without data, writes, and compilation without a break."""

from __future__ import annotations

import warnings
from itertools import chain

import pytest
import torch
from operands import CONSTANTS, F16, F32, F64, LARGE, bits, needs_native
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from torch.library import opcheck

from vdu_fast import _native, _schema, ops

BACKENDS = [pytest.param("cpu", marks=needs_native), "reference"]


def values(*shape: int, seed: int = 0, dtype: torch.dtype = F64, positive: bool = False) -> Tensor:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return (t.abs() + 0.2 if positive else t).to(dtype)


M, R, C, S = (values(2, 7, seed=k, positive=k == 3) for k in range(4))
P, X0 = values(3, 5, seed=5), values(3, 5, seed=6)
A, B, W = (values(3, seed=k, positive=True) for k in (7, 8, 9))
LEARNED_LIMIT = torch.tensor([1e-3, 1e3, 1e3], dtype=F64)  # far from the errors, so away from the kink

DIFFERENTIABLE = {
    "sample_weights": (lambda m, r: ops.sample_weights(m, r, 3, 1, offset=5), (M, R)),
    "sample_whitened_weights": (
        lambda c, s, z: ops.sample_whitened_weights(c, s, z, 3, 1, noise_scale=0.5, offset=5),
        (C, S, M),
    ),
    "sample_whitened_weights at the mean": (
        lambda c, s, z: ops.sample_whitened_weights(c, s, z, 3, noise_scale=0.0),
        (C, S, M),
    ),
    "add_noise": (
        lambda x, abar: ops.add_noise(x, torch.tensor([1, 0, 1]), abar, 3),
        (X0, torch.tensor([0.7, 0.2], dtype=F64)),
    ),
    "mix_noise": (lambda x, a, b: ops.mix_noise(x, a, b, 3, 1), (X0, A, B)),
    "mix_noise of a vector": (lambda x, a, b: ops.mix_noise(x, a, b, 3, 1), (A, B, W)),
    "loss of eps": (lambda p, w: ops.noise_prediction_loss(p, 3, weight=w), (P, W)),
    "loss of a target": (lambda p, t: ops.noise_prediction_loss(p, 0, target=t, reduction="sum"), (P, X0)),
    "loss of v": (
        lambda p, t, a, b: ops.noise_prediction_loss(p, 3, target=t, signal=a, noise=b, reduction="none"),
        (P, X0, A, B),
    ),
    "loss of scaled eps": (lambda p, b: ops.noise_prediction_loss(p, 3, noise=b, reduction="none"), (P, B)),
    "hinge": (
        lambda p, w: ops.noise_prediction_loss(p, 3, weight=w, saturation="hinge", limit=LEARNED_LIMIT),
        (P, W),
    ),
    "npo": (
        lambda p, w, beta, before: ops.noise_prediction_loss(
            p, 3, weight=w, saturation="npo", beta=beta, before=before, reduction="none"
        ),
        (P, W, A, B),
    ),
    "gaussian_kl": (ops.gaussian_kl, (M, R, C, S)),
    "quadratic_penalty": (ops.quadratic_penalty, (M, C, S)),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, name):
    function, inputs = DIFFERENTIABLE[name]
    with _native.use_backend(backend):
        assert gradcheck(function, [t.clone().requires_grad_() for t in inputs])


@needs_native
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_derivatives_are_those_of_the_reference(name, dtype):
    function, inputs = DIFFERENTIABLE[name]
    gradients = []
    for backend in ("cpu", "reference"):
        leaves = [t.to(dtype).clone().requires_grad_() for t in inputs]
        with _native.use_backend(backend):
            out = function(*leaves)
            gradients.append(torch.autograd.grad(out, leaves, torch.linspace(1, 2, out.numel()).to(out).view_as(out)))
    torch.testing.assert_close(*gradients, rtol=1e-12 if dtype == F64 else 1e-5, atol=1e-12 if dtype == F64 else 1e-5)


@needs_native
def test_only_the_gradients_that_are_needed_are_formed():
    for name in ("gaussian_kl", "quadratic_penalty", "mix_noise", "loss of v", "sample_whitened_weights"):
        function, inputs = DIFFERENTIABLE[name]
        everything = torch.autograd.grad(
            function(*(leaves := [t.clone().requires_grad_() for t in inputs])).sum(), leaves
        )
        for k in range(len(inputs)):
            leaves = [t.clone().requires_grad_(j == k) for j, t in enumerate(inputs)]
            (alone,) = torch.autograd.grad(function(*leaves).sum(), leaves[k])
            assert torch.equal(alone, everything[k]), (name, k)


@needs_native
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,)])
def test_empty_batches_have_derivatives(shape):
    for function in (
        lambda x, a, b: ops.mix_noise(x, a, b, 3),
        lambda x, a, b: ops.noise_prediction_loss(x, 3, target=x * 2, signal=a, noise=b, reduction="sum"),
    ):
        leaves = [t.requires_grad_() for t in (torch.ones(shape), torch.ones(shape[0]), torch.ones(shape[0]))]
        gradients = torch.autograd.grad(function(*leaves).sum(), leaves)
        assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves]
        assert all(not g.any() for g in gradients)


@needs_native
def test_a_second_derivative_is_refused_rather_than_wrong():
    for name, (function, inputs) in DIFFERENTIABLE.items():
        if name in ("sample_weights", "gaussian_kl", "quadratic_penalty", "loss of eps"):
            leaves = [t.clone().requires_grad_() for t in inputs]
            first = torch.autograd.grad(function(*leaves).square().sum(), leaves[0], create_graph=True)[0]
            with pytest.raises(RuntimeError, match="once_differentiable"):
                first.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_notices_that_an_op_wrote_over_what_it_had_saved(backend):
    x = torch.ones(3, requires_grad=True)
    with _native.use_backend(backend):
        for write in (
            lambda t: ops.sample_weights_(t, torch.ones(3), torch.ones(3), 0),
            lambda t: ops.sample_weights_([t], [torch.ones(3)], [torch.ones(3)], 0),
            lambda t: ops.add_noise_gradient_(t, torch.ones(3), 0),
            lambda t: ops.welford_update_(torch.ones(3), t, torch.ones(3), 1),
            lambda t: ops.variational_step_(
                torch.ones(3), torch.ones(3), torch.ones(3), torch.ones(3), t, CONSTANTS, 0, rule="natural"
            ),
        ):
            saved = torch.full((3,), 2.0)
            loss = (x * saved).sum()
            write(saved)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def step_arguments(*, learned: bool, given: bool, moments: bool, rule: int) -> tuple:
    def listed(seed: int, dtype: torch.dtype = F32, positive: bool = False) -> list[Tensor]:
        return [values(n, seed=seed + k, dtype=dtype, positive=positive) for k, n in enumerate((5, 0, 3))]

    lists = [listed(0, F16), listed(3, F16), listed(6), listed(9, positive=True), listed(12)]
    lists += [listed(15), listed(18, positive=True)] if moments else [[], []]
    lists += [listed(21), listed(24), listed(27, positive=True)] if learned else [[], [], []]
    lists.append(listed(30) if given else [])
    scalars = (torch.tensor(3), torch.tensor(1), torch.tensor(2))
    return (*lists, CONSTANTS.tensor(), *scalars, rule)


def samples() -> dict[str, list[tuple[tuple, dict]]]:
    """Arguments for every op: (positional, keyword)."""
    seed, step = torch.tensor(-3), torch.tensor(2)

    def leaves(*tensors: Tensor) -> list[Tensor]:
        return [t.clone().requires_grad_() for t in tensors]

    wide = values(7, 2, seed=11).t()  # not contiguous
    return {
        "standard_normal_": [((torch.empty(5), seed, step), {"stream": 2, "offset": 3})],
        "sample_weights": [((*leaves(M, R), seed, step), {"offset": 3}), ((M.float(), R.float(), seed, step), {}),
                           ((*leaves(wide, wide), seed, step), {})],
        "sample_weights_backward": [((M, R, seed, step), {"offset": 3}), ((wide, wide, seed, step), {})],
        "sample_weights_": [(([M.clone()], [M], [R], seed, step), {}), (([], [], [], seed, step), {})],
        "sample_whitened_weights": [((*leaves(C, S, M), seed, step), {"noise_scale": 0.5, "offset": 1}),
                                    ((C, S, wide, seed, step), {"noise_scale": 0.0})],
        "sample_whitened_weights_": [(([M.half()], [C], [S], [M], log_std, seed, step), {"noise_scale": 0.5})
                                     for log_std in ([], [R])],
        "mix_noise": [((*leaves(X0, A, B), seed, step), {}), ((X0.bfloat16(), A, B.float(), seed, step), {}),
                      ((values(5, 3).t(), A, B, seed, step), {})],
        "noise_prediction_error": [
            ((*leaves(P), None, None, None, seed, step), {}),
            ((*leaves(P, X0, A, B), seed, step), {}),
            ((P.half(), X0.half(), A, None, seed, step), {}),
        ],
        "noise_prediction_error_backward": [
            ((A, P, None, None, None, seed, step), {}),
            ((A, P, X0, A, B, seed, step), {}),
            ((A, values(5, 3).t(), X0, A, B, seed, step), {}),
        ],
        "gaussian_kl": [(tuple(leaves(M, R, C, S)), {}), ((M.half(), R.half(), C.half(), S.half()), {})],
        "gaussian_kl_backward": [((torch.tensor(0.5, dtype=F64), wide, R, C, S, needs), {}) for needs in (0, 5, 15)],
        "quadratic_penalty": [(tuple(leaves(M, C, S)), {})],
        "quadratic_penalty_backward": [((torch.tensor(0.5, dtype=F64), wide, C, S, needs), {}) for needs in (0, 5, 13)],
        "variational_gradients": [((M, wide, R, C, S, seed, step), {"kl_weight": 0.2, "offset": 4})],
        "variational_gradients_": [((M.clone(), R.clone(), M, wide, R, C, S, seed, step), {"kl_weight": 0.2})],
        "variational_step_": [
            (step_arguments(learned=learned, given=given, moments=moments, rule=rule), {"offset": 2})
            for rule, learned, given, moments in ((0, 0, 0, 0), (1, 1, 0, 1), (2, 1, 1, 1), (3, 0, 0, 1))
        ],
        "variational_gradient_norm": [(([M], [R], [S], CONSTANTS.tensor(), 3), {})],
        "add_noise_gradient_": [(([M.clone()], [R.half()], seed, step), {"scale": 0.5, "offset": 3})],
        "welford_update_": [((M.clone(), S.clone(), R.half(), 3), {})],
    }  # fmt: skip


SAMPLES = samples()


def test_every_op_has_arguments_to_check_it_with():
    assert SAMPLES.keys() == _schema.SCHEMAS.keys()


@pytest.mark.parametrize("name", _schema.SCHEMAS)
def test_opcheck(name):
    op = getattr(torch.ops.vdu_fast, name).default
    for arguments, options in SAMPLES[name]:
        opcheck(op, arguments, options)


def training_loss(mean: Tensor, log_std: Tensor, x0: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    theta = ops.sample_weights(mean, log_std, seed, step, offset=8)
    x_t = ops.mix_noise(x0, A.to(x0), B.to(x0), seed, step)
    prediction = x_t * theta[: x0.shape[1]]
    loss = ops.noise_prediction_loss(prediction, seed, step, weight=W, saturation="hinge", limit=LEARNED_LIMIT)
    return loss + ops.gaussian_kl(mean, log_std, mean * 0.5, log_std.exp()) + ops.standard_normal(3, seed, step).sum()


def gradients_of(function, seed: int, step: int):
    leaves = [values(9, seed=1).float().requires_grad_(), values(9, seed=2).float().requires_grad_()]
    x0 = values(3, 5, seed=4).float().requires_grad_()
    loss = function(*leaves, x0, torch.tensor(seed), torch.tensor(step))
    return loss, torch.autograd.grad(loss, [*leaves, x0])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_training_loss_compiles_whole_and_once_for_all_seeds_and_steps(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(training_loss, backend=counter, fullgraph=True)
    for seed, step in ((0, 0), (5, 1), (2**40, 2), (-7, 2**33)):
        torch.testing.assert_close(gradients_of(compiled, seed, step), gradients_of(training_loss, seed, step))
    assert counter.frame_count == 1


def test_offsets_and_sizes_may_be_symbols():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def draw(mean: Tensor, offset: int, seed: Tensor) -> Tensor:
        return ops.sample_weights(mean, mean, seed, offset=offset) * 2

    for n, offset in ((10, 3), (11, 4), (300, 2**34)):
        mean, seed = torch.linspace(-1, 1, n), torch.tensor(3)
        assert torch.equal(draw(mean, offset, seed), ops.sample_weights(mean, mean, seed, offset=offset) * 2)
    assert counter.frame_count == 1


def test_ops_that_write_compile_and_write():
    torch._dynamo.reset()

    def step(theta: list[Tensor], z: list[Tensor], grad: list[Tensor], constants: Tensor, draw: Tensor) -> Tensor:
        ones = [torch.ones_like(t) for t in z]
        return torch.ops.vdu_fast.variational_step_(
            theta, grad, ones, ones, z, [], [], [], [], [], [], constants, draw, draw, draw + 1, 1, offset=4
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for draw, rate in ((1, 0.1), (2, 0.3)):
        got, expected = ([[values(n).to(F32) for n in (4, 3)] for _ in range(3)] for _ in range(2))
        constants = CONSTANTS._replace(learning_rate=rate).tensor()
        sums = [f(*lists, constants, torch.tensor(draw)) for f, lists in ((compiled, got), (step, expected))]
        assert torch.equal(*sums)
        for one, other in zip(chain(*got), chain(*expected), strict=True):
            assert torch.equal(bits(one), bits(other))
        assert not torch.equal(got[1][0], values(4).to(F32))
    assert counter.frame_count == 1


def test_ops_work_under_inference_mode():
    with torch.inference_mode():
        theta = torch.zeros(5)
        ops.sample_weights_(theta, torch.ones(5), torch.zeros(5), 0)
        assert torch.equal(theta, ops.sample_weights(torch.ones(5), torch.zeros(5), 0))


@needs_native
def test_a_float_gradient_flows_through_every_op_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for function, inputs in DIFFERENTIABLE.values():
            function(*(t.clone().requires_grad_() for t in inputs)).sum().backward()


@needs_native
def test_backward_draws_its_noise_again_and_keeps_none():
    mean, log_std = torch.zeros(LARGE), torch.zeros(LARGE, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ops.sample_weights(mean, log_std, 1)
    assert sorted(saved) == [1, 1, LARGE]
