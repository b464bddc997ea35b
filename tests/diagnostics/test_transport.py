import pytest
import torch

from notebook_kit import models
from notebook_kit.alignment import ot_fusion, pleas, record_features
from notebook_kit.diagnostics.transport import (
    budget_curve,
    compute_table,
    epsilon_curve,
    fusion_view,
    partners,
    plan_table,
    pleas_view,
    with_weights,
)
from notebook_kit.models import MLP


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return MLP([6, 10, 8, 3]), MLP([6, 14, 8, 3]), torch.randn(80, 6)


def score(model):
    return -model(torch.ones(1, 6)).square().mean().item()


def test_partners():
    assert partners(torch.eye(4, dtype=torch.float64) / 4) == pytest.approx(1.0)
    assert partners(torch.full((4, 5), 1 / 20, dtype=torch.float64)) == pytest.approx(5.0)


def test_plan_table_and_epsilon_curve(pair):
    a, b, x = pair
    features = record_features(a, b, [x])
    table = plan_table(ot_fusion(a, b, features=features).plans)
    assert table[["layer", "units_b", "units_a"]].values.tolist() == [["layers.0", 14, 10], ["layers.1", 8, 8]]
    curve = epsilon_curve(a, b, score, features=features, grid=(0.03, 0.3, 3.0))
    assert curve["method"].tolist() == ["exact", "sinkhorn", "sinkhorn", "sinkhorn"]
    assert curve["partners"].is_monotonic_increasing
    row = curve.iloc[2]
    fused = ot_fusion(a, b, features=features, epsilon=0.3)
    assert row["score"] == pytest.approx(score(with_weights(a, fused)))


def test_fusion_view(pair):
    a, b, x = pair
    features = record_features(a, b, [x])
    view = fusion_view(a, b, score, features=features, epsilon=0.3, layer=1)
    assert view.layer == "layers.1"
    assert view.plan.shape == (8, 8)
    assert view.score == pytest.approx(score(with_weights(a, ot_fusion(a, b, features=features, epsilon=0.3))))
    assert fusion_view(a, b, features=features).score is None
    with pytest.raises(ValueError, match=r"layer must be in \[0, 1\], got 2"):
        fusion_view(a, b, features=features, layer=2)


def test_compute_table_counts_by_hand():
    model = models.VGG((4,), hidden=8)
    table = compute_table(model, torch.rand(2, 64)).set_index("layer")
    assert table.loc["conv0"].tolist() == [36, 36, 36 * 64]
    assert table.loc["conv1"].tolist() == [144, 144, 144 * 64]
    assert table.loc["hidden"].tolist() == [4 * 16 * 8 + 8, 512, 512]
    assert table.loc["head"].tolist() == [90, 80, 80]


def test_budget_curve_and_pleas_view(pair):
    a, _, x = pair
    b = MLP([6, 10, 8, 3])
    curve = budget_curve(a, b, [x], score, budgets=(1.0, 1.6, 2.0))
    assert (curve["cost"] <= curve["budget"] + 1e-9).all()
    ends = curve[curve["budget"] == 2.0]["score"]
    assert ends.iloc[0] == pytest.approx(ends.iloc[1], abs=1e-6)
    view = pleas_view(a, b, [x], score, budget=1.6)
    row = curve[(curve["variant"] == "least squares") & (curve["budget"] == 1.6)].iloc[0]
    assert (view.cost, view.score) == pytest.approx((row["cost"], row["score"]))
    assert view.widths["layers.2"] == (3, 0, 0)
    custom = budget_curve(a, b, [x], score, budgets=(1.0,), variants={"in order": {"align": "none"}})
    assert custom["score"].iloc[0] == pytest.approx(score(pleas(a, b, [x], align="none")))
