import copy
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from notebook_kit.checkpoints import Checkpoint
from notebook_kit.diagnostics.expert_compression import compression_frame, compression_view, stable_rank_frame
from notebook_kit.diagnostics.experts import expert_sizes
from notebook_kit.expert_merging import expert_view, m_smoe, mc_smoe
from notebook_kit.expert_merging.factored import KINDS
from notebook_kit.expert_merging.low_rank import factor, split
from notebook_kit.expert_merging.mc_smoe import distillation_loss, kept_share
from tests.expert_merging.moes import KINDS as MODELS
from tests.expert_merging.moes import Listed, ids, logits, made_up_trace, prepared


@pytest.mark.parametrize("kind", MODELS)
def test_splitting_changes_nothing_at_first(kind):
    model, trace, before = prepared(kind)
    assert (logits(factor(model, 5)) - before).abs().max() < 1e-4 * before.abs().max()
    merged = m_smoe(model, trace, n_experts=3)
    factored = factor(merged, 5)
    expected = logits(merged)
    assert (logits(factored) - expected).abs().max() < 1e-4 * expected.abs().max()
    for one, other in zip(expert_view(factored), expert_view(merged), strict=True):
        for name in KINDS:
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=1e-4)
        assert (len(one), one.expert_map) == (len(other), other.expert_map)


@pytest.mark.parametrize("kind", MODELS)
def test_a_factored_model_survives_its_folder(kind, tmp_path):
    model, trace, _ = prepared(kind)
    new = mc_smoe(model, trace, n_experts=3, rank=4, density=0.3, steps=2)
    new.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(new)
    assert isinstance(again, type(model))
    assert torch.equal(logits(again), logits(new))
    generated = again.generate(ids(n=1, length=5), max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, new.generate(ids(n=1, length=5), max_new_tokens=3, do_sample=False))
    assert torch.equal(logits(copy.deepcopy(new)), logits(new))
    stored = [tensor for name, tensor in Checkpoint(tmp_path).items() if ".experts." in name]
    assert sum(t.numel() * t.itemsize for t in stored) == compression_frame(new, trace)["bytes"].sum()


def test_all_kept_is_the_identity_and_rows_that_fell_are_gone():
    model, trace, before = prepared()
    whole = mc_smoe(model, trace, n_experts=8, rank=4, density=1.0, steps=0)
    assert (logits(whole) - before).abs().max() < 1e-4
    new = mc_smoe(model, trace, n_experts=3, rank=4, density=0.25, steps=4)
    total = {"gate": 3 * 64, "up": 3 * 64, "down": 3 * 32}
    kept = sum(len(getattr(layer.experts, f"{kind}_place")) for layer in expert_view(new) for kind in KINDS)
    assert kept == round(0.25 * 2 * sum(total.values()))
    for layer in expert_view(new):
        for kind in KINDS:
            rows, place = (getattr(layer.experts, f"{kind}_{part}") for part in ("rows", "place"))
            assert rows.abs().sum(1).gt(0).all()
            assert torch.equal(place, place.unique())
    none = mc_smoe(model, trace, n_experts=3, rank=4, density=0.0, steps=0)
    assert all(len(layer.experts.gate_rows) == 0 for layer in expert_view(none))
    assert torch.isfinite(logits(none)).all()


def test_without_steps_the_largest_rows_stay():
    model, trace, _ = prepared()
    full = factor(m_smoe(model, trace, n_experts=3), 4)
    new = mc_smoe(model, trace, n_experts=3, rank=4, density=0.1, steps=0)
    size = torch.cat([getattr(one.experts, f"{k}_rows").square().mean(1) for one in expert_view(full) for k in KINDS])
    kept = torch.cat([getattr(one.experts, f"{k}_rows").square().mean(1) for one in expert_view(new) for k in KINDS])
    torch.testing.assert_close(kept.sort().values, size.sort().values[-len(kept) :])


def test_training_lowers_the_loss_leaves_routers_alone_and_the_original_too():
    model, trace, before = prepared()
    options = {"n_experts": 3, "rank": 4, "density": 0.2}
    raw, trained = (mc_smoe(model, trace, steps=steps, lr=5e-3, **options) for steps in (0, 25))
    text = ids()
    with torch.no_grad():
        assert distillation_loss(model, trained, text) < distillation_loss(model, raw, text) - 0.05
    for layer, original in zip(expert_view(trained), expert_view(model), strict=True):
        assert torch.equal(layer.router, original.router)
    assert torch.equal(logits(model), before)
    assert not trained.training
    again = mc_smoe(model, trace, steps=25, lr=5e-3, **options)
    assert torch.equal(logits(again), logits(trained))


