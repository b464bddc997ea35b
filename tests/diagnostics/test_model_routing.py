"""Budgets served from what is known, adaptation tables, ranking scores by hand."""

import math

import pytest
import torch
from torch import nn

from notebook_kit.diagnostics.model_routing import (
    ModelRoster,
    adaptation_table,
    best_f1,
    budget_curve,
    expert_attention,
    letter_table,
    neighbour_agreement,
    plane,
    ranking_scores,
    rival_accuracies,
    serve,
)
from notebook_kit.mixtures import CompositionOfExperts, ExpertAggregator, MetaDMoE
from notebook_kit.models import MLP


def roster():
    correct = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 1, 1], [0, 1, 0]]).float()
    probs = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.1, 0.9]])
    scores = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    return ModelRoster(scores, [4.0, 5.0, 3.0], correct, probs, torch.tensor([0, 0, 1, 1]), ["a", "b", "c"], ["x", "y"])


def test_serving_by_hand():
    served = serve(roster(), 9)
    assert served.composition.hosted == (0, 1)
    assert served.accuracy == 0.75  # the second prompt is taken for the other category
    assert served.active == (4 + 3 * 5) / 4
    assert served.fallback == 0
    unsure = serve(roster(), 12, threshold=0.6)
    assert unsure.fallback == 0.25
    assert serve(roster(), 12, threshold=math.log(2)).fallback == 0
    assert serve(roster(), 3, threshold=0.0).composition.hosted == (2,)
    with pytest.raises(ValueError, match="no expert fits the budget 2"):
        serve(roster(), 2)


def test_serving_is_what_the_module_does():
    one = roster()
    experts = [nn.Linear(2, 1, bias=False) for _ in range(3)]
    for k, expert in enumerate(experts):
        nn.init.constant_(expert.weight, float(k))
    for threshold in (None, 0.6):
        options = {"sizes": one.sizes, "budget": 12.0, "threshold": threshold}
        model = CompositionOfExperts(experts, nn.Identity(), one.scores, **options)
        route = model.route(one.probs.log())
        served = serve(one, 12.0, threshold=threshold)
        assert model.composition.hosted == served.composition.hosted
        assert one.correct.gather(1, route.experts[:, None]).mean().item() == served.accuracy
        assert model.active_size(one.probs.log()) == served.active


def test_rivals_and_curve_by_hand():
    rivals = rival_accuracies(roster(), 9, direct=torch.tensor([0, 0, 1, 2]))
    assert rivals["oracle per prompt"] == rivals["oracle per category"] == 1
    assert rivals["direct, per prompt"] == 0.75
    assert rivals["best single"] == 0.5
    assert rivals["random"] == 0.5
    curve = budget_curve(roster(), [3, 9])
    assert curve["hosted"].tolist() == [1, 2]
    assert curve["accuracy"].tolist() == [0.5, 0.75]


def test_labels_of_neighbours():
    x = torch.tensor([[0.0], [1], [10], [11]])
    assert neighbour_agreement(x, torch.tensor([0, 0, 1, 1]), k=1) == 1
    assert neighbour_agreement(x, torch.tensor([0, 1, 0, 1]), k=1) == 0


def meta():
    torch.manual_seed(0)
    aggregator = ExpertAggregator(8, n_heads=2)
    return MetaDMoE([MLP([6, 8]) for _ in range(3)], MLP([6, 8]), nn.Linear(8, 2), aggregator=aggregator).eval()


def test_adaptation_leaves_the_model_alone():
    model, domains = (
        meta(),
        {"one": (torch.randn(20, 6), torch.arange(20) % 2), "two": (torch.randn(9, 6), torch.zeros(9))},
    )
    domains["two"] = (domains["two"][0], domains["two"][1].long())
    table = adaptation_table(model, domains, inner_lr=1.0, inner_steps=2, n_support=5)
    assert (model.inner_lr, model.inner_steps) == (1e-3, 1)
    assert list(table.index) == ["one", "two"]
    still = adaptation_table(model, domains, inner_steps=0)
    assert (still["before"] == still["after"]).all()
    x, y = domains["one"]
    assert table["before"]["one"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())
    shares = expert_attention(model, domains)
    assert shares.sum(axis=1).tolist() == pytest.approx([1, 1])


def test_ranking_by_hand():
    eye = torch.eye(3)
    table = ranking_scores(eye, eye[[0, 2, 1]], torch.tensor([0, 0, 0]))
    assert table["recall"][0] == pytest.approx(1 / 3)
    perfect = ranking_scores(torch.cat([eye, 2 * eye]), torch.cat([eye, eye]), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert perfect["recall"].tolist() == perfect["f1"].tolist() == [1, 1]
    assert perfect["pairs"].tolist() == [3, 3]


def test_best_f1_by_hand():
    positive = torch.tensor([True, False, True, False])
    assert best_f1(torch.tensor([4.0, 3, 2, 1]), positive) == pytest.approx(0.8)
    assert best_f1(torch.tensor([4.0, 1, 3, 2]), positive) == 1
    assert best_f1(torch.ones(4), positive) == pytest.approx(2 * 2 / (4 + 2))


def test_a_plane_keeps_two_directions():
    u = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    points = plane(u)
    assert points.shape == (30, 2)
    assert points[:, 0].var() >= points[:, 1].var()
    assert abs(points.mean(0)).max() < 1e-5


def test_letters_by_question():
    table = letter_table(torch.tensor([[1, 0], [1, 1], [0, 1]]).bool(), ["q", "q", "r"], ["x", "y"])
    assert table.to_numpy().tolist() == [[1, 0.5], [0, 1]]
    assert list(table.index) == ["q", "r"]
