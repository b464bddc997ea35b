"""The union of experts: equality with the dense layer, who takes what by hand, causality, what the gate learns."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from notebook_kit.mixtures import MLPSlices, SelectiveAttention, SwiGLU, UnionOfExperts
from notebook_kit.mixtures.patches import gather_slots
from notebook_kit.models import MLP
from notebook_kit.routing import aux_loss
from tests.untyped import untyped

MODES = ["weight", "select", "sum"]


def union(**settings_):
    return UnionOfExperts(MLP([8, 16, 8], "gelu"), **settings_)


def attention(**settings_):
    return SelectiveAttention(nn.MultiheadAttention(8, 4, batch_first=True), **settings_)


LAYERS = {"mlp": union, "attention": attention}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@layers
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("patch_size", [1, 3])
@torch.no_grad()
def test_all_experts_and_a_zero_gate_are_the_dense_layer(make, mode, patch_size):
    layer, x = make(k=4, gate_mode=mode, patch_size=patch_size), torch.randn(3, 10, 8)
    layer.gate.router.weight.zero_()
    dense = layer.to_dense()
    expected = dense(x) if isinstance(dense, MLP) else dense(x, x, x)[0]
    torch.testing.assert_close(layer(x), expected, atol=2e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("selection", ["expert", "both"])
def test_every_selection_with_everything_chosen(selection):
    dense, x = SwiGLU(8, 16), torch.randn(3, 10, 8)
    layer = UnionOfExperts(dense, k=4, selection=selection, gate_mode="select")
    torch.testing.assert_close(layer(x), dense(x), atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_dropping_an_expert_is_zeroing_its_units():
    dense, x = MLP([8, 16, 8]), torch.randn(2, 5, 8)
    layer = UnionOfExperts(dense, k=4, gate_mode="select")
    layer.slices.w_out[2].zero_()
    layer.slices.b_out[2].zero_()
    dense.layers[1].weight[:, 8:12] = 0  # units 2 · 4 to 3 · 4
    dense.layers[1].bias.mul_(3 / 4)
    torch.testing.assert_close(layer(x), dense(x))


@torch.no_grad()
def test_dropping_a_head_is_zeroing_its_columns():
    dense, x = nn.MultiheadAttention(8, 4, batch_first=True), torch.randn(2, 5, 8)
    layer = SelectiveAttention(dense, k=4, gate_mode="select")
    layer.w_out[1].zero_()
    dense.out_proj.weight[:, 2:4] = 0
    torch.testing.assert_close(layer(x), dense(x, x, x)[0])


def with_gates(gates, **settings_):
    """A layer of two experts whose gate gives these probabilities to three patches of two tokens."""
    logits = torch.tensor(gates).log()
    x = torch.zeros(1, 6, 8)
    x[0, :, :2] = logits.repeat_interleave(2, 0)
    x[0, :, 2:] = torch.randn(6, 6)
    layer = UnionOfExperts(MLP([8, 16, 8]), n_experts=2, patch_size=2, **settings_)
    layer.gate.router.weight.data = torch.eye(2, 8)
    return layer, x


GATES = [[0.6, 0.4], [0.7, 0.3], [0.2, 0.8]]


@torch.no_grad()
def test_three_patches_by_hand():
    layer, x = with_gates(GATES, k=1, gate_mode="select")
    y = layer(x)
    assert layer.gate.taken[0].tolist() == [[True, False], [True, False], [False, True]]
    assert layer.rows == 2 * 2 * 2  # two experts, c = 2 patches each (one a filler), two tokens a patch
    a, b = layer.slices(x.expand(2, 6, 8))
    torch.testing.assert_close(y[0], torch.cat([a[:4], b[4:]]))  # the filler adds nothing
    weighted, _ = with_gates(GATES, k=1)
    weighted.slices = layer.slices
    counts = torch.tensor([1.2, 1.4, 1.6]).repeat_interleave(2)[:, None]  # n g
    torch.testing.assert_close(weighted(x)[0], counts * y[0])


@torch.no_grad()
def test_a_patch_of_two_experts_gets_the_sum_and_a_crowded_one_is_turned_away():
    layer, x = with_gates(GATES, k=2, gate_mode="select")
    a, b = layer.slices(x.expand(2, 6, 8))
    torch.testing.assert_close(layer(x)[0], a + b)
    tight, _ = with_gates(GATES, k=1, gate_mode="select", capacity_factor=0.5)  # c = ceil(3/2 · 0.5) = 1
    tight.slices = layer.slices
    y = tight(x)[0]
    assert tight.gate.taken[0].tolist() == [[False, False], [True, False], [False, True]]  # .7 is surer than .6
    assert (y[:2] == 0).all()  # only its residual is left
    causal, _ = with_gates(GATES, k=1, gate_mode="select", capacity_factor=0.5, causal=True)
    causal(x)
    assert causal.gate.taken[0].tolist() == [[True, False], [False, False], [False, True]]  # the first comes first


def test_slots_keep_their_order():
    taken = torch.tensor([[[1, 0], [0, 1], [1, 0], [1, 1]]]).bool()
    ids, real = gather_slots(taken)
    assert ids[:, 0].tolist() == [[0, 2, 3], [1, 3, 0]]
    assert real[:, 0].tolist() == [[True, True, True], [True, True, False]]
    assert gather_slots(taken[:, :0])[0].shape == (2, 1, 0)


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([None, 0.25, 0.5, 1.0]), st.booleans(), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_no_token_sees_a_later_one(k, patch_size, capacity_factor, is_attention, seed):
    torch.manual_seed(seed)
    make = attention if is_attention else union
    layer = make(k=k, patch_size=patch_size, capacity_factor=capacity_factor, causal=True)
    layer.gate.router.weight.data.normal_()
    x = torch.randn(2, 9, 8)
    changed = x.clone()
    j = seed % 9
    changed[:, j] += torch.randn(8)
    with torch.no_grad():
        torch.testing.assert_close(layer(changed)[:, :j], layer(x)[:, :j])


@layers
@torch.no_grad()
def test_capacity_is_never_exceeded(make):
    layer = make(k=2, capacity_factor=0.5)
    layer.gate.router.weight.normal_()
    layer(torch.randn(3, 16, 8))
    assert layer.gate.taken.sum(1).max() <= 4  # 2 · 16 / 4 · 0.5
    assert layer.gate.taken.sum(2).max() <= 2


@layers
@torch.no_grad()
def test_padding(make):
    layer, x = make(k=2, patch_size=2), torch.randn(2, 7, 8)
    layer.gate.router.weight.normal_()
    mask = torch.tensor([[1] * 5 + [0] * 2, [1] * 7]).bool()
    y = layer(x, mask=mask)
    assert (y[~mask] == 0).all()
    torch.testing.assert_close(y[:1, :5], layer(x[:1, :5]))
    assert layer(x[:0]).shape == (0, 7, 8)
    assert layer(x[:, :1]).shape == (2, 1, 8)
    assert (layer(x, mask=torch.zeros_like(mask)) == 0).all()


def gate_gradient(layer, x):
    layer(x).square().sum().backward()
    grad = layer.gate.router.weight.grad
    return 0.0 if grad is None else grad.norm().item()


@layers
def test_what_each_gate_mode_teaches_the_gate(make):
    x = torch.randn(4, 12, 8)
    norms = {mode: gate_gradient(make(gate_mode=mode, k=2), x) for mode in MODES}
    assert norms["select"] == 0
    assert norms["sum"] < 1e-5
    assert norms["weight"] > 1e-2


@torch.no_grad()
def test_expert_selection_by_hand():
    layer = UnionOfExperts(MLP([8, 16, 8]), n_experts=2, k=1, selection="expert", gate_mode="select")
    layer.gate.sample_router.weight.copy_(torch.eye(2, 8))
    x = torch.randn(2, 5, 8)
    x[0, :, :2] = torch.tensor([1.0, 0])
    x[1, :, :2] = torch.tensor([0.0, 1])
    a, b = layer.slices(x.reshape(1, 10, 8).expand(2, 10, 8)).unflatten(1, (2, 5))
    torch.testing.assert_close(layer(x), torch.stack([a[0], b[1]]))
    assert layer.rows == 10  # half of 2 · 10


def test_both_selections_together():
    layer = union(k=1, k_sample=2, selection="both")
    for router in (layer.gate.router, layer.gate.sample_router):
        router.weight.data.normal_()
    x = torch.randn(6, 10, 8)
    layer(x).square().sum().backward()
    taken = layer.gate.taken
    assert (taken.sum(2) == 1).all()
    assert taken.any(1).sum(1).max() <= 2  # a sample's patches stay with its two experts
    assert layer.gate.router.weight.grad.norm() > 1e-2
    assert layer.gate.sample_router.weight.grad.norm() > 1e-2
    assert aux_loss(layer) == 0
    layer.gate.router.weight.data.zero_()
    layer.gate.sample_router.weight.data.zero_()
    select = copy.deepcopy(layer)
    select.gate.gate_mode = "select"
    torch.testing.assert_close(layer(x), select(x))  # zero gates: every answer counts 1


@layers
def test_each_part_gets_a_gradient_and_copies_agree(make):
    layer, x = make(k=2), torch.randn(4, 10, 8)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    assert len(layer.gate.routing) == 40


@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(make, dtype):
    layer, x = make(k=4), torch.randn(2, 9, 8)
    half = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), layer(x), atol=0.1, rtol=0.1)


@torch.no_grad()
def test_rows_and_pairs_fall_with_the_capacity():
    mlp, heads, x = union(k=2, capacity_factor=1.0), attention(k=2, capacity_factor=1.0), torch.randn(3, 16, 8)
    for layer in (mlp, heads):
        layer.gate.router.weight.normal_()
        layer(x)
    assert mlp.rows <= 4 * 3 * 8  # half of 4 · 3 · 16
    assert heads.pairs <= 4 * 3 * 8**2  # a quarter of 4 · 3 · 16²


def test_bad_input():
    with pytest.raises(ValueError, match="n_experts must divide the hidden width 16, got 3"):
        union(n_experts=3)
    with pytest.raises(ValueError, match="k must be at most n_experts=4, got 5"):
        union(k=5)
    with pytest.raises(ValueError, match="selection='both' chooses by the whole sample"):
        union(selection="both", causal=True)
    with pytest.raises(ValueError, match="k must be at most k_sample=1, got 2"):
        union(selection="both", k_sample=1)
    with pytest.raises(ValueError, match="one hidden layer, from d to d"):
        MLPSlices.from_dense(MLP([8, 16, 4]), 2)
    with pytest.raises(ValueError, match="got Linear"):
        UnionOfExperts(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"dropout=0\.1"):
        SelectiveAttention(nn.MultiheadAttention(8, 4, dropout=0.1))
    for layer in (union(), attention()):
        with untyped(), pytest.raises(ValueError, match=r"sequences \[batch, length, d\], got \[5, 8\]"):
            layer(torch.randn(5, 8))
        with untyped(), pytest.raises(ValueError, match=r"for each token, shape \[2, 5\], got \[2, 4\]"):
            layer(torch.randn(2, 5, 8), mask=torch.ones(2, 4).bool())
    with pytest.raises(ValueError, match="gate_mode must be one of"):
        union(gate_mode="no")