def test_the_schedule_falls_from_one_to_the_density():
    shares = [kept_share(step, 50, 0.1) for step in range(51)]
    assert shares[0] == 1
    assert shares[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(shares))
    assert shares[5] == 1
    assert shares[20] == pytest.approx(0.1 + 0.9 * 0.5**3)


def test_split_by_hand():
    left, right, s = split(torch.tensor([[3.0, 0], [0, 1], [0, 0]]), 1)
    torch.testing.assert_close(left @ right, torch.tensor([[3.0, 0], [0, 0], [0, 0]]))
    assert left.norm() == pytest.approx(3**0.5)
    torch.testing.assert_close(s, torch.tensor([[0.0, 0], [0, 1], [0, 0]]))


def test_operations_agree_with_counting_them():
    model, trace, _ = prepared()
    for new in (model, m_smoe(model, trace, n_experts=3), mc_smoe(model, trace, n_experts=3, rank=4, steps=0)):
        frame = compression_frame(new, trace)
        assert frame["parameters"].tolist() == expert_sizes(new)["parameters"].tolist()
        layer, chosen = expert_view(new)[0], trace.layer(0).experts
        new.set_experts_implementation("eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer.experts(torch.randn(len(chosen), 32), chosen, torch.ones(chosen.shape))
        assert counter.get_total_flops() / len(chosen) == pytest.approx(frame["flops"][0])
    sizes = [compression_frame(m, trace)["flops"].sum() for m in (model, m_smoe(model, trace, n_experts=3))]
    assert sizes[0] == sizes[1]  # merging alone computes as much as before


def test_a_view_is_the_method_without_training():
    model, trace, _ = prepared()
    cache = {}
    view = compression_view(model, trace, n_experts=3, rank=4, density=0.2, cache=cache)
    expected = mc_smoe(model, trace, n_experts=3, rank=4, density=0.2, steps=0)
    torch.testing.assert_close(logits(view.model), logits(expected), atol=1e-4, rtol=1e-4)
    assert sum(view.stored.values()) == compression_frame(expected, trace)["parameters"].sum()
    assert compression_view(model, trace, n_experts=3, rank=4, density=0.2, layer=1, cache=cache).model is view.model
    assert len(view.spectrum) == 32
    with pytest.raises(ValueError, match=r"layer must be in \[0, 1\]"):
        compression_view(model, trace, layer=2)


def test_stable_rank():
    model, _, _ = prepared()
    frame = stable_rank_frame(model)
    assert len(frame) == 2 * 8 * 3
    assert frame["stable_rank"].between(1, 32).all()
    w = expert_view(model)[1].up[5]
    expected = w.norm() ** 2 / torch.linalg.matrix_norm(w, 2) ** 2
    row = frame[(frame["layer"] == "model.layers.1.mlp") & (frame["expert"] == 5) & (frame["matrix"] == "up")]
    assert row["stable_rank"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_bad_input_is_named():
    model, trace, _ = prepared()
    with pytest.raises(ValueError, match=r"rank must be in \[1, 32\]"):
        mc_smoe(model, trace, rank=33, steps=0)
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\]"):
        mc_smoe(model, trace, density=1.5)
    with pytest.raises(ValueError, match="n_experts"):
        mc_smoe(model, trace, n_experts=9)
    listed = Listed()
    with pytest.raises(ValueError, match="list of modules"):
        mc_smoe(listed, made_up_trace(listed, [0.25] * 4, layers=["block"]), n_experts=2, rank=2, steps=0)
    blind = made_up_trace(model, [1 / 8] * 8)
    blind._chunks["sequences"][0] = torch.arange(len(blind))  # one token each
    with pytest.raises(ValueError, match="two tokens or more"):
        mc_smoe(model, blind, rank=2, steps=1)
    layer = expert_view(mc_smoe(model, trace, rank=2, steps=0))[0]
    with pytest.raises(ValueError, match="stored as factors"):
        layer.write(layer.gate, layer.up, layer.down)
