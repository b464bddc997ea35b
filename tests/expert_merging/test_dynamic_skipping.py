import copy

import pytest
import torch

from notebook_kit.expert_merging import dynamic_skipping, expert_view, m_smoe
from notebook_kit.routing import RoutingTrace, record_routing
from tests.expert_merging.moes import KINDS, Listed, ids, logits, made_up_trace, moe, prepared


def top_1(model):
    """One expert a token, without the hooks that deepcopy carries along."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    for layer in expert_view(model):
        layer.router_module.top_k = 1
    return model


def inside(model, text):
    with torch.no_grad(), record_routing(model) as trace:
        model(text)
    return [trace.layer(number) for number in range(len(trace.layers))]


@pytest.mark.parametrize("kind", KINDS)
def test_beta_0_is_the_full_model_beta_1_is_top_1_and_undo_gives_the_original_back(kind):
    model, trace, before = prepared(kind)
    with dynamic_skipping(model, trace, beta=0.0):
        assert torch.equal(logits(model), before)
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        with dynamic_skipping(model, trace, beta=1.0):
            torch.testing.assert_close(logits(model), logits(top_1(model)), atol=1e-5, rtol=1e-4)
            assert (logits(model) - before).abs().max() > 1e-3
    skipping = dynamic_skipping(model, trace)
    assert (logits(model) - before).abs().max() > 1e-4
    skipping.undo()
    skipping.undo()
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "olmoe"])
def test_half_of_the_calibration_tokens_skip_and_weights_keep_their_sum(kind):
    model, _, _ = prepared(kind)
    text = ids(7, n=8)
    with torch.no_grad(), record_routing(model) as trace:
        model(text)
    with dynamic_skipping(model, trace) as skipping:
        routings = inside(model, text)
    # Only the first layer receives what it received while calibrating.
    assert (routings[0].experts < 0).any(1).double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert 0.2 < (routings[1].experts < 0).any(1).double().mean().item() < 0.8
    for number, (routing, beta) in enumerate(zip(routings, skipping.beta.values(), strict=True)):
        assert 0 < beta < 1
        if trace.normalize:
            torch.testing.assert_close(routing.weights.sum(1), torch.ones(len(routing)))
        assert torch.equal(routing.experts < 0, routing.weights == 0)
        assert (routing.experts >= 0).any(1).all(), number
        kept = routing.weights[(routing.experts >= 0).all(1)]
        assert (kept.amin(1) >= beta * kept.amax(1)).all()


def test_merged_experts_skip_too():
    model, trace, _ = prepared()
    merged = m_smoe(model, trace, n_experts=3)
    whole = logits(merged)
    with dynamic_skipping(merged, trace, beta=1.0):
        torch.testing.assert_close(logits(merged), logits(top_1(merged)), atol=1e-5, rtol=1e-4)
    assert torch.equal(logits(merged), whole)


def test_bad_input_is_named():
    model, trace, before = prepared()
    for beta in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]"):
            dynamic_skipping(model, trace, beta=beta)
    with pytest.raises(ValueError, match="trace is of another model"):
        dynamic_skipping(model, RoutingTrace(["block"], k=2))
    with pytest.raises(ValueError, match="trace is empty"):
        dynamic_skipping(model, RoutingTrace(trace.layers, k=2))
    with pytest.raises(ValueError, match="the trace has 1"):
        dynamic_skipping(model, made_up_trace(model, [0.125] * 8))
    with pytest.raises(ValueError, match=r"second of two experts.*uses 1"):
        dynamic_skipping(top_1(moe()), trace)
    listed = Listed()
    with torch.no_grad(), record_routing(listed) as heard:
        listed(torch.randn(5, 6))
    with pytest.raises(ValueError, match="are a list"):
        dynamic_skipping(listed, heard)
    assert torch.equal(logits(model), before)
