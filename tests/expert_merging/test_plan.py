import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.expert_merging import (
    Aligner,
    LayerPlan,
    apply_plan,
    average_experts,
    average_group,
    dominant_experts,
    drop_experts,
    expert_view,
    group_by_similarity,
    hc_smoe,
    m_smoe,
    mc_smoe,
    plan_m_smoe,
    sub_moe,
    usage_of,
    zipit_experts,
)
from notebook_kit.expert_merging.plan import check_trace, cosine_similarity, merge_weights_of
from notebook_kit.routing import RoutingTrace
from tests.expert_merging.moes import Listed, made_up_trace, moe, prepared


def test_usage_sums_to_one_and_counts_every_pick():
    model, trace, _ = prepared()
    usage = usage_of(trace, model)
    assert list(usage) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for number, shares in enumerate(usage.values()):
        assert shares.sum() == pytest.approx(1)
        counts = torch.bincount(trace.layer(number).experts.flatten(), minlength=8)
        torch.testing.assert_close(shares, counts / (2 * len(trace)))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 4), st.booleans(), st.integers(0, 999))
def test_dominant_experts_meet_the_budget_and_are_the_most_used(n_experts, layers, adaptive, seed):
    generator = torch.Generator().manual_seed(seed)
    # Coarse numbers, so that there are ties.
    usage = {str(i): torch.randint(0, 4, (6,), generator=generator).float() for i in range(layers)}
    kept = dominant_experts(usage, n_experts, adaptive=adaptive)
    assert sum(map(len, kept.values())) == n_experts * layers
    for name, experts in kept.items():
        assert len(experts) >= 1
        assert adaptive or len(experts) == n_experts
        left = [usage[name][e] for e in range(6) if e not in experts]
        assert min(usage[name][e] for e in experts) >= max(left, default=-1)
    if adaptive:
        best = {name: int(shares.argmax()) for name, shares in usage.items()}
        assert all(best[name] in experts for name, experts in kept.items())
        # Whatever was left out anywhere is used no more than anything that was not forced in.
        free = [usage[n][e] for n, experts in kept.items() for e in experts if e != best[n]]
        left = [usage[n][e] for n in usage for e in range(6) if e not in kept[n]]
        assert not free or not left or min(free) >= max(left)


def test_every_group_has_exactly_one_dominant_expert_and_each_expert_one_group():
    model, trace, _ = prepared()
    for adaptive in (False, True):
        plan = plan_m_smoe(model, trace, n_experts=3, adaptive=adaptive)
        dominant = dominant_experts(usage_of(trace, model), 3, adaptive=adaptive)
        for name, layer in plan.items():
            assert [group[0] for group in layer.groups] == dominant[name]
            assert all(len(set(group) & set(dominant[name])) == 1 for group in layer.groups)
            assert sorted(member for group in layer.groups for member in group) == list(range(8))


def test_an_expert_joins_the_dominant_expert_it_resembles():
    s = torch.tensor([[1, 0.2, 0.9, 0.1], [0.2, 1, 0.3, 0.8], [0.9, 0.3, 1, 0], [0.1, 0.8, 0, 1]])
    assert group_by_similarity([0, 1], s) == ((0, 2), (1, 3))
    assert LayerPlan(((0, 2), (1, 3)), ((0.5, 0.5), (1.0, 0.0))).expert_map == (0, 1, 0, 1)


def test_similarity_is_in_range_with_ones_on_the_diagonal():
    s = cosine_similarity(torch.randn(5, 40))
    assert (s.diagonal() == 1).all()
    assert ((s >= 0) & (s <= 1)).all()
    s = cosine_similarity(torch.tensor([[1.0, 0], [-2, 0], [0, 3], [5, 0]]))
    torch.testing.assert_close(s[0], torch.tensor([1.0, 0, 0.5, 1]))


