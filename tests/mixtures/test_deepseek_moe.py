"""DeepSeekMoE: budget, splitting, losses by hand, the shared part, and copies of trained mixtures."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from notebook_kit import models
from notebook_kit.mixtures import (
    DeepSeekMoE,
    MoE,
    SwiGLU,
    SwiGLUExperts,
    aux_loss,
    device_balance_loss,
    expert_balance_loss,
    join_experts,
    slice_experts,
)
from notebook_kit.models import MLP
from notebook_kit.routers import ExpertChoice, TopK, load_balancing_loss, record_routing

P = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.1, 0.4]])


def one(experts, index, x):
    gate, up = F.linear(x, experts.gate_up[index]).chunk(2, -1)
    return F.linear(experts.activation(gate) * up, experts.down[index])


def by_loop(layer, x):
    """Σ shared + Σ s E, as the paper writes it."""
    s = (x @ layer.router.weight.T).softmax(-1)
    y = torch.zeros_like(x) if layer.shared is None else layer.shared(x)
    for t in range(len(x)):
        for i in s[t].topk(layer.router.k).indices:
            y[t] = y[t] + s[t, i] * one(layer.experts, i, x[t])
    return y


@pytest.mark.parametrize(("granularity", "n_shared"), [(1, 0), (1, 1), (2, 1), (4, 0), (4, 2), (8, 4)])
def test_the_budget_and_the_sum(granularity, n_shared):
    d, D, N, K = 6, 16, 4, 2
    layer = DeepSeekMoE(d, D, N, k=K, granularity=granularity, n_shared=n_shared)
    thin = D // granularity
    routed = layer.experts.down.shape[0] * layer.experts.down.shape[2]
    shared = n_shared * thin
    assert routed + shared == N * D
    assert layer.router.k * thin + shared == K * D
    weights = sum(p.numel() for name, p in layer.named_parameters() if "router" not in name)
    assert weights == 3 * d * N * D
    x = torch.randn(9, d)
    torch.testing.assert_close(layer(x), by_loop(layer, x), atol=1e-5, rtol=1e-4)
    assert layer(x.reshape(3, 3, d)).shape == (3, 3, d)


def test_uncut_and_unshared_is_plain_top_k():
    layer = DeepSeekMoE(6, 8, 5, k=2, granularity=1, n_shared=0)
    plain = MoE(layer.experts, TopK(6, 5, k=2, normalize=False, balance_coef=0.005))
    plain.router.weight = layer.router.weight
    x = torch.randn(20, 6)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.routing.aux_loss, plain.routing.aux_loss)  # 0.01 Σ f P, not times k


def test_combinations():
    assert (math.comb(16, 2), math.comb(64, 8), math.comb(63, 7)) == (120, 4426165368, 553270671)
    layer = DeepSeekMoE(4, 8, 16, k=2, granularity=4, n_shared=1)
    assert (layer.router.n_experts, layer.router.k) == (63, 7)


@given(st.integers(1, 3), st.sampled_from([1, 2, 4, 8]), st.integers(0, 10))
@settings(deadline=None, max_examples=20)
def test_slices_add_up(n_experts, m, seed):
    torch.manual_seed(seed)
    experts, x = SwiGLUExperts(n_experts, 5, 8), torch.randn(7, 5)
    before = copy.deepcopy(experts.state_dict())
    thin = slice_experts(experts, granularity=m)
    for i in range(n_experts):
        total = sum(one(thin, i * m + j, x) for j in range(m))
        torch.testing.assert_close(total, one(experts, i, x), atol=1e-5, rtol=1e-5)
    back = join_experts(thin, m)
    for name, tensor in before.items():
        assert torch.equal(experts.state_dict()[name], tensor)
        assert torch.equal(back.state_dict()[name], tensor)


def test_merged_shared_experts_are_their_sum():
    layer, x = DeepSeekMoE(6, 8, 4, granularity=4, n_shared=3), torch.randn(5, 6)
    one_by_one = 0
    for i in range(3):
        part = SwiGLU(6, 2)
        units = slice(2 * i, 2 * i + 2)
        part.gate_proj.weight.data = layer.shared.gate_proj.weight.data[units]
        part.up_proj.weight.data = layer.shared.up_proj.weight.data[units]
        part.down_proj.weight.data = layer.shared.down_proj.weight.data[:, units]
        one_by_one = one_by_one + part(x)
    torch.testing.assert_close(layer.shared(x), one_by_one, atol=1e-6, rtol=1e-5)


def test_expert_loss_by_hand():
    picks = P.topk(2).indices
    # f = 3/8 (3, 3, 2), P = (.5, .275, .225)
    assert expert_balance_loss(P, picks).item() == pytest.approx(1.040625)
    torch.testing.assert_close(expert_balance_loss(P, picks), load_balancing_loss(P, picks) / 2)
    even = torch.full((4, 4), 0.25)
    every = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]])
    assert expert_balance_loss(even, every).item() == 1
    assert device_balance_loss(even, every, device_groups=2).item() == 1


def test_device_loss():
    p, picks = torch.randn(30, 6).softmax(1), torch.randn(30, 6).topk(2).indices
    torch.testing.assert_close(device_balance_loss(p, picks, device_groups=6), expert_balance_loss(p, picks))
    torch.testing.assert_close(device_balance_loss(p, picks), torch.tensor(1.0))
    f = torch.bincount(picks.flatten(), minlength=6) * 6 / (2 * 30)  # as the paper writes it
    by_hand = (f.view(3, 2).mean(1) * p.mean(0).view(3, 2).sum(1)).sum()
    torch.testing.assert_close(device_balance_loss(p, picks, device_groups=3), by_hand)
    mask = torch.arange(30) < 12
    hidden = picks.where(mask[:, None], -1)
    expected = device_balance_loss(p[:12], picks[:12], device_groups=3)
    torch.testing.assert_close(device_balance_loss(p, hidden, device_groups=3, mask=mask), expected)
    assert device_balance_loss(p[:0], picks[:0]).item() == 0
    with pytest.raises(ValueError, match="must divide the 6 routed experts, got 4"):
        device_balance_loss(p, picks, device_groups=4)


def test_both_losses_reach_the_model():
    settings_ = {"balance_coef": 0.02, "device_coef": 0.05, "device_groups": 5}
    layer = DeepSeekMoE(6, 8, 4, granularity=4, n_shared=1, **settings_)
    layer(torch.randn(2, 8, 6))
    routing = layer.routing
    expert = 0.02 * expert_balance_loss(routing.probs, routing.experts)
    device = 0.05 * device_balance_loss(routing.probs, routing.experts, device_groups=5)
    torch.testing.assert_close(aux_loss(layer), expert + device)
    aux_loss(layer).backward()
    assert layer.router.weight.grad.any()
    assert layer.experts.down.grad is None


def test_the_shared_part_does_not_see_the_gate():
    layer, x = DeepSeekMoE(6, 8, 4, n_shared=2), torch.randn(5, 6)
    layer.experts.down.data.zero_()
    before = layer(x)
    layer.router.weight.data.normal_()
    assert torch.equal(layer(x), before)
    assert torch.equal(before, layer.shared(x))


def test_a_zero_gate_gives_the_mean_of_its_picks():
    layer, x = DeepSeekMoE(6, 8, 4, granularity=2, n_shared=1), torch.randn(5, 6)
    layer.router.weight.data.zero_()
    y = layer(x) - layer.shared(x)
    assert layer.routing.experts.tolist() == [[0, 1, 2]] * 5  # ties go to the lowest
    torch.testing.assert_close(layer.routing.weights, torch.full((5, 3), 1 / 7))
    torch.testing.assert_close(y, sum(one(layer.experts, i, x) for i in range(3)) / 7)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("granularity", [1, 2, 8])
def test_cutting_a_trained_mixture_changes_nothing(normalize, granularity):
    moe = MoE(SwiGLUExperts(5, 6, 8), TopK(6, 5, k=2, normalize=normalize))
    moe.router.weight.data.normal_()
    layer, x = DeepSeekMoE.from_moe(moe, granularity), torch.randn(30, 6)
    torch.testing.assert_close(layer(x), moe(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.routing.aux_loss, moe.routing.aux_loss)
    assert layer.router.k == 2 * granularity


def test_padding_gets_nothing_and_counts_nowhere():
    layer, x = DeepSeekMoE(6, 8, 4, n_shared=1, device_coef=0.1, device_groups=3), torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    y = layer(x, mask=mask)
    loss = layer.routing.aux_loss
    assert (y[~mask] == 0).all()
    torch.testing.assert_close(layer(x[mask]), y[mask])
    torch.testing.assert_close(layer.routing.aux_loss, loss)
    assert layer(torch.randn(0, 6)).shape == (0, 6)
    assert layer(torch.randn(6)).shape == (6,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer, x = DeepSeekMoE(6, 8, 4, n_shared=1).eval(), torch.randn(9, 6)
    expected = layer(x)
    half = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0.1)


def test_the_loss_free_variant_moves_its_bias():
    layer = DeepSeekMoE(6, 8, 4, scores="sigmoid", normalize=True, bias_rate=0.01)
    layer(torch.randn(50, 6))
    assert layer.router.bias.any()
    still = DeepSeekMoE(6, 8, 4)
    still(torch.randn(50, 6))
    assert not still.router.bias.any()


def test_it_trains_copies_and_is_recorded():
    layer, x = DeepSeekMoE(6, 8, 4, shared_gate=True), torch.randn(30, 6)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (layer.router.weight, layer.shared_gate.weight))
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    model = nn.Sequential(layer)
    with torch.no_grad(), record_routing(model) as trace:
        model(x)
    assert torch.equal(trace.layer(0).experts, layer.routing.experts)


def test_bad_input():
    with pytest.raises(ValueError, match="granularity must divide d_ff=10, got 4"):
        DeepSeekMoE(6, 10, 4)
    with pytest.raises(ValueError, match="got 1·4 - 4 = 0"):
        DeepSeekMoE(6, 8, 4, k=1, n_shared=4)
    with pytest.raises(ValueError, match="must leave 1 to 15 picks"):
        DeepSeekMoE(6, 8, 4, k=5)
    with pytest.raises(ValueError, match="device_groups must divide the 15 routed experts, got 2"):
        DeepSeekMoE(6, 8, 4, device_groups=2)
    with pytest.raises(ValueError, match="routed_scaling_factor must be in"):
        DeepSeekMoE(6, 8, 4, routed_scaling_factor=-1.0)
    with pytest.raises(ValueError, match="granularity must divide the width 8 of an expert, got 3"):
        slice_experts(SwiGLUExperts(2, 4, 8), granularity=3)
    with pytest.raises(ValueError, match="must divide the 2 experts, got 3"):
        join_experts(SwiGLUExperts(2, 4, 8), 3)
    with pytest.raises(ValueError, match="fused `experts` and `shared_experts`, it has gate, experts"):
        DeepSeekMoE.from_transformers(models.tiny_mixtral().model.layers[0].mlp)
    with pytest.raises(ValueError, match="got ModuleList behind TopK"):
        DeepSeekMoE.from_moe(MoE([MLP([6, 6])] * 2, TopK(6, 2)))
    with pytest.raises(ValueError, match="SwiGLUExperts behind ExpertChoice"):
        DeepSeekMoE.from_moe(MoE(SwiGLUExperts(2, 6, 8), ExpertChoice(6, 2)))
    with pytest.raises(ValueError, match="capacity_factor"):
        DeepSeekMoE.from_moe(MoE(SwiGLUExperts(2, 6, 8), TopK(6, 2, capacity_factor=1.0)))
    with pytest.raises(ValueError, match="capacity_factor"):
        DeepSeekMoE.from_moe(MoE(SwiGLUExperts(2, 6, 8), TopK(6, 2, eval_capacity_factor=1.0)))
