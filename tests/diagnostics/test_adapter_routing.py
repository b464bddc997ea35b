import pytest
import torch
from torch import nn

from notebook_kit.diagnostics.adapter_routing import (
    gradient_alignment,
    pair_table,
    plane,
    routing_matrix,
    skill_similarity,
    weight_curve,
)
from notebook_kit.mixtures import Glider
from tests.mixtures.test_adapter_bank import E, X, base, gates, library


def glider(**values):
    return Glider(base(), library(), E, gates=gates(), **values)


def test_skill_similarity_by_hand():
    w = torch.tensor([[[0.9, 0.1]], [[0.8, 0.2]], [[0.1, 0.9]], [[0.2, 0.8]]])
    expected = torch.tensor([[1.0, 1, -1, -1], [1, 1, -1, -1], [-1, -1, 1, 1], [-1, -1, 1, 1]])
    torch.testing.assert_close(skill_similarity(w), expected)
    assert not skill_similarity(torch.full((3, 2, 4), 0.25)).any()  # no task stands out: nothing to compare


def test_pairs():
    table = pair_table(torch.eye(3), torch.arange(9.0).reshape(3, 3), ["a", "b", "c"])
    assert table.pair.tolist() == ["a and b", "a and c", "b and c"]
    assert table.overlap.tolist() == [1, 2, 5]
    assert table.similarity.tolist() == [0, 0, 0]


def test_gradient_alignment_by_hand():
    model = nn.Linear(2, 1, bias=False)
    rows = [torch.tensor([1.0, 0]), torch.tensor([2.0, 0]), torch.tensor([0.0, 3]), torch.tensor([-1.0, 0])]
    cosine = gradient_alignment(model, lambda m, x: m(x).sum(), rows)
    expected = torch.tensor([[1.0, 1, 0, -1], [1, 1, 0, -1], [0, 0, 1, 0], [-1, -1, 0, 1]])
    torch.testing.assert_close(cosine, expected)
    assert model.weight.grad is None
    model.register_parameter("Z", nn.Parameter(torch.ones(1)))
    torch.testing.assert_close(gradient_alignment(nn.Sequential(model), lambda m, x: m(x).sum(), rows), expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_routing_matrix(layer):
    ours = glider(weight=10_000.0, k=1)
    ours.ask(E[1])
    vote = next(iter(ours.layers.values())).router.vote
    matrix = routing_matrix(ours, {"a": (X, E[0]), "b": (X, E[2])}, layer=layer)
    assert matrix.loc["a"].tolist() == pytest.approx([1, 0, 0], abs=1e-5)
    assert matrix.loc["b"].tolist() == pytest.approx([0, 0, 1], abs=1e-5)
    assert next(iter(ours.layers.values())).router.vote is vote


def test_weight_curve_asks_each_domain():
    ours = glider()
    domains = {"in": {"a": (X, E[0])}, "out": {"b": (X, E[1]), "c": (X, E[2])}}
    table = weight_curve(ours, domains, lambda g, d: float(g.similarity.argmax()) + (g.weight or 0), [0.0, 5.0, None])
    assert table["in"].tolist() == [0, 5, 0]
    assert table["out"].tolist() == [1.5, 6.5, 1.5]
    assert ours.weight is None


def test_plane():
    rows = torch.tensor([[-3.0, 0, 0], [3.0, 0, 0], [0, 1.0, 0], [0, -1.0, 0]])
    first, second = plane(rows, torch.tensor([[0.0, 0, 9.0]]))
    assert first.abs().tolist() == [[3, 0], [3, 0], [0, 1], [0, 1]]
    assert second.tolist() == [[0, 0]]
