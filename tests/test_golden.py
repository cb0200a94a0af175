"""Problems whose answer is known in closed form, solved by the project's own code in float64.

A network that predicts its parameter theta for every image, under prediction_type "sample", has the squared errors
sum_{i,t} ||x_i - theta||^2: the log-likelihood of Gaussian data with mean theta. Posterior and exact retraining are
then conjugate Gaussians, and unlearning has to take the forgotten images back out, exactly.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from vdu_fast import ops, reference, rng
from vdu_fast._native import use_backend
from vdu_fast.config import UnlearnConfig
from vdu_fast.objective import forget_scale, per_sample_error
from vdu_fast.pipelines import Denoiser
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.schedule import NoiseSchedule
from vdu_fast.unlearning_run import UnlearningRun

SHAPE = (1, 2, 2)
T = 3
ABAR = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)


class Mean(nn.Module):
    """Predicts the same image for every input."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        return self.theta.expand(len(x_t), *self.theta.shape)


class Conjugate:
    """Data D = D_r + D_f under a Gaussian prior, and the exact posteriors of both. All are float64 [C, H, W]."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        # Images travel as float32, so they are drawn as float32 and only then widened.
        kept = (torch.rand((9, *SHAPE), generator=generator) - 0.5).double()
        self.forget = torch.rand((4, *SHAPE), generator=generator) * 0.8
        self.prior_mean, self.prior_precision = torch.full(SHAPE, 0.1).double(), 2.0
        self.mean_r, self.precision_r = self.posterior(kept)
        self.mean_star, self.precision_star = self.posterior(torch.cat([kept, self.forget.double()]))
        self.std_star = torch.full(SHAPE, self.precision_star**-0.5, dtype=torch.float64)
        self.forget_precision = 2.0 * T * len(self.forget)
        self.forget_center = self.forget.double().mean(0)

    def posterior(self, data: Tensor) -> tuple[Tensor, float]:
        # -sum_t ||x - theta||^2 is a Gaussian log-likelihood of precision 2 T per image.
        precision = self.prior_precision + 2.0 * T * len(data)
        return (self.prior_mean * self.prior_precision + 2.0 * T * data.sum(0)) / precision, precision

    def run(self, **settings) -> UnlearningRun:
        denoiser = Denoiser(Mean(self.mean_star), NoiseSchedule.from_alphas_cumprod(ABAR, "sample"), SHAPE)
        posterior = GaussianPosterior({"theta": self.std_star})
        # A batch is all of D_f, so that the gradient is exact and nothing but the optimizer is under test.
        config = {"reduction": "sum", "saturation": "none", "replay_weight": 0.0, "batch_size": 4, "gamma": 0.5}
        config |= {"steps": 10**6, "check_every": 10**6, "check_size": 4} | settings
        return UnlearningRun(denoiser, self.forget, posterior, None, UnlearnConfig(**config))

    def minimiser(self, gamma: float) -> Tensor:
        forget, star = (1 - gamma) * self.forget_precision, gamma * self.precision_star
        return (star * self.mean_star - forget * self.forget_center) / (star - forget)

    @property
    def threshold(self) -> float:
        product = self.forget_precision / self.precision_star
        return product / (1 + product)


@pytest.fixture
def problem() -> Conjugate:
    return Conjugate()


def anneal(run: UnlearningRun, steps: int, decay: float) -> Tensor:
    for _ in range(steps):
        run.step()
        run.weights.rule.learning_rate *= decay
    return run.weights.mean.reshape(SHAPE)


def test_the_formulas_of_retraction_are_exact_retraining(problem):
    # Guards the yardstick of the tests below, with both sides computed from the data.
    precision = problem.precision_star - problem.forget_precision
    mean = problem.precision_star * problem.mean_star - problem.forget_precision * problem.forget_center
    assert precision == pytest.approx(problem.precision_r)
    torch.testing.assert_close(mean / precision, problem.mean_r)
    torch.testing.assert_close(problem.minimiser(0.5), problem.mean_r)


@pytest.mark.parametrize(
    ("optimizer", "settings", "steps", "decay", "tolerance"),
    [
        ("natural", {"learning_rate": 1.0}, 100, 1.0, 1e-9),
        ("natural", {"learning_rate": 0.3, "momentum": 0.8}, 200, 1.0, 1e-9),
        ("natural_sign", {"learning_rate": 0.5}, 250, 0.94, 1e-6),
        # Adam comes to rest only as fast as its average of the squares, over 100 steps, forgets the first gradients.
        ("natural_adam", {"learning_rate": 0.3}, 400, 0.97, 2e-4),
        ("adam", {"learning_rate": 0.03}, 400, 0.97, 2e-4),
    ],
)
def test_every_optimizer_ends_at_exact_retraining(problem, optimizer, settings, steps, decay, tolerance):
    run = problem.run(optimizer=optimizer, **settings)
    assert float((run.weights.mean.reshape(SHAPE) - problem.mean_r).abs().max()) > 0.05
    got = anneal(run, steps, decay)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, problem.mean_r, rtol=0, atol=tolerance)


def test_the_network_holds_the_mean_when_the_run_is_finished(problem):
    run = problem.run(optimizer="natural", learning_rate=1.0)
    expected = anneal(run, 150, 1.0)
    run.finish()
    torch.testing.assert_close(run.denoiser.module.theta.detach(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [0.3, 0.4, 0.7, 0.95])
def test_a_weighted_objective_ends_at_its_own_minimiser(problem, gamma):
    assert gamma > problem.threshold
    run = problem.run(optimizer="natural", learning_rate=1.0, gamma=gamma)
    curvature = gamma - (1 - gamma) * problem.forget_precision / problem.precision_star
    run.weights.rule.learning_rate = 1 / curvature
    torch.testing.assert_close(anneal(run, 60, 1.0), problem.minimiser(gamma), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("factor", "exists"), [(1.02, True), (0.98, False)])
def test_a_minimiser_exists_exactly_above_the_threshold_of_gamma(problem, factor, exists):
    gamma = factor * problem.threshold
    curvature = gamma - (1 - gamma) * problem.forget_precision / problem.precision_star
    run = problem.run(optimizer="natural", learning_rate=0.1 / abs(curvature), gamma=gamma)
    lengths = []
    for _ in range(200):
        run.step()
        lengths.append(float(run.weights.z.norm()))
    if exists:
        torch.testing.assert_close(run.weights.mean.reshape(SHAPE), problem.minimiser(gamma), rtol=0, atol=1e-7)
    else:
        # No resting point: z grows, and by ever larger steps.
        assert lengths[-1] > 1e3 * lengths[50]
        assert lengths[-1] - lengths[-2] > lengths[-2] - lengths[-3]


class Rademacher:
    """Noise of +1 in even and -1 in odd draws: for a quadratic, its first two moments give the exact expectation."""

    def __call__(self, shape, seed, step=0, *, stream=0, offset=0, dtype=torch.float32, device="cpu") -> Tensor:
        return torch.full(tuple(shape), 1.0 - 2.0 * (int(step) % 2), dtype=dtype, device=device)


@pytest.mark.parametrize("gamma", [0.5, 0.7])
def test_learned_mean_and_std_end_at_exact_retraining(problem, gamma, monkeypatch):
    for module in (reference, rng):
        monkeypatch.setattr(module, "standard_normal", Rademacher())
    run = problem.run(
        family="mean_field", learn_std=True, samples_per_step=2, optimizer="natural", learning_rate=1.0, gamma=gamma
    )
    run.weights.std_learning_rate = 0.02
    with use_backend("reference"):  # whose noise can be replaced
        for _ in range(250):
            run.step()
            run.weights.std_learning_rate *= 0.965
    precision = problem.precision_star - (1 - gamma) / gamma * problem.forget_precision
    expected_std = torch.full((4,), precision**-0.5, dtype=torch.float64)
    torch.testing.assert_close(run.weights.mean.reshape(SHAPE), problem.minimiser(gamma), rtol=0, atol=1e-7)
    torch.testing.assert_close(run.weights.log_std.exp(), expected_std, rtol=1e-3, atol=0)
    if gamma == 0.5:
        assert float(run.weights.log_std.exp()[0]) == pytest.approx(problem.precision_r**-0.5, rel=1e-3)


def test_with_gaussian_noise_the_std_gradient_is_zero_on_average_at_exact_retraining(problem):
    copies = 20_000  # of each weight, so that one draw is many

    def repeated(values: Tensor) -> Tensor:
        return values.flatten().repeat(copies)

    center, std = repeated(problem.mean_star), repeated(problem.std_star)
    mean, log_std = repeated(problem.mean_r), torch.full_like(center, -0.5 * math.log(problem.precision_r))
    grad = -problem.forget_precision * (ops.sample_weights(mean, log_std, 1, 0) - repeated(problem.forget_center))
    _, d_mean, d_log_std = ops.variational_gradients(grad, mean, log_std, center, std, 1, 0)
    for gradient in (std * d_mean, d_log_std):
        values = gradient.reshape(copies, 4)
        standard_error = values.std(0) / math.sqrt(copies)
        assert (values.mean(0).abs() < 4.5 * standard_error).all()
        assert (standard_error < 0.02).all()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_in_whitened_coordinates_is_the_natural_gradient_step(problem, momentum):
    gamma, lr = 0.6, 0.1
    run = problem.run(optimizer="natural", learning_rate=lr, momentum=momentum, gamma=gamma)
    mu, buffer = problem.mean_star.clone(), torch.zeros(SHAPE, dtype=torch.float64)
    for _ in range(10):
        run.step()
        gradient = -(1 - gamma) * problem.forget_precision * (mu - problem.forget_center)
        gradient += gamma * problem.precision_star * (mu - problem.mean_star)
        buffer = momentum * buffer + gradient
        mu = mu - lr * problem.std_star**2 * buffer
        torch.testing.assert_close(run.weights.mean.reshape(SHAPE), mu, rtol=1e-10, atol=1e-12)


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
        self.shift = nn.Parameter(torch.linspace(-0.3, 0.3, 4, dtype=torch.float64).reshape(SHAPE))

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        return self.scale * x_t + self.shift * (1 + timesteps[:, None, None, None])


@pytest.mark.parametrize("weighting", ["simple", "elbo"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("with_replacement", [True, False])
def test_the_minibatch_estimate_is_unbiased(weighting, prediction_type, with_replacement):
    """Over all batches and all timesteps, value and gradient average to the sum over D_f and t."""
    n, b = 3, 2
    schedule = NoiseSchedule.from_alphas_cumprod(ABAR, prediction_type)
    denoiser, c = Denoiser(Affine(), schedule, SHAPE), schedule.timestep_weights(weighting)
    x0 = torch.randn((n, *SHAPE), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # One noise for each image and timestep, as the sum over D_f and t has it.
    noise = torch.randn((n, T, *SHAPE), dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    exact = torch.zeros((), dtype=torch.float64)
    for i, t in itertools.product(range(n), range(T)):
        signal, sigma = ABAR[t] ** 0.5, (1 - ABAR[t]) ** 0.5
        x_t = signal * x0[i] + sigma * noise[i, t]
        target = {"epsilon": noise[i, t], "sample": x0[i], "v_prediction": signal * noise[i, t] - sigma * x0[i]}
        prediction = denoiser.module(x_t[None], torch.tensor([t]))[0]
        exact = exact + c[t] * (target[prediction_type] - prediction).square().sum()

    scale = forget_scale("sum", images=n, timesteps=T, elements=math.prod(SHAPE))
    batches = list(itertools.product(range(n), repeat=b) if with_replacement else itertools.permutations(range(n), b))
    estimates = []
    for rows, times in itertools.product(batches, itertools.product(range(T), repeat=b)):
        rows, times = torch.tensor(rows), torch.tensor(times)
        eps = noise[rows, times]
        prediction = denoiser.predict(schedule.add_noise(x0[rows], eps, times), times)
        error = per_sample_error(prediction, schedule.target(x0[rows], eps, times), c[times])
        estimates.append(scale * error.mean())
    mean = torch.stack(estimates).mean()
    torch.testing.assert_close(mean, exact, rtol=1e-12, atol=0)
    parameters = list(denoiser.module.parameters())
    for got, expected in zip(
        torch.autograd.grad(mean, parameters), torch.autograd.grad(exact, parameters), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    assert float(torch.stack(estimates).detach().std()) > 0.01 * float(mean.detach())  # single batches do differ


def test_one_epoch_of_the_runs_batches_adds_up_to_the_exact_gradient(problem):
    """The run itself, one image per pass: |D_f| passes of one step see every image once."""
    whole = problem.run(optimizer="natural", learning_rate=0.1)
    single = problem.run(optimizer="natural", learning_rate=0.1, batch_size=1, accumulate=4)
    for _ in range(5):
        whole.step()
        single.step()
    torch.testing.assert_close(single.weights.z, whole.weights.z, rtol=1e-10, atol=1e-12)


def test_the_regularizer_of_a_run_is_the_kl_of_its_two_gaussians(problem):
    run = problem.run(family="mean_field", learn_std=True, samples_per_step=2, optimizer="natural", learning_rate=0.2)
    for _ in range(5):
        run.step()
    normal = torch.distributions.Normal
    q = normal(run.weights.mean, run.weights.log_std.exp())
    expected = torch.distributions.kl_divergence(
        q, normal(problem.mean_star.flatten(), problem.std_star.flatten())
    ).sum()
    assert run.weights.kl == pytest.approx(float(expected))
    assert float(expected) > 0
    torch.testing.assert_close(
        ops.quadratic_penalty(run.weights.mean, problem.mean_star.flatten(), problem.std_star.flatten()),
        0.5 * run.weights.z.square().sum(),
    )
