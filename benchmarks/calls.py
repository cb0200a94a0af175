"""What one call costs where the work is small: Python, the dispatcher, and the walk over many tensors.

Run by `make bench-calls`, or `pytest benchmarks/calls.py`: pytest-benchmark prints the table.
"""

from __future__ import annotations

import pytest
import torch

from vdu_fast import ops, use_backend
from vdu_fast.benchmarks.cases.mean_only_step import step
from vdu_fast.benchmarks.parameters import State
from vdu_fast.optim import UpdateRule

# As many tensors as a U-Net has, of few elements each.
TENSORS = 500
SMALL, MANY = [torch.Size([1000])], [torch.Size([8])] * TENSORS


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    with use_backend(request.param):
        yield


@pytest.mark.benchmark(group="1,000 elements")
class TestSmall:
    def test_standard_normal(self, benchmark, backend):
        benchmark(lambda: ops.standard_normal(1000, 1, 2))

    def test_sample_weights_(self, benchmark, backend):
        s = State(SMALL)
        benchmark(ops.sample_weights_, s.theta, s.mean, s.log_std, 1, 2)

    def test_gaussian_kl(self, benchmark, backend):
        s = State(SMALL)
        benchmark(ops.gaussian_kl, s.mean, s.log_std, s.center, s.prior_std)

    def test_variational_step_(self, benchmark, backend):
        benchmark(step(State(SMALL), "natural_adam"))

    def test_mix_noise(self, benchmark, backend):
        x0, signal = torch.randn(4, 1, 16, 16), torch.rand(4)
        benchmark(ops.mix_noise, x0, signal, signal, 1, 2)

    def test_noise_prediction_loss(self, benchmark, backend):
        prediction = torch.randn(4, 1, 16, 16)
        benchmark(ops.noise_prediction_loss, prediction, 1, 2)


@pytest.mark.benchmark(group=f"{TENSORS} tensors of 8 elements, natural step")
class TestManyTensors:
    NAMES = ("theta", "grad", "center", "prior_std", "z")
    CONSTANTS = UpdateRule("natural", 1e-4).constants(1, kl_weight=1e-6, noise_scale=0.0)

    def test_flat(self, benchmark):
        benchmark(step(State(MANY), "natural"))

    def test_one_call_with_a_list(self, benchmark):
        lists = [State(MANY).lists(name) for name in self.NAMES]
        benchmark(lambda: ops.variational_step_(*lists, self.CONSTANTS, 1, 2, 3, rule="natural"))

    def test_one_call_per_tensor(self, benchmark):
        lists = [State(MANY).lists(name) for name in self.NAMES]

        def each() -> None:
            for tensors in zip(*lists, strict=True):
                ops.variational_step_(*tensors, self.CONSTANTS, 1, 2, 3, rule="natural")

        benchmark(each)
