import numpy as np
import pytest
import torch

from notebook_kit.alignment import record_features
from notebook_kit.diagnostics.transport import budget_curve, epsilon_curve, fusion_view, pleas_view
from notebook_kit.figures.transport import budget_figure, epsilon_figure, fusion_figure, plan_figure, pleas_figure
from notebook_kit.models import MLP
from notebook_kit.widgets import explore


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return MLP([6, 10, 8, 3]), MLP([6, 10, 8, 3]), torch.randn(80, 6)


def score(model):
    return -model(torch.ones(1, 6)).square().mean().item()


def titles(figure):
    axes = [axis for axis in figure.layout if axis.startswith(("xaxis", "yaxis"))]
    return [figure.layout[axis].title.text for axis in axes]


def test_a_hard_plan_is_drawn_as_a_diagonal():
    plan = torch.eye(5, dtype=torch.float64)[torch.randperm(5)] / 5
    figure = plan_figure(plan)
    assert np.array_equal(figure.data[0].z, np.eye(5))
    assert set(titles(figure)) == {"unit of A", "unit of B, sorted"}


def test_fusion_pictures(pair):
    a, b, x = pair
    features = record_features(a, b, [x])
    curve = epsilon_curve(a, b, score, features=features, grid=(0.05, 0.5))
    assert [trace.name for trace in epsilon_figure(curve).data] == ["soft plans", "exact"]
    view = fusion_view(a, b, score, features=features, curve=curve, epsilon=0.2)
    figure = fusion_figure(view, y="score (negative squares)")
    assert all(titles(figure))
    assert figure.data[2].x[0] == 0.2
    assert "epsilon 0.2" in figure.layout.title.text
    assert len(fusion_figure(fusion_view(a, b, features=features)).data) == 1


def test_pleas_pictures(pair):
    a, b, x = pair
    curve = budget_curve(a, b, [x], score, budgets=(1.0, 2.0))
    assert len(budget_figure(curve).data) == 2
    view = pleas_view(a, b, [x], score, budget=1.5, curve=curve)
    figure = pleas_figure(view)
    assert all(titles(figure))
    assert figure.data[2].x[0] == view.cost
    bars = {trace.name: list(trace.y) for trace in figure.data if trace.type == "bar"}
    assert bars["merged"] == [split.merged for split in view.widths.values()]
    assert bars["A's own"] == bars["B's own"] == [split.a for split in view.widths.values()]
    assert len(pleas_figure(pleas_view(a, b, [x])).data) == 3


def test_views_have_sliders_for_epsilon_and_budget(pair):
    a, b, x = pair
    features = record_features(a, b, [x])
    explorer = explore(fusion_view, a, b, score, features=features, draw=fusion_figure)
    explorer.settings = {"epsilon": 0.5}
    assert explorer.value.epsilon == 0.5
    explorer = explore(pleas_view, a, b, [x], score, draw=pleas_figure)
    explorer.settings = {"budget": 2.0}
    assert explorer.value.cost == pytest.approx(2.0)
    assert explorer.code == "pleas_view(model_a, model_b, batches, score, budget=2.0)"
