"""The parameters and their gradients are views of the flat buffers, and nothing else of the module changes."""

from __future__ import annotations

import pytest
import torch
from tiny import build_tiny
from torch import nn

from vdu_fast.arena import Arena
from vdu_fast.errors import InputError


def loss_of(module: nn.Module) -> torch.Tensor:
    x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    return module(x, torch.tensor([3])).square().sum()


def copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_moving_into_an_arena_changes_no_value():
    module = build_tiny()
    before, loss = copies(module), loss_of(module)
    arena = Arena(module)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert torch.equal(loss_of(module), loss)
    assert torch.equal(arena.theta, torch.cat([t.flatten() for t in before.values()]))
    assert arena.numel == sum(t.numel() for t in before.values())


def test_parameters_are_views_of_theta():
    module = build_tiny()
    arena = Arena(module)
    arena.theta.fill_(0.25)
    assert all((p == 0.25).all() for p in module.parameters())
    with torch.no_grad():
        module.time.bias.fill_(7.0)
    assert int((arena.theta == 7.0).sum()) == module.time.bias.numel()


def test_gradients_land_in_the_flat_buffer_and_accumulate_there():
    plain, module = build_tiny(), build_tiny()
    loss_of(plain).backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()])
    arena = Arena(module)
    address = arena.grad.data_ptr()
    loss_of(module).backward()
    torch.testing.assert_close(arena.grad, expected)
    loss_of(module).backward()
    torch.testing.assert_close(arena.grad, 2 * expected)
    arena.zero_grad()
    assert not arena.grad.any()
    loss_of(module).backward()
    torch.testing.assert_close(arena.grad, expected)
    assert arena.grad.data_ptr() == address
    assert next(module.parameters()).grad.data_ptr() == address


def test_patterns_choose_the_trainable_parameters_in_the_modules_order():
    assert Arena(build_tiny(), ["time.*", "encode.weight"]).names == ["encode.weight", "time.weight", "time.bias"]
    assert Arena(build_tiny(), ["*.bias"]).names == ["encode.bias", "time.bias", "decode.bias"]
    assert Arena(build_tiny(), ["*", "time.*"]).names == [name for name, _ in build_tiny().named_parameters()]


def test_patterns_are_case_sensitive_and_match_the_whole_name():
    for pattern in ("Time.*", "time", "ime.*"):
        with pytest.raises(InputError, match=r"no parameter name matches .*the names begin with encode\.weight"):
            Arena(build_tiny(), [pattern])


def test_other_parameters_stay_bitwise_and_get_no_gradient():
    module = build_tiny()
    before = copies(module)
    arena = Arena(module, ["decode.*"])
    loss_of(module).backward()
    arena.theta.add_(arena.grad)
    for name, parameter in module.named_parameters():
        if name.startswith("decode."):
            assert not torch.equal(parameter, before[name])
        else:
            assert torch.equal(parameter, before[name])
            assert parameter.grad is None
            assert not parameter.requires_grad


def test_a_tied_parameter_appears_once_and_stays_tied():
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    arena = Arena(module)
    assert arena.names == ["0.weight", "0.bias", "2.bias"]
    assert arena.numel == 16 + 4 + 4
    arena.theta.fill_(0.5)
    assert (module[2].weight == 0.5).all()
    module(torch.ones(1, 4)).sum().backward()
    # Both uses contribute to the one gradient.
    module_of_two = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    with torch.no_grad():
        for parameter in module_of_two.parameters():
            parameter.fill_(0.5)
    module_of_two(torch.ones(1, 4)).sum().backward()
    expected = module_of_two[0].weight.grad + module_of_two[2].weight.grad
    torch.testing.assert_close(arena.grad[:16].reshape(4, 4), expected)
    arena.release()
    assert module[2].weight is module[0].weight


def test_release_gives_parameters_their_own_storage_and_old_flags():
    module = build_tiny()
    module.encode.bias.requires_grad_(False)
    arena = Arena(module, ["encode.*"])
    assert not module.decode.weight.requires_grad
    arena.theta.mul_(2)
    loss_of(module).backward()
    after = copies(module)
    arena.release()
    arena.theta.zero_()
    assert all(torch.equal(p, after[name]) for name, p in module.named_parameters())
    assert {n: p.requires_grad for n, p in module.named_parameters() if not p.requires_grad} == {"encode.bias": False}
    assert all(p.grad is None for p in module.parameters())
    storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert len(storages) == len(list(module.parameters()))


def test_frozen_parameters_are_not_selected_and_all_frozen_is_refused():
    module = build_tiny()
    module.encode.bias.requires_grad_(False)
    arena = Arena(module, ["encode.*"])
    assert arena.names == ["encode.weight"]
    arena.release()
    with pytest.raises(InputError, match=r"all 1 parameters that match .* are frozen"):
        Arena(module, ["encode.bias"])


def test_flatten_lines_named_tensors_up_with_theta():
    module = build_tiny()
    arena = Arena(module, ["*.bias"])
    named = {name: torch.full(p.shape, float(i)) for i, (name, p) in enumerate(module.named_parameters())}
    flat = arena.flatten(named)
    arena.theta.copy_(flat)
    parameters = dict(module.named_parameters())
    for name in arena.names:
        assert torch.equal(parameters[name], named[name])
    assert set(arena.names) == {name for name in parameters if name.endswith(".bias")}


@pytest.mark.parametrize(
    ("dtype", "state"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_state_is_never_narrower_than_float32_or_than_the_module(dtype, state):
    module = build_tiny().to(dtype)
    arena = Arena(module)
    assert arena.theta.dtype == dtype
    assert arena.state_dtype == state
    assert arena.flatten(dict(module.named_parameters())).dtype == state


def test_parameters_of_two_dtypes_are_refused():
    module = build_tiny()
    module.time.bfloat16()
    with pytest.raises(InputError, match=r"must share one device and dtype, got .*bfloat16.*float32"):
        Arena(module)
    Arena(module, ["time.*"])
