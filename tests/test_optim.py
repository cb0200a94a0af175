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
    for step in range(steps):
        weights.step(weights.whitened_gradient(grad_mu(weights.mean, step), kl_weight))
    return weights.mean


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
        weights.step(grad)
    assert weights.z[0] < 0
    assert not weights.z[1:].any()


def test_without_momentum_no_buffer_is_kept():
    weights = VariationalWeights(CENTER, PRIOR_STD, UpdateRule("natural", 0.1))
    weights.step(torch.ones(D, dtype=torch.float64))
    assert set(weights.state_dict()) == {"z", "moments.count"}


def test_the_mean_starts_at_the_centre():
    weights = VariationalWeights(CENTER, PRIOR_STD, UpdateRule())
    assert torch.equal(weights.mean, CENTER)
    assert float(weights.kl()) == 0


def test_the_kl_is_that_of_the_two_gaussians_whether_or_not_sigma_moves():
    fixed = VariationalWeights(CENTER, PRIOR_STD, UpdateRule(), family="mean_field")
    learned = VariationalWeights(CENTER, PRIOR_STD, UpdateRule(), family="mean_field", learn_std=True)
    for weights in (fixed, learned):
        weights.z = doubles(4)
        expected = ops.gaussian_kl(weights.mean, PRIOR_STD.log(), CENTER, PRIOR_STD)
        torch.testing.assert_close(weights.kl(), expected)
    learned.log_std = doubles(6) - 2
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(learned.mean, learned.log_std.exp()), torch.distributions.Normal(CENTER, PRIOR_STD)
    ).sum()
    torch.testing.assert_close(learned.kl(), expected)


def test_mean_only_evaluates_the_network_at_the_mean():
    weights = VariationalWeights(CENTER, PRIOR_STD, UpdateRule())
    weights.z = doubles(4)
    assert torch.equal(weights.sample(3, 9), weights.mean)


def test_mean_field_samples_are_mean_plus_std_times_regenerated_noise():
    weights = VariationalWeights(CENTER, PRIOR_STD, UpdateRule(), family="mean_field", learn_std=True)
    weights.z, weights.log_std = doubles(4), doubles(6) - 2
    n = standard_normal(D, 3, 9, stream=Stream.WEIGHTS).double()
    torch.testing.assert_close(weights.sample(3, 9), weights.mean + weights.log_std.exp() * n)
    assert torch.equal(weights.sample(3, 9), weights.sample(3, 9))
    assert not torch.equal(weights.sample(3, 9), weights.sample(3, 10))
    assert not torch.equal(weights.sample(3, 9), weights.sample(4, 9))


def test_gradients_of_z_and_log_std_are_those_of_autograd():
    """The noise that std_gradient regenerates is that of the sample, and both chain rules are right."""
    weights = VariationalWeights(CENTER, PRIOR_STD, UpdateRule(), family="mean_field", learn_std=True)
    weights.z, weights.log_std = doubles(4), doubles(6) - 2
    n = standard_normal(D, 3, 9, stream=Stream.WEIGHTS).double()
    z, log_std = weights.z.clone().requires_grad_(), weights.log_std.clone().requires_grad_()
    theta = CENTER + PRIOR_STD * z + log_std.exp() * n
    loss = (theta**3).sum() + 0.7 * ops.gaussian_kl(CENTER + PRIOR_STD * z, log_std, CENTER, PRIOR_STD)
    expected_z, expected_log_std = torch.autograd.grad(loss, (z, log_std))
    grad_theta = 3 * weights.sample(3, 9) ** 2
    torch.testing.assert_close(weights.whitened_gradient(grad_theta, 0.7), expected_z)
    torch.testing.assert_close(weights.std_gradient(grad_theta, 0.7, 3, 9), expected_log_std)


def test_learned_std_starts_at_the_priors_and_moves_by_its_own_rate():
    weights = VariationalWeights(
        CENTER, PRIOR_STD, UpdateRule(), family="mean_field", learn_std=True, std_learning_rate=0.01
    )
    torch.testing.assert_close(weights.log_std, PRIOR_STD.log())
    weights.step(torch.zeros(D).double(), torch.where(doubles(7) > 0, 1.0, -1.0).double())
    # The first step of Adam has the length of its rate.
    torch.testing.assert_close(weights.log_std, PRIOR_STD.log() - 0.01 * doubles(7).sign())


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
        for step in range(first, last):
            grad = grad_mu(weights.sample(1, step), step)
            grad_std = weights.std_gradient(grad, 0.3, 1, step) if learn_std else None
            weights.step(weights.whitened_gradient(grad, 0.3), grad_std)

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
