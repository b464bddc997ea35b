import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from notebook_kit.expert_merging import average_experts, drop_experts, expert_view, m_smoe, usage_of
from tests.expert_merging.moes import KINDS, Listed, ids, logits, made_up_trace, moe, prepared, trace_of

FREE = [kind for kind in KINDS if kind != "deepseek_v3"]


@pytest.mark.parametrize("kind", FREE)
def test_dropping_keeps_the_most_used_and_stays_of_the_same_class(kind, tmp_path):
    model, trace, before = prepared(kind)
    new = drop_experts(model, trace, n_experts=3)
    assert type(new) is type(model)
    usage = usage_of(trace, model)
    for layer, original in zip(expert_view(new), expert_view(model), strict=True):
        kept = sorted(usage[layer.name].argsort(descending=True, stable=True)[:3].tolist())
        assert torch.equal(layer.gate, original.gate[kept])
        assert torch.equal(layer.router, original.router[kept])
    new.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(new))
    assert torch.equal(logits(model), before)
    assert (logits(drop_experts(model, trace, n_experts=8)) - before).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_replacing_keeps_the_rows_and_leads_them_to_a_kept_expert(kind):
    model, trace, before = prepared(kind)
    new = drop_experts(model, trace, n_experts=3, router="map")
    for layer, original in zip(expert_view(new), expert_view(model), strict=True):
        assert (len(layer), len(layer.router)) == (3, 8)
        kept = sorted(usage_of(trace, model)[layer.name].argsort(descending=True, stable=True)[:3].tolist())
        assert torch.equal(layer.gate, original.gate[kept])
        assert [layer.expert_map[e] for e in kept] == [0, 1, 2]
    assert (logits(drop_experts(model, trace, n_experts=8, router="map")) - before).abs().max() < 1e-6


def test_dropping_what_is_never_used_costs_nothing():
    model = moe()
    with torch.no_grad():
        for layer in expert_view(model):
            # The mean of five logits is never the highest of them.
            layer.router[5:] = layer.router[:5].mean(0)
            layer.block.gate.top_k = 1
    model.config.num_experts_per_tok = 1
    trace, before = trace_of(model), logits(model)
    assert all((shares[5:] == 0).all() for shares in usage_of(trace, model).values())
    torch.testing.assert_close(logits(drop_experts(model, trace, n_experts=5)), before, atol=1e-5, rtol=1e-5)
    assert (logits(drop_experts(model, trace, n_experts=4)) - before).abs().max() > 1e-3


def test_twins_under_top_1_may_be_dropped_under_top_2_they_may_not_but_merging_is_lossless():
    for k in (1, 2):
        model = moe()
        with torch.no_grad():
            for layer in expert_view(model):
                for part in (layer.gate, layer.up, layer.down, layer.router):
                    part[7] = part[0]
                layer.block.gate.top_k = k
        model.config.num_experts_per_tok = k
        trace, before = trace_of(model), logits(model)
        usage = [0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05]
        made = made_up_trace(model, usage, trace.layer(0).logits[:95])
        merged = m_smoe(model, made, n_experts=7)
        assert expert_view(merged)[0].expert_map == (0, 1, 2, 3, 4, 5, 6, 0)
        assert (logits(merged) - before).abs().max() < 1e-5
        dropped = (logits(drop_experts(model, made, n_experts=7)) - before).abs().max()
        assert dropped < 1e-5 if k == 1 else dropped > 1e-3


def test_fewer_experts_than_top_k():
    model, trace, _ = prepared()
    new = drop_experts(model, trace, n_experts=1)
    assert new.config.num_experts_per_tok == 1
    assert torch.isfinite(logits(new)).all()
    # The balance loss of training counts with the new numbers too.
    assert new(ids(), labels=ids(), output_router_logits=True).loss.isfinite()
    assert model.config.num_experts_per_tok == 2


def test_controls():
    model, trace, _ = prepared()
    usage = usage_of(trace, model)["model.layers.0.mlp"]
    least = sorted(usage.argsort(stable=True)[:2].tolist())
    worst = drop_experts(model, trace, n_experts=2, by="reversed")
    chosen = expert_view(worst)[0].gate
    assert min(usage[e] for e in range(8) if (expert_view(model)[0].gate[e] == chosen[0]).all()) <= usage[least].max()
    one, two = (drop_experts(model, trace, n_experts=3, by="random", seed=seed) for seed in (0, 0))
    assert torch.equal(logits(one), logits(two))
    assert not torch.equal(logits(one), logits(drop_experts(model, trace, n_experts=3, by="random", seed=1)))
    assert expert_view(drop_experts(model, trace, n_experts=3, by="probability"))[0].gate.shape[0] == 3


def test_averaging_is_uniform_and_unaligned_unless_asked():
    model, trace, _ = prepared()
    new = average_experts(model, trace, n_experts=1)
    for layer, original in zip(expert_view(new), expert_view(model), strict=True):
        torch.testing.assert_close(layer.gate[0], original.gate.mean(0))
    aligned = average_experts(model, trace, n_experts=1, align=True)
    assert not torch.allclose(expert_view(aligned)[0].gate, expert_view(new)[0].gate)


def test_bad_input_is_named():
    model, trace, _ = prepared()
    deepseek, deepseek_trace, _ = prepared("deepseek_v3")
    with pytest.raises(ValueError, match=r'2 groups of experts.*use router="map"'):
        drop_experts(deepseek, deepseek_trace)
    with pytest.raises(ValueError, match=r'adaptive.*router="map"'):
        drop_experts(model, trace, adaptive=True)
    with pytest.raises(ValueError, match=r"\(drop_experts\)"):
        drop_experts(model, trace, n_experts=9)
    listed = Listed()
    with pytest.raises(ValueError, match="needs a transformers model"):
        drop_experts(listed, made_up_trace(listed, [0.25] * 4, layers=["block"]), n_experts=2)
    assert len(copy.copy(trace)) == len(trace)
