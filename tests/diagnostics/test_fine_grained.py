"""Budgets, ablations and the work of a union, by hand."""

import pytest
import torch
from torch import nn

from notebook_kit.diagnostics import fine_grained as numbers
from notebook_kit.mixtures import DeepSeekMoE, SelectiveAttention, UnionOfExperts
from notebook_kit.models import MLP


def test_the_budget_is_locked():
    table = numbers.budget(64, 16, 2, [(1, 0), (4, 0), (4, 1), (8, 4)])
    assert table["total"].unique().tolist() == [16 * 64]
    assert table["active"].unique().tolist() == [2 * 64]
    assert table["combinations"].tolist()[:3] == [120, 4426165368, 553270671]
    assert table.loc[3, ["routed", "picks", "width"]].tolist() == [124, 12, 8]


def layer_and_tokens():
    return DeepSeekMoE(6, 8, 4, granularity=2, n_shared=1).eval(), torch.randn(11, 6)


@torch.no_grad()
def test_altered_routes_otherwise_and_comes_back():
    layer, x = layer_and_tokens()
    layer.router.weight.normal_()
    before = layer(x)
    best = layer.routing.experts[:, :2]
    with numbers.altered(layer, masked=2 / 7):
        layer(x)
        assert not (layer.routing.experts.unsqueeze(2) == best.unsqueeze(1)).any()
        torch.testing.assert_close(layer.routing.probs.sum(1), torch.ones(11))
    with numbers.altered(layer, masked=0.99):
        layer(x)
        assert (layer.routing.weights > 0).all()  # three are left for three picks
    with numbers.altered(layer, shared=False):
        layer(x)
        assert layer.routing.experts.shape[1] == 4
        assert layer.shared is None
    with numbers.altered(layer, k=1):
        layer(x)
        assert layer.routing.experts.shape[1] == 1
    assert torch.equal(layer(x), before)
    with pytest.raises(RuntimeError, match="stop"), numbers.altered(layer, masked=0.5, shared=False):
        raise RuntimeError("stop")
    assert torch.equal(layer(x), before)
    for change, text in (({"masked": 1.0}, "masked must be"), ({"k": 8}, "k must leave 1 to 7"), ({"k": 0}, "got 0")):
        with pytest.raises(ValueError, match=text), numbers.altered(layer, **change):
            pass


def test_ablations_tabulate():
    layer, x = layer_and_tokens()
    table = numbers.ablations(layer, lambda: layer(x).norm(), [{}, {"shared": False}, {"k": 1}], name="norm")
    assert table["k"].tolist() == [3, 4, 1]
    assert table["shared"].tolist() == [True, False, True]
    assert table.loc[0, "norm"] == pytest.approx(layer(x).norm().item())
    assert table["norm"].nunique() == 3


def test_equal_experts_are_alike_and_opposite_ones_are_not():
    layer, x = layer_and_tokens()
    layer.experts.gate_up.data[1] = layer.experts.gate_up.data[0]
    layer.experts.down.data[1] = layer.experts.down.data[0]
    layer.experts.gate_up.data[2] = layer.experts.gate_up.data[0]
    layer.experts.down.data[2] = -layer.experts.down.data[0]
    cosine = numbers.expert_similarity(layer, x)
    torch.testing.assert_close(cosine.diagonal(), torch.ones(7))
    torch.testing.assert_close(cosine, cosine.T)
    assert cosine[0, 1].item() == pytest.approx(1)
    assert cosine[0, 2].item() == pytest.approx(-1)
    assert numbers.mean_similarity(torch.tensor([[1.0, 0.5], [0.5, 1.0]])) == 0.5
    assert numbers.mean_similarity(torch.ones(1, 1)) == 0


def unions(**settings):
    return (
        UnionOfExperts(MLP([8, 16, 8]), n_experts=4, **settings),
        SelectiveAttention(nn.MultiheadAttention(8, 4, batch_first=True), **settings),
    )


def test_work_by_hand():
    mlp, heads = unions(k=4)
    with pytest.raises(ValueError, match="must be called before"):
        numbers.union_flops(mlp)
    x = torch.randn(3, 10, 8)
    for layer in (mlp, heads):
        layer(x)
    assert numbers.union_flops(mlp) == {"experts": 30 * 2 * 8 * 16, "dense": 30 * 2 * 8 * 16}
    dense = 3 * (10 * 4 * 8 * 8 + 2 * 10 * 10 * 8)  # four matrices, then scores and sums
    assert numbers.union_flops(heads) == {"experts": dense, "dense": dense}
    with numbers.set_union([mlp, heads], k=2, capacity_factor=1.0):
        for layer in (mlp, heads):
            layer(x)
        work = numbers.union_flops(mlp)
        assert work["experts"] <= work["dense"] / 2
    assert (mlp.gate.k, mlp.gate.router.k, mlp.gate.capacity_factor) == (4, 4, None)


def test_the_curve_starts_at_the_dense_layer():
    mlp, heads = unions(k=4, gate_mode="select")
    x = torch.randn(3, 10, 8)
    settings = [{"k": 4}, {"k": 9}, {"k": 1, "capacity_factor": 1.0, "gate_mode": "weight"}]
    curve = numbers.union_curve([mlp, heads], lambda: (mlp(x) + heads(x)).norm(), settings)
    assert curve["share"].tolist()[:2] == [1, 1]
    assert curve["k"].tolist() == [4, 4, 1]
    assert curve.loc[2, "share"] < 0.35
    assert curve.loc[2, "gate_mode"] == "weight"
    assert mlp.gate.gate_mode == "select"


def test_gate_gradients():
    x = torch.randn(3, 10, 8)
    for mode, low, high in (("select", 0, 0), ("sum", 0, 1e-5), ("weight", 1e-2, 1e9)):
        for layer in unions(k=2, gate_mode=mode):
            assert low <= numbers.gate_gradient(layer, lambda m=layer: m(x).square().sum()) <= high
            assert numbers.gate_gradient(layer, lambda: torch.zeros(())) == 0
