"""One expert becomes N: masks, copies, and what the optimiser remembers."""

import pytest
import torch

from notebook_kit.mixtures import inherit_moments, spawn_experts
from notebook_kit.models import MLP, tiny_llama


def trained(steps=3):
    expert = MLP([6, 9, 6])
    optimizer = torch.optim.AdamW(expert.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        expert(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    return expert, optimizer


def test_each_copy_keeps_its_own_share_of_the_weights():
    expert = MLP([64, 64, 64])
    before = [p.clone() for p in expert.parameters()]
    experts = spawn_experts(expert, 3, mask_rate=0.3, seed=1)
    w0 = expert.layers[0].weight
    masks = [e.layers[0].weight != 0 for e in experts]
    for e, mask in zip(experts, masks, strict=True):
        assert torch.equal(e.layers[0].weight[mask], w0[mask])
        assert mask.float().mean().item() == pytest.approx(0.7, abs=0.03)
        assert torch.equal(e.layers[0].bias, expert.layers[0].bias)
    assert not torch.equal(masks[0], masks[1])
    assert all(torch.equal(a, b) for a, b in zip(before, expert.parameters(), strict=True))
    again = spawn_experts(expert, 3, mask_rate=0.3, seed=1)
    assert torch.equal(again[2].layers[1].weight, experts[2].layers[1].weight)


def test_without_a_mask_all_are_equal_and_apart():
    expert, x = MLP([6, 9, 6]), torch.randn(4, 6)
    experts = spawn_experts(expert, 2, mask_rate=0.0)
    assert all(torch.equal(e(x), expert(x)) for e in experts)
    experts[0].layers[0].weight.data.zero_()
    assert torch.equal(experts[1](x), expert(x))


def test_any_module_and_dtype_can_be_spawned():
    mlp = tiny_llama().model.layers[0].mlp.to(torch.bfloat16)
    spawned = spawn_experts(mlp, 2)
    assert spawned[0].gate_proj.weight.dtype == torch.bfloat16
    assert (spawned[0].gate_proj.weight == 0).any()


def test_copies_inherit_the_moments():
    expert, old = trained()
    experts = spawn_experts(expert, 3)
    new = torch.optim.AdamW(experts.parameters(), lr=0.01)
    assert inherit_moments(old, expert, experts, new) == 12
    state = old.state[expert.layers[0].weight]
    for e in experts:
        mine = new.state[e.layers[0].weight]
        assert torch.equal(mine["exp_avg"], state["exp_avg"])
        assert mine["step"] == 3
        assert mine["exp_avg"] is not state["exp_avg"]
    experts[0](torch.randn(2, 6)).sum().backward()
    new.step()
    assert new.state[experts[0].layers[0].weight]["step"] == 4
    assert old.state[expert.layers[0].weight]["step"] == 3


def test_the_same_optimizer_may_take_the_copies_in():
    expert, optimizer = trained()
    experts = spawn_experts(expert, 2)
    optimizer.add_param_group({"params": list(experts.parameters())})
    assert inherit_moments(optimizer, expert, experts, optimizer) == 8


def test_bad_input():
    with pytest.raises(ValueError, match="n_experts must be at least 1, got 0"):
        spawn_experts(MLP([2, 2]), 0)
    with pytest.raises(ValueError, match=r"mask_rate must be in \[0, 0.99\], got 1"):
        spawn_experts(MLP([2, 2]), 2, mask_rate=1.0)
    expert, old = trained()
    with pytest.raises(ValueError, match=r"does not hold layers.0.weight of expert 0"):
        inherit_moments(old, expert, spawn_experts(expert, 1), old)
    with pytest.raises(ValueError, match="expert 0 has other parameters"):
        inherit_moments(old, expert, [MLP([2, 2])], old)
