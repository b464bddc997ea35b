"""Switch Transformers: experts of two matrices in a dictionary, one expert a token, an encoder and a decoder."""

import copy
import functools
import json

import pytest
import torch
import transformers
from scipy.optimize import linear_sum_assignment
from transformers import AutoModelForSeq2SeqLM

from notebook_kit import models
from notebook_kit.alignment import permute, random_permutations
from notebook_kit.checkpoints import Checkpoint
from notebook_kit.diagnostics.expert_compression import compression_frame, stable_rank_frame
from notebook_kit.diagnostics.experts import expert_sizes, plant_permuted_copies
from notebook_kit.expert_merging import (
    Aligner,
    UnknownExperts,
    average_experts,
    best_subset,
    calibration_inputs,
    drop_experts,
    dynamic_skipping,
    expert_inputs,
    expert_view,
    hc_smoe,
    m_smoe,
    mc_smoe,
    sub_moe,
    usage_of,
    zipit_experts,
)
from notebook_kit.expert_merging.align_experts import expert_of, spec_of
from notebook_kit.expert_merging.mc_smoe import distillation_loss
from notebook_kit.expert_merging.outputs import expert_output, trace_batches
from notebook_kit.expert_merging.sum_router import SumRouter
from notebook_kit.routing import record_routing
from tests.expert_merging.moes import ids, made_up_trace

READ, WRITTEN = ids(2, length=24), ids(3, length=16)
TEXT = {"input_ids": READ, "decoder_input_ids": WRITTEN}


def with_(method, **options):
    return functools.partial(method, **options)


MERGES = {
    "m_smoe": m_smoe,
    "m_smoe, adaptive": with_(m_smoe, adaptive=True, similarity="weight"),
    "m_smoe, activation": with_(m_smoe, align="activation", similarity="output"),
    "m_smoe, sketch": with_(m_smoe, align="sketch", similarity="router-weight"),
    "m_smoe, fisher": with_(m_smoe, merge_weights="fisher"),
    "average_experts": average_experts,
    "drop_experts, map": with_(drop_experts, router="map"),
    "drop_experts, sum": with_(drop_experts, router="sum", by="probability"),
    "hc_smoe": with_(hc_smoe, align=True),
    "hc_smoe, sum": with_(hc_smoe, router="sum", linkage="ward"),
    "sub_moe": with_(sub_moe, align=True, adaptive=True),
    "zipit_experts": zipit_experts,
    "zipit_experts, fixed": with_(zipit_experts, matching="fixed-dominant"),
}
DROPS = {
    "frequency": drop_experts,
    "reconstruction": with_(drop_experts, by="reconstruction"),
    "mean rows": with_(hc_smoe, router="mean"),
}


@torch.no_grad()
def trace_of(model):
    with record_routing(model) as trace:
        model(input_ids=ids(0, n=6), decoder_input_ids=ids(1, n=6, length=20))
    return trace


@torch.no_grad()
def logits(model):
    return model(**TEXT).logits


@functools.cache
def prepared(**overrides):
    """(model, trace, its logits on other text); not to be modified."""
    model = models.tiny_switch(**overrides)
    return model, trace_of(model), logits(model)


def one_hot(chosen, n=8):
    return torch.nn.functional.one_hot(torch.as_tensor(chosen), n)[:, None]


