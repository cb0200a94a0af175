"""VariationalOptimizer is VariationalWeights for anyone's loop, and a torch optimizer in everything else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from vdu_fast import ops
from vdu_fast.arena import Arena
from vdu_fast.errors import InputError
from vdu_fast.optim import UpdateRule, VariationalOptimizer, VariationalWeights
from vdu_fast.posterior import GaussianPosterior

RULES = ["natural", "natural_sign", "natural_adam", "adam"]


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return net.to(dtype)


def posterior(net: nn.Module) -> GaussianPosterior:
    generator = torch.Generator().manual_seed(1)
    return GaussianPosterior({n: torch.rand(p.shape, generator=generator) * 0.05 for n, p in net.named_parameters()})


def loss(net: nn.Module, step: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    dtype = next(net.parameters()).dtype
    x, y = torch.randn(8, 5, generator=generator).to(dtype), torch.randn(8, 3, generator=generator).to(dtype)
    return functional.mse_loss(net(x), y)


def train(net: nn.Module, optimizer: VariationalOptimizer, first: int = 0, last: int = 6) -> None:
    for step in range(first, last):
        with optimizer.sampled_weights():
            loss(net, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def flat(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learn_std", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_it_makes_the_steps_of_the_flat_weights_bit_for_bit(rule, learn_std, dtype):
    net, other = network(dtype), network(dtype)
    options = {"rule": rule, "lr": 0.03, "kl_weight": 0.01, "momentum": 0.5, "learn_std": learn_std}
    train(net, VariationalOptimizer(net.named_parameters(), posterior(net), seed=4, **options))

    arena = Arena(other)
    std = arena.flatten(posterior(other).std)
    weights = VariationalWeights(
        arena.theta.to(arena.state_dtype, copy=True), std, UpdateRule(rule, 0.03, 0.5), family="mean_field",
        learn_std=learn_std,
    )  # fmt: skip
    for step in range(6):
        weights.sample_(arena.theta, 4, step)
        arena.zero_grad()
        loss(other, step).backward()
        weights.step_(arena.theta, arena.grad, kl_weight=0.01, seed=4, draw=step, next_draw=step + 1)
    weights.mean_(arena.theta)
    assert torch.equal(flat(net), arena.theta)
    assert not torch.equal(flat(net), flat(network(dtype)))


def test_inside_are_sampled_weights_and_outside_is_the_mean():
    net = network()
    optimizer = VariationalOptimizer(net.named_parameters(), posterior(net), seed=4)
    before, std = flat(net), torch.cat([s.reshape(-1) for s in posterior(net).std.values()])
    with optimizer.sampled_weights():
        first = flat(net)
    with optimizer.sampled_weights():
        second = flat(net)
    assert torch.equal(first, ops.sample_whitened_weights(before, std, torch.zeros_like(std), 4, 0))
    assert not torch.equal(first, second)
    assert torch.equal(flat(net), before)


def test_an_error_inside_leaves_the_mean_behind():
    net = network()
    optimizer = VariationalOptimizer(net.named_parameters(), posterior(net))
    before = flat(net)
    with pytest.raises(KeyError), optimizer.sampled_weights():
        raise KeyError
    assert torch.equal(flat(net), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learn_std", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_leaving_the_draw_until_step_gives_the_same_bits(rule, learn_std, dtype):
    nets = network(dtype), network(dtype)
    optimizers = [
        VariationalOptimizer(
            net.named_parameters(), posterior(net), rule=rule, kl_weight=0.01, momentum=0.5, learn_std=learn_std
        )
        for net in nets
    ]
    for step in range(4):
        for net, optimizer, restore in zip(nets, optimizers, (True, False), strict=True):
            with optimizer.sampled_weights(restore=restore):
                inside = flat(net)
                loss(net, step).backward()
            assert torch.equal(flat(net), inside) is not restore
            optimizer.step()
        assert torch.equal(flat(nets[0]), flat(nets[1]))
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert all(torch.equal(optimizers[0].state[p][name], t) for name, t in optimizers[1].state[q].items())
            p.grad = q.grad = None  # not by zero_grad: step() alone must have ended the draw


def test_a_draw_that_was_left_gives_way_to_the_next_and_both_count():
    nets = network(), network()
    for net, restore in zip(nets, (True, False), strict=True):
        optimizer = VariationalOptimizer(net.named_parameters(), posterior(net))
        for step in range(2):
            with optimizer.sampled_weights(restore=restore):
                loss(net, step).backward()
        optimizer.step()
        assert optimizer.param_groups[0]["draws"] == 2
    assert torch.equal(flat(nets[0]), flat(nets[1]))


def test_a_draw_that_was_left_ends_with_a_skipped_step_an_error_or_a_block_that_restores():
    net = network()
    optimizer = VariationalOptimizer(net.named_parameters(), posterior(net), learn_std=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = flat(net)
    with optimizer.sampled_weights(restore=False):
        (scaler.scale(loss(net)) * float("inf")).backward()
        optimizer.zero_grad(set_to_none=False)  # inside the draw stays
        assert not torch.equal(flat(net), before)
    (scaler.scale(loss(net)) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(flat(net), before)
    optimizer.zero_grad()
    assert torch.equal(flat(net), before)
    with pytest.raises(KeyError), optimizer.sampled_weights(restore=False):
        raise KeyError
    assert torch.equal(flat(net), before)
    optimizer.zero_grad()
    with optimizer.sampled_weights(restore=False):
        pass
    optimizer.zero_grad()
    with optimizer.sampled_weights():
        pass
    with torch.no_grad():
        net[0].weight.zero_()
    optimizer.zero_grad()
    assert not net[0].weight.any()  # nothing was left to write back


def test_step_ends_the_draw_in_parameters_without_a_gradient_too():
    net = network()
    optimizer = VariationalOptimizer(net.named_parameters(), posterior(net))
    bias, before = net[0].bias, net[0].bias.detach().clone()
    with optimizer.sampled_weights(restore=False):
        loss(net).backward()
    bias.grad = None
    assert not torch.equal(bias, before)
    optimizer.step()
    assert torch.equal(bias, before)


def test_at_the_mean_natural_adam_is_torch_adam_on_the_whitened_weights():
    net, other = network(torch.float64), network(torch.float64)
    optimizer = VariationalOptimizer(net.parameters(), 0.5, lr=0.01, noise_scale=0)
    # With one sigma* for all, whitening scales the gradient, which Adam ignores, and the step, which is lr sigma*.
    adam = torch.optim.Adam(other.parameters(), lr=0.005, betas=(0.9, 0.99), eps=1e-12)
    for step in range(20):
        for model, opt in ((net, optimizer), (other, adam)):
            opt.zero_grad()
            loss(model, step).backward()
            opt.step()
    torch.testing.assert_close(flat(net), flat(other), rtol=1e-7, atol=1e-9)


def test_a_closure_is_called_with_gradients_and_its_loss_comes_back():
    net = network()
    optimizer = VariationalOptimizer(net.named_parameters(), posterior(net))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        with optimizer.sampled_weights():
            value = loss(net)
            value.backward()
        return value

    before = flat(net)
    assert float(optimizer.step(closure).detach()) > 0
    assert not torch.equal(flat(net), before)


def test_groups_have_their_own_rates_and_schedulers_move_them():
    net = network()
    groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters(), "lr": 0.0}]
    optimizer = VariationalOptimizer(groups, 0.01, noise_scale=0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    frozen, before = net[2].weight.detach().clone(), net[0].weight.detach().clone()
    train(net, optimizer, 0, 1)
    scheduler.step()
    assert torch.equal(net[2].weight, frozen)
    assert not torch.equal(net[0].weight, before)
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_parameters_without_a_gradient_stay_and_do_not_shift_the_noise_of_others():
    net, other = network(), network()
    options = {"rule": "natural", "lr": 1.0, "learn_std": True, "std_lr": 0.1}
    whole, partial = (VariationalOptimizer(n.named_parameters(), posterior(n), **options) for n in (net, other))
    for model, optimizer in ((net, whole), (other, partial)):
        with optimizer.sampled_weights():
            loss(model).backward()
    other[0].bias.grad = None
    bias = other[0].bias.detach().clone()
    whole.step()
    partial.step()
    assert torch.equal(other[0].bias, bias)
    for name in ("0.weight", "2.weight", "2.bias"):
        assert torch.equal(net.get_parameter(name), other.get_parameter(name))
        mine, theirs = net.get_parameter(name), other.get_parameter(name)
        assert torch.equal(whole.state[mine]["log_std"], partial.state[theirs]["log_std"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_state_goes_on_bit_for_bit(dtype):
    def fresh() -> tuple[nn.Module, VariationalOptimizer]:
        net = network(dtype)
        return net, VariationalOptimizer(net.named_parameters(), posterior(net), learn_std=True, kl_weight=0.1)

    net, optimizer = fresh()
    train(net, optimizer, 0, 3)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, 3, 6)
    other, restored = fresh()
    other.load_state_dict(weights)
    restored.load_state_dict(state)
    assert all(t.dtype == torch.float32 for s in restored.state.values() for t in s.values())
    train(other, restored, 3, 6)
    assert torch.equal(flat(net), flat(other))


def test_grad_scaler_skips_a_step_with_infinite_gradients_and_unscales_the_others():
    net, other = network(), network()
    optimizer, plain = (VariationalOptimizer(n.parameters(), 0.01, noise_scale=0, rule="natural") for n in (net, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss(net)).backward()
    scaler.step(optimizer)
    scaler.update()
    loss(other).backward()
    plain.step()
    torch.testing.assert_close(flat(net), flat(other), rtol=1e-6, atol=0)
    before = flat(net)
    optimizer.zero_grad()
    (scaler.scale(loss(net)) * float("inf")).backward()
    scaler.step(optimizer)
    assert torch.equal(flat(net), before)


def test_the_kl_is_that_of_the_two_gaussians():
    net = network()
    optimizer = VariationalOptimizer(net.named_parameters(), posterior(net), learn_std=True, lr=0.5)
    assert optimizer.kl() == pytest.approx(0, abs=1e-4)
    center, std = flat(net), torch.cat([s.reshape(-1) for s in posterior(net).std.values()])
    train(net, optimizer)
    log_std = torch.cat([optimizer.state[p]["log_std"].reshape(-1) for p in net.parameters()])
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(flat(net), log_std.exp()), normal(center, std)).sum()
    assert optimizer.kl() == pytest.approx(float(expected), rel=1e-4)


def test_misuse_is_an_error_that_says_what_to_do():
    net = network()
    with pytest.raises(InputError, match=r"pass model\.named_parameters"):
        VariationalOptimizer(net.parameters(), posterior(net))
    with pytest.raises(InputError, match=r"rule must be one of natural, .* got 'sgd'"):
        VariationalOptimizer(net.parameters(), 0.1, rule="sgd")
    with pytest.raises(InputError, match="lr must be 0 or a positive number, got -1"):
        VariationalOptimizer(net.parameters(), 0.1, lr=-1)
    with pytest.raises(InputError, match="posterior must be a GaussianPosterior or a positive number, got 0"):
        VariationalOptimizer(net.parameters(), 0)
    with pytest.raises(InputError, match="learn_std needs noise_scale above 0"):
        VariationalOptimizer(net.parameters(), 0.1, learn_std=True, noise_scale=0)
    with pytest.raises(InputError, match="absent from it"):
        VariationalOptimizer(net.named_parameters(), GaussianPosterior({}))
    optimizer = VariationalOptimizer(net.parameters(), 0.1, learn_std=True)
    with optimizer.sampled_weights():
        pass
    with pytest.raises(InputError, match="call step"), optimizer.sampled_weights():
        pass


def test_a_draw_whose_step_was_skipped_does_not_stop_the_training():
    net = network()
    optimizer = VariationalOptimizer(net.parameters(), 0.1, learn_std=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        with optimizer.sampled_weights():
            (scaler.scale(loss(net)) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.param_groups[0]["steps"] == 1


def test_draws_and_steps_out_of_order_are_refused():
    net = network()
    optimizer = VariationalOptimizer(net.parameters(), 0.1, learn_std=True)
    loss(net).backward()
    with pytest.raises(InputError, match="take the gradient in sampled_weights"):
        optimizer.step()
    before = flat(net)
    with optimizer.sampled_weights(), pytest.raises(InputError, match="cannot be nested"), optimizer.sampled_weights():
        pass
    assert torch.equal(flat(net), before)
    optimizer.zero_grad()
    with pytest.raises(InputError, match="inside sampled_weights"), optimizer.sampled_weights():
        optimizer.step()


def test_the_seed_travels_with_the_state():
    net, other = network(), network()
    seeded = VariationalOptimizer(net.parameters(), 0.1, seed=5)
    restored = VariationalOptimizer(other.parameters(), 0.1, seed=0)
    restored.load_state_dict(seeded.state_dict())
    with seeded.sampled_weights(), restored.sampled_weights():
        assert torch.equal(flat(net), flat(other))


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"betas": (1.0, 0.9)}, "betas must be in"),
        ({"momentum": -1.0}, "momentum must be in"),
        ({"learn_std": True, "noise_scale": 0.0}, "learn_std needs noise_scale"),
        (
            {"params": [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2).bfloat16())]},
            "share one device and dtype",
        ),
    ],
)
def test_a_group_that_cannot_work_is_refused_and_leaves_the_optimizer_as_it_was(group, says):
    net = network()
    optimizer = VariationalOptimizer(net.parameters(), 0.1)
    with pytest.raises(InputError, match=says):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **group})
    assert len(optimizer.param_groups) == 1
    with optimizer.sampled_weights():
        pass