def test_the_hand_worked_merge():
    # f = (.6, .2, .2), 1×1 weights 1, 2, 4, groups {0, 2}, {1}: (.6·1 + .2·4) / .8 = 1.75
    weights = merge_weights_of(torch.tensor([0.6, 0.2, 0.2]), ((0, 2), (1,)), "frequency")
    assert weights[0] == pytest.approx((0.75, 0.25))
    model = Listed()
    (layer,) = expert_view(model)
    value = torch.tensor([1.0, 2, 4, 9])[:, None, None]
    parts = [value.expand_as(part).clone() for part in (layer.gate, layer.up, layer.down)]
    layer.write(*parts)
    weights = merge_weights_of(torch.tensor([0.6, 0.2, 0.2, 0.0]), ((0, 2), (1,), (3,)), "frequency")
    new = apply_plan(model, {"block": LayerPlan(((0, 2), (1,), (3,)), weights)}, average_group(Aligner("none")))
    (merged,) = expert_view(new)
    torch.testing.assert_close(merged.gate[:, 0, 0], torch.tensor([1.75, 2, 9]))
    torch.testing.assert_close(merged.down[:, 0, 0], torch.tensor([1.75, 2, 9]))


def test_weights_of_a_group():
    usage = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0])
    groups = ((0, 1), (2,), (3, 4))
    assert merge_weights_of(usage, groups, "uniform") == ((0.5, 0.5), (1.0,), (0.5, 0.5))
    assert merge_weights_of(usage, groups, "reversed")[0] == pytest.approx((0.5 / 1.2, 0.7 / 1.2))
    # Nothing was routed to 3 and 4: there is no frequency to go by.
    assert merge_weights_of(usage, groups, "frequency")[2] == (0.5, 0.5)
    alike = torch.full((4,), 0.25)
    assert merge_weights_of(alike, ((0, 1, 2, 3),), "frequency") == merge_weights_of(alike, ((0, 1, 2, 3),), "uniform")


def test_bad_input_is_named():
    model, trace, _ = prepared()
    empty = RoutingTrace(list(trace.layers), k=2)
    with pytest.raises(ValueError, match="trace is empty"):
        usage_of(empty, model)
    with pytest.raises(ValueError, match=r"another model: it has 1 routed layers \(a\)"):
        usage_of(made_up_trace(model, [0.5, 0.5], layers=["a"]), model)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp' has 8 experts, in the trace 2"):
        usage_of(made_up_trace(model, [0.5, 0.5], layers=list(trace.layers)), model)
    with pytest.raises(ValueError, match="each expert once"):
        LayerPlan(((0, 1), (1,)), ((0.5, 0.5), (1.0,)))
    with pytest.raises(ValueError, match="sum to 1"):
        LayerPlan(((0, 1),), ((0.5, 0.6),))
    whole = LayerPlan(tuple((e,) for e in range(8)), ((1.0,),) * 8)
    with pytest.raises(ValueError, match=r"no layer 'model\.layers\.1\.mlp'"):
        apply_plan(model, {"model.layers.0.mlp": whole}, average_group(Aligner()))
    half = LayerPlan(tuple((e,) for e in range(4)), ((1.0,),) * 4)
    with pytest.raises(ValueError, match="for 4 experts, it has 8"):
        apply_plan(model, dict.fromkeys(trace.layers, half), average_group(Aligner()))
    merged = apply_plan(model, dict.fromkeys(trace.layers, whole), average_group(Aligner()))
    with pytest.raises(ValueError, match="could not be saved"):
        apply_plan(merged, dict.fromkeys(trace.layers, whole), average_group(Aligner()))
    assert moe() is not model


@pytest.mark.parametrize(
    "method",
    [
        m_smoe,
        average_experts,
        drop_experts,
        hc_smoe,
        sub_moe,
        zipit_experts,
        functools.partial(m_smoe, align=False),
        functools.partial(sub_moe, rank=4),
        functools.partial(mc_smoe, steps=0),
        functools.partial(drop_experts, by="reconstruction"),
    ],
)
def test_a_broken_expert_is_never_merged(method):
    model, trace, _ = prepared()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.experts.down_proj[3, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        method(broken, trace, n_experts=7)


def test_what_is_no_trace_is_refused():
    with pytest.raises(TypeError, match="trace must be a RoutingTrace, got dict: record one"):
        check_trace({})


def test_equal_usage_is_averaging():
    model, _, _ = prepared()
    trace = made_up_trace(model, [0.125] * 8)
    by_usage, alike = (m_smoe(model, trace, n_experts=3, merge_weights=rule) for rule in ("frequency", "uniform"))
    for one, other in zip(by_usage.parameters(), alike.parameters(), strict=True):
        torch.testing.assert_close(one, other)
