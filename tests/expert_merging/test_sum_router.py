"""Routers that add up the probabilities of a group."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from notebook_kit.expert_merging import (
    Aligner,
    LayerPlan,
    apply_plan,
    average_group,
    drop_experts,
    expert_view,
    hc_smoe,
)
from notebook_kit.expert_merging.sum_router import SumRouter
from notebook_kit.routing import record_routing
from tests.expert_merging.moes import KINDS, Listed, ids, logits, prepared

SOFTMAX = [kind for kind in KINDS if kind != "deepseek_v3"]


@pytest.mark.parametrize("kind", SOFTMAX)
def test_all_kept_is_the_identity_and_fewer_survive_a_folder(kind, tmp_path):
    model, trace, before = prepared(kind)
    for merge in (hc_smoe, drop_experts):
        torch.testing.assert_close(logits(merge(model, trace, n_experts=8, router="sum")), before, atol=1e-5, rtol=1e-5)
    new = hc_smoe(model, trace, n_experts=3, router="sum")
    assert (logits(new) - logits(hc_smoe(model, trace, n_experts=3))).abs().max() > 1e-4
    new.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.router_rows == "sum"
    assert torch.equal(logits(again), logits(new))
    assert torch.equal(logits(copy.deepcopy(new)), logits(new))
    assert torch.equal(logits(model), before)
    assert new(ids(), labels=ids(), output_router_logits=True).loss.isfinite()


def test_by_hand():
    model, _, _ = prepared()
    groups = ((1, 0), (2, 3, 4), (5,), (6, 7))
    plan = LayerPlan(groups, tuple((1 / len(group),) * len(group) for group in groups))
    plan = {layer.name: plan for layer in expert_view(model)}
    block = apply_plan(model, plan, average_group(Aligner("none")), router="sum").model.layers[0].mlp
    p = torch.tensor([0.05, 0.1, 0.1, 0.1, 0.15, 0.25, 0.2, 0.05])  # groups: .15, .35, .25, .25 + a little
    p = p + torch.tensor([0, 0, 0, 0, 0, -0.01, 0.01, 0])
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.weight[:, 0] = p.log()
        x = torch.zeros(2, 32)
        x[:, 0] = 1
        scores, weights, rows = block.gate(x)
    torch.testing.assert_close(scores[0], p.log())
    torch.testing.assert_close(block.gate.group_probs(scores)[0], torch.tensor([0.15, 0.35, 0.24, 0.26]))
    # Alone, rows 5 and 6 are the likeliest; together, 2, 3 and 4 are. A group is named by its first row.
    assert rows.tolist() == [[2, 6]] * 2
    torch.testing.assert_close(weights[0], torch.tensor([0.35, 0.26]) / 0.61)


@pytest.mark.parametrize("kind", SOFTMAX)
def test_probabilities_sum_to_1_and_fewer_groups_than_top_k(kind):
    model, trace, _ = prepared(kind)
    new = drop_experts(model, trace, n_experts=3, router="sum", adaptive=True)
    with torch.no_grad(), record_routing(new) as heard:
        new(ids(3))
    for number, layer in enumerate(expert_view(new)):
        assert isinstance(layer.router_module, SumRouter)
        routing = heard.layer(number)
        probs = layer.router_module.group_probs(routing.logits)
        assert probs.shape == (len(heard), len(layer))
        torch.testing.assert_close(probs.sum(1), torch.ones(len(heard)))
        stored = torch.tensor(layer.expert_map)[routing.experts]
        assert (stored.sort(1).values.diff() > 0).all()  # no group is met twice
        assert torch.equal(stored[:, 0], probs.argmax(1))
    assert logits(drop_experts(model, trace, n_experts=1, router="sum")).isfinite().all()


def test_bad_input_is_named():
    deepseek, trace, before = prepared("deepseek_v3")
    for merge in (hc_smoe, drop_experts):
        with pytest.raises(ValueError, match=r'adds up softmax.*use router="map"'):
            merge(deepseek, trace, router="sum")
    assert torch.equal(logits(deepseek), before)
    listed = Listed()
    with torch.no_grad(), record_routing(listed) as heard:
        listed(torch.randn(9, 6))
    with pytest.raises(ValueError, match="ModuleList"):
        drop_experts(listed, heard, n_experts=2, router="sum")
