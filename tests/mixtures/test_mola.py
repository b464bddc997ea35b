"""MoLA: how many experts each layer gets, their weights, and both balances."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from notebook_kit.adapters import trainable_parameters
from notebook_kit.mixtures import ALLOCATIONS, MoLA, aux_loss, layer_balance_loss, share_out
from notebook_kit.mixtures.mola import layer_number
from notebook_kit.models import MLP, tiny_llama


@pytest.mark.parametrize(("name", "total"), [(name, 256 if name == "full" else 160) for name in ALLOCATIONS])
def test_totals_over_32_layers(name, total):
    model = nn.ModuleList(nn.Linear(8, 8) for _ in range(32))
    names = MoLA.allocate(model, name, targets=r"^\d+$", rank=2)
    counts = [model.get_submodule(n).n_experts for n in names]
    assert sum(counts) == total
    assert counts == [n for n in ALLOCATIONS[name] for _ in range(8)]


def test_lists_for_each_layer_of_a_llama():
    model = tiny_llama(num_hidden_layers=4)
    names = MoLA.allocate(model, [1, 2, 3, 4], targets=r"_proj$", k=2, rank=[1, 2, 3, 4])
    assert len(names) == 28
    for name in names:
        layer, j = model.get_submodule(name), layer_number(name)
        assert (layer.n_experts, layer.k, layer.rank) == (j + 1, min(2, j + 1), j + 1)
    table = trainable_parameters(model).set_index("module").parameters
    layer = model.model.layers[2].mlp.down_proj
    d_in, d_out = layer.host.in_features, layer.host.out_features
    assert table["model.layers.2.mlp.down_proj"] == 3 * 3 * (d_in + d_out) + 3 * d_in
    out = model(input_ids=torch.arange(12).reshape(2, 6)).logits
    assert out.shape[:2] == (2, 6)
    assert float(aux_loss(model)) == 0


def test_weights_by_hand():
    layer = MoLA(nn.Linear(3, 3), n_experts=3, k=2, rank=2)
    layer.router.weight.data = torch.eye(3)
    layer(torch.tensor([[2.0, 1, 0]]))
    assert layer.routing.experts.tolist() == [[0, 1]]
    torch.testing.assert_close(layer.routing.weights, torch.tensor([[0.7311, 0.2689]]), atol=1e-4, rtol=0)


def test_all_experts_are_a_weighted_sum():
    layer, x = MoLA(nn.Linear(6, 5), n_experts=3, k=3, rank=2), torch.randn(4, 6)
    layer.B.data.normal_()
    p = (x @ layer.router.weight.T).softmax(1)
    changes = torch.einsum("nor,nri,ti->nto", layer.B, layer.A, x) * layer.scaling[:, None, None]
    expected = layer.host(x) + (p.T[:, :, None] * changes).sum(0)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_the_balance_of_one_router():
    layer = MoLA(nn.Linear(4, 4), n_experts=4, k=2, rank=2, balance_coef=0.5)
    layer.router.weight.data.zero_()
    layer(torch.randn(8, 4))
    torch.testing.assert_close(layer.routing.aux_loss, torch.tensor(0.5))  # uniform: 1, times the coefficient
    sure = MoLA(nn.Linear(4, 4), n_experts=4, k=1, rank=2, balance_coef=1.0)
    sure.router.weight.data = torch.zeros(4, 4).index_fill_(0, torch.tensor(2), 100.0)
    sure(torch.ones(8, 4))
    torch.testing.assert_close(sure.routing.aux_loss, torch.tensor(4.0))  # all on one: N


def test_the_pooled_balance_of_a_layer():
    model = MLP([4, 4, 4])
    MoLA.allocate(model, [4, 4], targets="layers", k=1, rank=2)
    for i, layer in enumerate(model.layers):
        layer.router.weight.data = torch.zeros(4, 4).index_fill_(0, torch.tensor(i), 100.0)
        layer(torch.ones(6, 4))
    assert layer_balance_loss(model).item() == pytest.approx(8.0)  # two layers, each with all on one
    pair = nn.ModuleList([nn.ModuleList(model.layers)])
    assert layer_balance_loss(pair).item() == pytest.approx(2.0)  # pooled, two of four indices share the load evenly
    with pytest.raises(ValueError, match="no MoLA in Linear remembers"):
        layer_balance_loss(nn.Linear(2, 2))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.integers(0, 30))
def test_sharing_out_keeps_the_total(weights, more):
    numbers = share_out(weights, len(weights) + more)
    assert sum(numbers) == len(weights) + more
    assert min(numbers) >= 1
    order = sorted(range(len(weights)), key=lambda i: weights[i])
    assert all(numbers[a] <= numbers[b] for a, b in itertools.pairwise(order) if weights[a] < weights[b])


def test_share_out_by_hand():
    assert share_out([2, 4, 6, 8], 20) == [3, 4, 6, 7]
    assert share_out([1, 1, 1], 10) == [4, 3, 3]
    with pytest.raises(ValueError, match="2 experts for 3 blocks"):
        share_out([1, 1, 1], 2)


@pytest.mark.parametrize(
    ("allocation", "more", "match"),
    [
        ("pyramid", {}, "allocation must be one of inverted triangle"),
        ([1, 2], {}, "must divide 3 layers"),
        ([1, 2, 3], {"k": [1, 2]}, "equal lengths, got 3, 2, 3"),
        ([1, 2, 3], {"k": [2, 2, 2]}, r"layers.0: k must be at most n_experts=1"),
        ([1, 2, 3], {"rank": 99}, "layers.0: rank must be at most"),
    ],
)
def test_bad_allocations_change_nothing(allocation, more, match):
    model = MLP([8, 8, 8, 8])
    with pytest.raises(ValueError, match=match):
        MoLA.allocate(model, allocation, targets="layers", **{"rank": 2} | more)
    assert all(type(layer) is nn.Linear for layer in model.layers)
    with pytest.raises(ValueError, match="'head' names no layer"):
        MoLA.allocate(nn.ModuleDict({"head": nn.Linear(4, 4)}), [2], targets="head", rank=2)
