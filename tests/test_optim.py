"""Every update rule against a loop written out by hand in float64, and the state that survives a restart."""

from __future__ import annotations

import math

import pytest
import torch

from vdu_fast import ops
from vdu_fast.errors import InputError
from vdu_fast.optim import UpdateRule, VariationalWeights
from vdu_fast.rng import Stream, standard_normal

D = 40
RULES = ["natural", "natural_sign", "natural_adam", "adam"]


def doubles(seed: int, positive: bool = False) -> torch.Tensor:
    values = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.abs() * 0.1 + 0.01 if positive else values


CENTER, PRIOR_STD = doubles(1), doubles(2, positive=True)


def grad_mu(mu: torch.Tensor, step: int) -> torch.Tensor:
    """Some gradient in the weights, different at every step."""
    return torch.sin(3 * mu + step) + 0.5 * mu


def run(rule: UpdateRule, steps: int, kl_weight: float = 0.3) -> torch.Tensor:
    weights = VariationalWeights(CENTER, PRIOR_STD, rule)
    theta = weights.mean
    for step in range(steps):
        weights.step_(theta, grad_mu(theta, step), kl_weight=kl_weight)
    assert torch.equal(theta, weights.mean)
    return theta


def by_hand(name: str, steps: int, lr: float, momentum: float, kl_weight: float = 0.3) -> torch.Tensor:
    """The rules of the method, on mu, one weight at a time."""
    result = CENTER.clone()
    for i in range(D):
        mu, center, sigma = float(CENTER[i]), float(CENTER[i]), float(PRIOR_STD[i])
        m = v = 0.0
        for step in range(steps):
            total = math.sin(3 * mu + step) + 0.5 * mu + kl_weight * (mu - center) / sigma**2
            if name in ("natural", "natural_sign"):
                m = momentum * m + sigma * total
                move = m if name == "natural" else math.copysign(1, m)
                mu -= lr * sigma * move
            else:
                scaled = sigma * total if name == "natural_adam" else total
                m = 0.9 * m + 0.1 * scaled
                v = 0.99 * v + 0.01 * scaled**2
                move = (m / (1 - 0.9 ** (step + 1))) / math.sqrt(v / (1 - 0.99 ** (step + 1)))
                mu -= lr * (sigma if name == "natural_adam" else 1) * move
        result[i] = mu
    return result


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_its_formula(name, momentum):
    got = run(UpdateRule(name, 0.05, momentum), 20)
    torch.testing.assert_close(got, by_hand(name, 20, 0.05, momentum), rtol=1e-9, atol=1e-10)


def test_adam_on_the_weights_is_torch_adam():
    mu = CENTER.clone().requires_grad_()
    optimizer = torch.optim.Adam([mu], lr=0.01, betas=(0.9, 0.99), eps=1e-12)
    for step in range(30):
        mu.grad = grad_mu(mu.detach(), step) + 0.3 * (mu.detach() - CENTER) / PRIOR_STD**2
        optimizer.step()
    torch.testing.assert_close(run(UpdateRule("adam", 0.01), 30), mu.detach(), rtol=1e-8, atol=1e-9)


def test_natural_adam_is_torch_adam_on_the_whitened_coordinates():
    z = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.01, betas=(0.9, 0.99), eps=1e-12)
    for step in range(30):
        mu = CENTER + PRIOR_STD * z.detach()
        z.grad = PRIOR_STD * grad_mu(mu, step) + 0.3 * z.detach()
        optimizer.step()
    expected = CENTER + PRIOR_STD * z.detach()
    torch.testing.assert_close(run(UpdateRule("natural_adam", 0.01), 30), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["natural_adam", "adam"])
def test_adam_leaves_weights_without_gradient_where_they_are(name):
    weights = VariationalWeights(CENTER, PRIOR_STD, UpdateRule(name, 0.05))
    grad = torch.zeros(D, dtype=torch.float64)
    grad[0] = 1.0
    for _ in range(3):
        weights.step_(torch.empty_like(grad), grad, kl_weight=0.0)
    assert weights.z[0] < 0
    assert not weights.z[1:].any()


def test_without_momentum_no_buffer_is_kept():
    weights = VariationalWeights(CENTER, PRIOR_STD, UpdateRule("natural", 0.1))
    weights.step_(torch.empty_like(CENTER), torch.ones_like(CENTER), kl_weight=0.0)
    assert set(weights.state_dict()) == {"z", "count", "kl"}


def test_the_mean_starts_at_the_centre():
    weights = VariationalWeights(CENTER, PRIOR_STD, UpdateRule())
    assert torch.equal(weights.mean, CENTER)
    assert weights.kl == 0


def mean_field(learn_std: bool = True, **options) -> VariationalWeights:
    """Weights that have moved away from where they start."""
    weights = VariationalWeights(CENTER, PRIOR_STD, UpdateRule(), family="mean_field", learn_std=learn_std, **options)
    weights.z.copy_(doubles(4))
    if learn_std:
        weights.log_std.copy_(doubles(6) - 2)
    return weights


