import numpy as np
import pytest
import torch

from notebook_kit.diagnostics.experts import (
    compare_expert_merges,
    expert_merge_view,
    expert_sizes,
    groups_frame,
    plant_permuted_copies,
    similarity_matrix,
    usage_entropy,
    usage_frame,
)
from notebook_kit.expert_merging import average_experts, drop_experts, expert_inputs, m_smoe, plan_m_smoe, usage_of
from tests.expert_merging.moes import Listed, ids, logits, prepared


def test_usage_and_groups_as_tables():
    model, trace, _ = prepared()
    plan = plan_m_smoe(model, trace, n_experts=3)
    frame = usage_frame(model, trace, plan)
    assert frame.groupby("layer")["usage"].sum().to_numpy() == pytest.approx([1, 1])
    assert frame.groupby("layer")["dominant"].sum().tolist() == [3, 3]
    groups = groups_frame(plan)
    assert len(groups) == 6
    assert all(row.dominant == row.members[0] for row in groups.itertuples())
    assert sum(len(members) for members in groups["members"]) == 16


def test_sizes_agree_with_counting_parameters():
    model, trace, _ = prepared()
    for new in (model, m_smoe(model, trace, n_experts=3), drop_experts(model, trace, n_experts=5)):
        frame = expert_sizes(new)
        counted = sum(p.numel() for name, p in new.named_parameters() if ".experts." in name)
        assert frame["parameters"].sum() == counted
        assert frame["bytes"].sum() == 4 * counted
    assert expert_sizes(m_smoe(model, trace, n_experts=3))[["rows", "experts"]].values.tolist() == [[8, 3], [8, 3]]
    whole, listed = sum(p.numel() for p in model.parameters()), Listed()
    merged = sum(p.numel() for p in m_smoe(model, trace, n_experts=3).parameters())
    assert whole - merged == expert_sizes(model)["parameters"].sum() * 5 // 8
    assert expert_sizes(listed)["parameters"].tolist() == [4 * 3 * 30]


def test_comparing_methods():
    model, trace, before = prepared()
    methods = {"merge": m_smoe, "average": average_experts, "drop": drop_experts}
    frame = compare_expert_merges(
        model, trace, lambda m: -float((logits(m) - before).abs().mean()), methods, n_experts=[8, 2]
    )
    assert frame[frame["n_experts"] == 8]["score"].to_numpy() == pytest.approx([0, 0, 0], abs=1e-6)
    assert (frame[frame["n_experts"] == 2]["score"] < -1e-4).all()
    assert frame["parameters"].tolist() == [98304] * 3 + [24576] * 3


def test_a_view_shows_groups_and_builds_no_model_for_another_layer():
    model, trace, _ = prepared()
    cache = {}
    view = expert_merge_view(model, trace, n_experts=3, cache=cache)
    assert sorted(view.order) == list(range(8))
    assert view.parameters == (98304, 98304 * 3 // 8)
    other = expert_merge_view(model, trace, n_experts=3, layer=1, cache=cache)
    assert other.model is view.model
    assert other.layer == "model.layers.1.mlp"
    assert torch.equal(logits(view.model), logits(m_smoe(model, trace, n_experts=3)))
    dropped = expert_merge_view(model, trace, n_experts=3, method="drop", cache=cache)
    assert len(dropped.dropped) == 5
    assert torch.equal(logits(dropped.model), logits(drop_experts(model, trace, n_experts=3)))
    replaced = expert_merge_view(model, trace, n_experts=3, method="replace", cache=cache)
    assert torch.equal(logits(replaced.model), logits(drop_experts(model, trace, n_experts=3, router="map")))
    inputs = expert_inputs(model, [ids()])
    by_activation = expert_merge_view(model, trace, n_experts=3, align="activation", inputs=inputs)
    expected = m_smoe(model, trace, n_experts=3, align="activation", batches=[ids()])
    assert torch.equal(logits(by_activation.model), logits(expected))
    with pytest.raises(ValueError, match=r"layer must be in \[0, 1\]"):
        expert_merge_view(model, trace, layer=2)
    with pytest.raises(ValueError, match=r"\(expert_merge_view\)"):
        expert_merge_view(model, trace, n_experts=9)


def test_similarity_and_entropy():
    model, trace, _ = prepared()
    s = similarity_matrix(model, trace, 1)
    assert s.shape == (8, 8)
    assert np.diagonal(s) == pytest.approx(np.ones(8))
    assert usage_entropy(np.full(8, 1 / 8)) == pytest.approx(3)
    assert usage_entropy(np.array([1.0, 0, 0])) == 0


def test_planting_changes_no_function_of_an_expert():
    model, trace, _ = prepared()
    usage = usage_of(trace, model)
    planted = plant_permuted_copies(model, usage, distinct=4, router_scale=1.0)
    layer, block = planted.model.layers[0].mlp, model.model.layers[0].mlp
    ranked = usage["model.layers.0.mlp"].argsort(descending=True, stable=True).tolist()
    x, one = torch.randn(5, 32), torch.ones(5, 1)
    for place, e in enumerate(ranked[4:]):
        copied, original = torch.full((5, 1), e), torch.full((5, 1), ranked[place])
        torch.testing.assert_close(layer.experts(x, copied, one), block.experts(x, original, one), atol=1e-5, rtol=1e-5)
        assert not torch.equal(layer.experts.gate_up_proj[e], block.experts.gate_up_proj[ranked[place]])
    with pytest.raises(ValueError, match=r"distinct must be in \[1, 8\]"):
        plant_permuted_copies(model, usage, distinct=9)