def test_the_parts_are_what_the_model_computes_with():
    model, _, _ = prepared()
    layers = expert_view(model)
    assert [layer.name for layer in layers] == ["encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp"]
    for layer in layers:
        assert (layer.parts, layer.gated, layer.signed, layer.fused) == (("up", "down"), False, False, False)
        assert (len(layer), layer.width, layer.router.shape) == (8, 64, (8, 32))
        x = torch.randn(7, 32)
        expected = layer.experts(x, one_hot([3] * 7), torch.ones(7, 1))
        torch.testing.assert_close(expert_output(layer, expert_of(layer, 3), x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close((x @ layer.up[3].T).relu() @ layer.down[3].T, expected, atol=1e-5, rtol=1e-5)


def test_writing_reaches_the_model_and_there_is_no_gate():
    layer = expert_view(models.tiny_switch())[1]
    layer.write(2 * layer.up, down=layer.down)
    assert torch.equal(layer.experts["expert_5"].wi.weight, layer.up[5])
    with pytest.raises(ValueError, match="have no gate, only up, down"):
        _ = layer.gate
    for parts in ({"gate": layer.up, "up": layer.up, "down": layer.down}, {"up": layer.up}):
        with pytest.raises(ValueError, match="have up, down, got"):
            layer.write(**parts)
    with pytest.raises(ValueError, match=r"must have shape \(8, 64, 32\), got \(8, 5, 32\)"):
        layer.write(layer.up[:, :5], layer.down)


@pytest.mark.parametrize("name", [*MERGES, *DROPS])
def test_keeping_all_experts_changes_nothing(name):
    model, trace, before = prepared()
    new = (MERGES | DROPS)[name](model, trace, n_experts=8)
    assert (logits(new) - before).abs().max() < 1e-5


@pytest.mark.parametrize("name", MERGES)
def test_merged_models_store_less_and_survive_their_folder(name, tmp_path):
    model, trace, before = prepared()
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    new = MERGES[name](model, trace, n_experts=3)
    assert isinstance(new, type(model))
    assert sum(len(layer) for layer in expert_view(new)) == 6
    assert expert_sizes(new)["parameters"].sum() == 6 * 2 * 32 * 64
    assert all(len(layer.router) == 8 for layer in expert_view(new))
    assert (logits(new) - before).abs().max() > 1e-3
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    new.save_pretrained(tmp_path)
    assert sum(".experts." in key and key.endswith("wi.weight") for key in Checkpoint(tmp_path)) == 6
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(again) is type(new)
    assert torch.equal(logits(again), logits(new))
    assert [layer.expert_map for layer in expert_view(again)] == [layer.expert_map for layer in expert_view(new)]
    settings = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(again.generate(READ, **settings), new.generate(READ, **settings))


@pytest.mark.parametrize("name", DROPS)
def test_dropping_rows_leaves_a_smaller_model_of_the_same_class(name, tmp_path):
    model, trace, before = prepared(router_bias=True)
    new = DROPS[name](model, trace, n_experts=3)
    assert type(new) is type(model)
    assert {one.num_experts for one in (new.config, new.encoder.config, new.decoder.config)} == {3}
    assert [list(layer.experts) for layer in expert_view(new)] == [["expert_0", "expert_1", "expert_2"]] * 2
    assert [layer.router.shape for layer in expert_view(new)] == [(3, 32)] * 2
    new.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(new))
    assert torch.equal(logits(model), before)
    assert model.encoder.config.num_experts == 8
    if name == "frequency":
        for layer, original in zip(expert_view(new), expert_view(model), strict=True):
            usage = usage_of(trace, model)[layer.name]
            kept = sorted(usage.argsort(descending=True, stable=True)[:3].tolist())
            assert torch.equal(layer.up, original.up[kept])
            assert torch.equal(layer.router, original.router[kept])
            bias = original.router_module.classifier.bias[kept]
            assert torch.equal(layer.router_module.classifier.bias, bias)


def plant():
    """Experts 4 to 7 are experts 0 to 3 with their units in another order."""
    usage, model = [0.2] * 4 + [0.05] * 4, models.tiny_switch()
    names = [layer.name for layer in expert_view(model)]
    model = plant_permuted_copies(model, dict.fromkeys(names, torch.tensor(usage)))
    base = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    return model, made_up_trace(model, usage, torch.cat([base, 0.5 * base], 1), names)


@pytest.mark.parametrize("how", ["weight", "activation", "sketch"])
def test_a_planted_permutation_is_found(how):
    model = models.tiny_switch()
    inputs = expert_inputs(model, [TEXT])
    for layer in expert_view(model):
        spec = spec_of(layer)
        assert spec.sizes == {"units": 64}
        order = random_permutations(spec, seed=1)
        up, down = layer.up.clone(), layer.down.clone()
        moved = permute(spec, order, expert_of(layer, 2))
        up[6], down[6] = moved["up"], moved["down"]
        assert torch.equal(up[6], up[2][order["units"]])
        assert torch.equal(down[6], down[2][:, order["units"]])
        layer.write(up, down)
        x = inputs[layer.name][0]
        seen = {layer.name: (x, torch.full((len(x), 1), 2))}
        back = Aligner(how, sketch=16, inputs=seen)
        if how != "activation":  # units that never fire look alike
            assert torch.equal(order["units"][back.order(layer, 6, 2)["units"]], torch.arange(64))
        same = expert_output(layer, back(layer, 6, 2), x)
        torch.testing.assert_close(same, expert_output(layer, expert_of(layer, 2), x), atol=1e-5, rtol=1e-5)
        assert not back.order(layer, 6, 2).signs


def test_alignment_maximises_the_papers_inner_product():
    layer = expert_view(prepared()[0])[0]
    a, b = expert_of(layer, 0), expert_of(layer, 5)
    c = a["up"] @ b["up"].T + a["down"].T @ b["down"]
    expected = torch.as_tensor(linear_sum_assignment(c.numpy(), maximize=True)[1])
    assert torch.equal(Aligner("weight").order(layer, 5, 0)["units"], expected)


def test_permuted_copies_merge_to_the_original_when_aligned_and_only_then():
    model, trace = plant()
    before = logits(model)
    assert (logits(m_smoe(model, trace, n_experts=4)) - before).abs().max() < 1e-5 * before.abs().max()
    # Much text, since a unit that never fires has no activations to be known by.
    text = {"input_ids": ids(4, n=48), "decoder_input_ids": ids(5, n=48)}
    new = m_smoe(model, trace, n_experts=4, align="activation", batches=[text])
    assert (logits(new) - before).abs().max() < 1e-3 * before.abs().max()
    for layer, original in zip(expert_view(m_smoe(model, trace, n_experts=4)), expert_view(model), strict=True):
        assert layer.expert_map == (0, 1, 2, 3, 0, 1, 2, 3)
        torch.testing.assert_close(layer.up, original.up[:4], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.down, original.down[:4], atol=1e-5, rtol=1e-5)
    for naive in (average_experts, with_(m_smoe, align=False)):
        assert (logits(naive(model, trace, n_experts=4)) - before).abs().max() > 1e-2 * before.abs().max()
    # Clusters of outputs do not ask for an order, and ZipIt joins units that do alike.
    found = hc_smoe(model, trace, n_experts=4, align=True, batches=[TEXT])
    assert expert_view(found)[1].expert_map == (0, 1, 2, 3, 0, 1, 2, 3)
    assert (logits(found) - before).abs().max() < 1e-4
    assert (logits(zipit_experts(model, trace, n_experts=4, batches=[text])) - before).abs().max() < 1e-4


def test_groups_are_averaged_by_usage():
    model, _, _ = prepared()
    trace = made_up_trace(model, [0.6, 0.2, 0.2, 0, 0, 0, 0, 0], None, [layer.name for layer in expert_view(model)])
    new = m_smoe(model, trace, n_experts=1, align=False)
    for layer, original in zip(expert_view(new), expert_view(model), strict=True):
        torch.testing.assert_close(layer.up[0], 0.6 * original.up[0] + 0.2 * original.up[1] + 0.2 * original.up[2])


def test_capacity_is_counted_by_row_as_before_the_merge():
    model, trace, _ = prepared(expert_capacity=2)
    assert (trace.layer(0).experts[:192] == -1).any()  # some found no place
    new = m_smoe(model, trace, n_experts=2)
    merged = trace_of(new)
    assert torch.equal(merged.layer(0).experts, trace.layer(0).experts)
    layer, block = expert_view(new)[0], expert_view(new)[0].block
    x = expert_inputs(model, [TEXT])[layer.name][0].reshape(4, 24, 32)
    mask, weights, _ = block.router(x)
    assert (mask.sum(1) <= 2).all()
    y = block(x)
    for sequence, token in ((0, 0), (1, 7), (3, 23)):
        row = mask[sequence, token].argmax()
        alone = expert_output(layer, expert_of(layer, layer.expert_map[row]), x[sequence, token][None])[0]
        expected = alone * weights[sequence, token] * mask[sequence, token].sum()
        torch.testing.assert_close(y[sequence, token], expected, atol=1e-5, rtol=1e-5)
    assert (y[mask.sum(-1) == 0] == 0).all()  # tokens without a place pass by


def test_sum_chooses_groups_and_gives_them_the_capacity():
    model, trace, _ = prepared(expert_capacity=3)
    new = hc_smoe(model, trace, n_experts=2, router="sum")
    for layer in expert_view(new):
        assert isinstance(layer.router_module, SumRouter)
        x = torch.randn(2, 20, 32)
        mask, weights, raw = layer.router_module(x)
        p = raw.softmax(-1)
        groups = [[row for row, place in enumerate(layer.expert_map) if place == g] for g in range(2)]
        total = torch.stack([p[..., rows].sum(-1) for rows in groups], -1)
        torch.testing.assert_close(weights[..., 0], total.amax(-1))
        for s in range(2):
            for g, rows in enumerate(groups):
                wanted = (total[s].argmax(-1) == g).nonzero().flatten()
                assert mask[s, :, rows[0]].nonzero().flatten().tolist() == wanted[:3].tolist()
        assert mask.sum() == sum(min(3, int((total[s].argmax(-1) == g).sum())) for s in range(2) for g in range(2))


def test_an_expert_that_nobody_asks_for_costs_nothing():
    model = models.tiny_switch()
    with torch.no_grad():
        for layer in expert_view(model):
            layer.router[6:] = layer.router[:6].mean(0)  # never the highest
    trace, before = trace_of(model), logits(model)
    assert all((shares[6:] == 0).all() for shares in usage_of(trace, model).values())
    # Its probability is gone, though, and what is left is shared by the others: outputs are scaled.
    new = drop_experts(model, trace, n_experts=6, router="map")
    assert torch.equal(logits(new), before)
    for number, layer in enumerate(expert_view(model)):
        x = calibration_inputs(model, trace, None)[layer.name][0]
        assert len(x) == (192, 120)[number]
        _, losses = best_subset(layer, x, trace, 7)
        assert losses[tuple(e for e in range(8) if e != 7)] < min(v for k, v in losses.items() if {6, 7} <= {*k})
        assert best_subset(layer, x, trace, 8)[1] == {tuple(range(8)): 0.0}


@pytest.mark.parametrize("rank", [4, 32])
def test_low_rank_plus_all_rows_is_the_merged_model(rank):
    model, trace, _ = prepared()
    merged = m_smoe(model, trace, n_experts=3)
    new = mc_smoe(model, trace, n_experts=3, rank=rank, density=1.0, steps=0)
    assert (logits(new) - logits(merged)).abs().max() < 1e-5
    for layer, whole in zip(expert_view(new), expert_view(merged), strict=True):
        assert (layer.parts, len(layer), layer.expert_map) == (("up", "down"), 3, whole.expert_map)
        torch.testing.assert_close(layer.up, whole.up, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("merge", [mc_smoe, sub_moe])
def test_factored_experts_survive_their_folder(merge, tmp_path):
    model, trace, _ = prepared()
    options = {"steps": 0} if merge is mc_smoe else {"whitening": "full", "align": True}
    new = merge(model, trace, n_experts=3, rank=4, **options)
    new.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(again) is type(new)
    assert torch.equal(logits(again), logits(new))
    generated = again.generate(READ, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, new.generate(READ, max_new_tokens=3, do_sample=False))


def test_merge_then_compress_learns_and_leaves_routers_alone():
    model, trace, before = prepared(dropout_rate=0.1)
    raw = mc_smoe(model, trace, n_experts=3, rank=4, steps=0)
    new = mc_smoe(model, trace, n_experts=3, rank=4, steps=8, lr=5e-3)
    for batch in trace_batches(trace):
        with torch.no_grad():
            assert distillation_loss(model, new, batch) < distillation_loss(model, raw, batch) - 0.05
    rows = 0
    for layer, original in zip(expert_view(new), expert_view(model), strict=True):
        assert torch.equal(layer.router, original.router)
        rows += sum(len(getattr(layer.experts, f"{kind}_rows")) for kind in ("up", "down"))
    assert rows == round(0.1 * 2 * 3 * (64 + 32))
    once, again = (mc_smoe(model, trace, n_experts=3, rank=4, steps=1) for _ in range(2))
    assert torch.equal(logits(once), logits(again))  # dropout and router noise are seeded too
    with pytest.raises(ValueError, match="learns from batches with decoder_input_ids, got input_ids"):
        mc_smoe(model, trace, rank=4, steps=1, batches=lambda generator: READ)
    assert torch.equal(logits(model), before)


def test_factored_experts_respect_capacity():
    model, trace, _ = prepared(expert_capacity=2)
    new = mc_smoe(model, trace, n_experts=3, rank=4, density=1.0, steps=0)
    merged = m_smoe(model, trace, n_experts=3)
    x = torch.randn(2, 20, 32)
    for one, whole in zip(expert_view(new), expert_view(merged), strict=True):
        assert (one.router_module(x)[0].sum(-1) == 0).any()
        torch.testing.assert_close(one.block(x), whole.block(x), atol=1e-5, rtol=1e-5)


def test_the_text_of_a_trace_runs_again_in_pairs():
    model, trace, _ = prepared()
    (batch,) = trace_batches(trace)
    assert torch.equal(batch["input_ids"], ids(0, n=6))
    assert torch.equal(batch["decoder_input_ids"], ids(1, n=6, length=20))
    with torch.no_grad(), record_routing(model) as uneven:
        model.generate(READ, max_new_tokens=3, min_new_tokens=3)
        model(input_ids=READ, decoder_input_ids=WRITTEN)
    shapes = [[list(text.shape) for text in one.values()] for one in trace_batches(uneven)]
    assert shapes == [[[4, 24], [4, 3]], [[4, 24], [4, 16]]]
    with torch.no_grad(), record_routing(model) as lonely:
        model.encoder(READ)
    with pytest.raises(ValueError, match=r"4 texts of the encoder and 0 of the decoder.*give batches="):
        trace_batches(lonely)


def test_a_merged_model_can_be_copied_and_trained():
    model, trace, _ = prepared()
    new = m_smoe(model, trace, n_experts=2)
    assert torch.equal(logits(copy.deepcopy(new)), logits(new))
    new(input_ids=READ, labels=WRITTEN, output_router_logits=True).loss.backward()
    assert all(p.grad.abs().sum() > 0 for layer in expert_view(new) for p in layer.experts.parameters())
    small = drop_experts(model, trace, n_experts=2)
    assert small(input_ids=READ, labels=WRITTEN, output_router_logits=True).loss.isfinite()


def test_half_precision(tmp_path):
    model = models.tiny_switch().bfloat16()
    trace = trace_of(model)
    for new in (m_smoe(model, trace, n_experts=3), mc_smoe(model, trace, n_experts=3, rank=4, steps=0)):
        assert {p.dtype for layer in expert_view(new) for p in layer.experts.parameters()} == {torch.bfloat16}
        assert torch.isfinite(logits(new)).all()
    assert torch.isfinite(logits(drop_experts(model, trace, n_experts=3, by="reconstruction"))).all()


def test_a_folder_names_what_loads_it(tmp_path):
    model, trace, _ = prepared()
    m_smoe(model, trace, n_experts=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "mapped_switch_transformers"
    assert config["expert_map"].keys() == {"encoder.1", "decoder.1"}
    name = "MappedSwitchTransformersForConditionalGeneration"
    assert config["auto_map"]["AutoModelForSeq2SeqLM"] == f"merged_experts.{name}"
    assert name in (tmp_path / "merged_experts.py").read_text()


def test_bad_input_is_named():
    model, trace, _ = prepared()
    merged = m_smoe(model, trace, n_experts=2)
    with pytest.raises(ValueError, match="merged already"):
        m_smoe(merged, trace_of(merged), n_experts=1)
    with pytest.raises(ValueError, match="rank must be in"):
        sub_moe(model, trace, n_experts=2, rank=33)
    with pytest.raises(ValueError, match="uses 1, and the trace has 1"):
        dynamic_skipping(model, trace)
    with pytest.raises(ValueError, match="needs batches with input_ids and decoder_input_ids"):
        m_smoe(model, trace, n_experts=2, merge_weights="fisher", batches=[READ])
    with pytest.raises(ValueError, match="needs batches with input_ids and decoder_input_ids"):
        m_smoe(model, trace, n_experts=2, merge_weights="fisher", batches=[{"input_ids": READ}])
    broken = models.tiny_switch()
    with torch.no_grad():
        broken.encoder.block[1].layer[1].mlp.experts["expert_3"].wo.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"'expert_3.wo.weight' of the experts of 'encoder.block.1.layer.1.mlp'.*NaN"):
        m_smoe(broken, trace, n_experts=2)
    bare = transformers.SwitchTransformersModel(model.config).eval()
    with pytest.raises(ValueError, match="SwitchTransformersForConditionalGeneration"):
        m_smoe(bare, trace, n_experts=2)
    block = torch.nn.Module()
    block.experts = torch.nn.ModuleDict(dict(model.encoder.block[1].layer[1].mlp.experts.items()))
    block.gate = torch.nn.Linear(32, 8)
    with pytest.raises(UnknownExperts, match="dictionary of experts, ModuleDict: only that of Switch"):
        expert_view(torch.nn.ModuleDict({"a": block}))


def test_what_is_stored_and_computed_is_counted_on_each_stacks_own_tokens():
    model = models.tiny_switch()
    with torch.no_grad(), record_routing(model) as trace:
        model(**TEXT)
    frame = compression_frame(model, trace)
    layers = expert_view(model)
    each = [sum(part.numel() for part in layer.expert(0)) for layer in layers]
    assert frame["parameters"].tolist() == [len(layer) * numbers for layer, numbers in zip(layers, each, strict=True)]
    for number, (flops, numbers) in enumerate(zip(frame["flops"], each, strict=True)):
        heard = READ.numel() if frame["layer"][number].startswith("encoder") else WRITTEN.numel()
        served = int((trace.layer(number).experts >= 0).sum())
        assert flops == pytest.approx(2 * numbers * served / heard)
    merged = m_smoe(model, trace, n_experts=3)
    assert compression_frame(merged, trace)["experts"].tolist() == [3] * len(layers)
    assert set(stable_rank_frame(model)["matrix"]) == {"up", "down"}