def sample(weights: VariationalWeights, seed: int, draw: int) -> torch.Tensor:
    theta = torch.empty_like(CENTER)
    weights.sample_(theta, seed, draw)
    return theta


@pytest.mark.parametrize("learn_std", [False, True])
def test_the_kl_after_a_step_is_that_of_the_two_gaussians(learn_std):
    weights = mean_field(learn_std)
    weights.step_(torch.empty_like(CENTER), doubles(8), kl_weight=0.3)
    std = weights.log_std.exp() if learn_std else PRIOR_STD
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(weights.mean, std), normal(CENTER, PRIOR_STD)).sum()
    assert weights.kl == pytest.approx(float(expected))


def test_mean_only_evaluates_the_network_at_the_mean():
    weights = VariationalWeights(CENTER, PRIOR_STD, UpdateRule())
    weights.z.copy_(doubles(4))
    assert torch.equal(sample(weights, 3, 9), weights.mean)


def test_mean_field_samples_are_mean_plus_std_times_regenerated_noise():
    weights = mean_field()
    n = standard_normal(D, 3, 9, stream=Stream.WEIGHTS).double()
    torch.testing.assert_close(sample(weights, 3, 9), weights.mean + weights.log_std.exp() * n)
    assert torch.equal(sample(weights, 3, 9), sample(weights, 3, 9))
    assert not torch.equal(sample(weights, 3, 9), sample(weights, 3, 10))
    assert not torch.equal(sample(weights, 3, 9), sample(weights, 4, 9))
    fixed = mean_field(learn_std=False)
    torch.testing.assert_close(sample(fixed, 3, 9), fixed.mean + PRIOR_STD * n)


def test_a_step_follows_the_gradients_of_autograd_and_leaves_the_next_sample():
    weights = mean_field(std_learning_rate=0.01)
    n = standard_normal(D, 3, 9, stream=Stream.WEIGHTS).double()
    z, log_std = weights.z.clone().requires_grad_(), weights.log_std.clone().requires_grad_()
    theta = CENTER + PRIOR_STD * z + log_std.exp() * n
    loss = (theta**3).sum() + 0.7 * ops.gaussian_kl(CENTER + PRIOR_STD * z, log_std, CENTER, PRIOR_STD)
    expected_z, expected_log_std = torch.autograd.grad(loss, (z, log_std))
    assert weights.gradient_norm(3 * sample(weights, 3, 9) ** 2, 0.7) == pytest.approx(float(expected_z.norm()))
    got = sample(weights, 3, 9)
    norm = weights.step_(got, 3 * got**2, kl_weight=0.7, seed=3, draw=9, next_draw=10)
    assert norm == pytest.approx(float(expected_z.norm()))
    torch.testing.assert_close(weights.state["first"], 0.1 * expected_z)
    torch.testing.assert_close(weights.state["std_first"], 0.1 * expected_log_std)
    # The first step of Adam has the length of its rate.
    torch.testing.assert_close(weights.z, (z - 0.02 * expected_z.sign()).detach())
    torch.testing.assert_close(weights.log_std, (log_std - 0.01 * expected_log_std.sign()).detach())
    assert torch.equal(got, sample(weights, 3, 10))


def test_noise_gradients_of_several_draws_can_be_collected():
    one, two = mean_field(), mean_field()
    collected = torch.zeros_like(CENTER)
    ops.add_noise_gradient_(collected, doubles(8), 3, 9)
    one.step_(torch.empty_like(CENTER), doubles(8), kl_weight=0.7, seed=3, draw=9)
    two.step_(torch.empty_like(CENTER), doubles(8), kl_weight=0.7, seed=3, draw=8, noise_grad=collected)
    torch.testing.assert_close(two.log_std, one.log_std)


def test_learning_a_std_that_is_not_used_is_refused():
    with pytest.raises(InputError, match="learn_std needs family='mean_field'"):
        VariationalWeights(CENTER, PRIOR_STD, UpdateRule(), learn_std=True)


@pytest.mark.parametrize("learn_std", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_a_restored_state_goes_on_bit_for_bit(name, learn_std):
    def fresh() -> VariationalWeights:
        return VariationalWeights(
            CENTER.float(), PRIOR_STD.float(), UpdateRule(name, 0.05, 0.9), family="mean_field", learn_std=learn_std
        )

    def advance(weights: VariationalWeights, first: int, last: int) -> None:
        theta = torch.empty(D)
        weights.sample_(theta, 1, first)
        for step in range(first, last):
            weights.step_(theta, grad_mu(theta, step), kl_weight=0.3, seed=1, draw=step, next_draw=step + 1)

    whole, first, second = fresh(), fresh(), fresh()
    advance(whole, 0, 12)
    advance(first, 0, 5)
    state = {key: tensor.clone() for key, tensor in first.state_dict().items()}
    second.load_state_dict(state)
    advance(second, 5, 12)
    assert set(whole.state_dict()) == set(second.state_dict())
    for key, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[key], tensor), key
    # What was restored from must not be written through.
    assert all(torch.equal(state[key], first.state_dict()[key]) for key in state)
