import pytest
import torch
from transformers import AutoModelForCausalLM

from notebook_kit.diagnostics.experts import plant_permuted_copies
from notebook_kit.expert_merging import calibration_inputs, expert_view, hc_smoe, plan_hc_smoe, usage_of
from notebook_kit.expert_merging.clusters import agglomerate
from notebook_kit.expert_merging.hc_smoe import LINKAGES
from tests.expert_merging.moes import KINDS, ids, logits, moe, prepared, trace_of

FREE = [kind for kind in KINDS if kind != "deepseek_v3"]


def test_by_hand():
    points = torch.tensor([[0.0], [0.1], [1.0]])
    from notebook_kit.diagnostics.experts import linkage_of

    for linkage in LINKAGES:
        assert agglomerate(points, 2, linkage) == ((0, 1), (2,))
    assert linkage_of(points.numpy())[1, 2] == pytest.approx(0.95)
    assert linkage_of(points.numpy(), "complete")[1, 2] == pytest.approx(1.0)
    assert linkage_of(points.numpy(), "single")[1, 2] == pytest.approx(0.9)
    assert agglomerate(points, 3) == ((0,), (1,), (2,))
    assert agglomerate(points[:1], 1) == ((0,),)


@pytest.mark.parametrize("kind", KINDS)
def test_all_kept_is_the_identity_and_fewer_survive_a_folder(kind, tmp_path):
    model, trace, before = prepared(kind)
    assert (logits(hc_smoe(model, trace, n_experts=8)) - before).abs().max() < 1e-6
    new = hc_smoe(model, trace, n_experts=3)
    assert [len(layer) for layer in expert_view(new)] == [3] * len(expert_view(model))
    new.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(new))


@pytest.mark.parametrize("kind", FREE)
def test_mean_rows_make_a_model_of_the_same_class(kind, tmp_path):
    model, trace, before = prepared(kind)
    assert (logits(hc_smoe(model, trace, n_experts=8, router="mean")) - before).abs().max() < 1e-6
    new = hc_smoe(model, trace, n_experts=3, router="mean")
    assert type(new) is type(model)
    plan = plan_hc_smoe(model, trace, calibration_inputs(model, trace, None), n_experts=3)
    for layer, original in zip(expert_view(new), expert_view(model), strict=True):
        groups = sorted(plan[layer.name].groups, key=lambda group: group[0])
        expected = torch.stack([original.router[list(group)].mean(0) for group in plan[layer.name].groups])
        assert {tuple(row) for row in layer.router.tolist()} == {tuple(row) for row in expected.tolist()}
        assert len(groups) == len(layer)
    new.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(new))
    assert torch.equal(logits(model), before)


def test_outputs_find_permuted_twins_and_alignment_makes_their_merge_lossless():
    model = moe()
    usage = dict.fromkeys([layer.name for layer in expert_view(model)], torch.tensor([0.2] * 4 + [0.05] * 4))
    planted = plant_permuted_copies(model, usage)
    trace, before = trace_of(planted), logits(planted)
    plan = plan_hc_smoe(planted, trace, calibration_inputs(planted, trace, None), n_experts=4)
    for layer in plan.values():
        assert {frozenset(group) for group in layer.groups} == {frozenset((e, e + 4)) for e in range(4)}
    aligned = logits(hc_smoe(planted, trace, n_experts=4, align=True))
    naive = logits(hc_smoe(planted, trace, n_experts=4))
    assert (aligned - before).abs().max() < 1e-4 * before.abs().max()
    assert (naive - before).abs().max() > 1e-2 * before.abs().max()
    # The dominant member alone is exact too: its twins compute the same.
    alone = logits(hc_smoe(planted, trace, n_experts=4, merge_weights="dominant"))
    assert (alone - before).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize("linkage", LINKAGES)
def test_every_linkage_and_usage_lead(linkage):
    model, trace, _ = prepared()
    usage = usage_of(trace, model)
    inputs = calibration_inputs(model, trace, [ids()], most=100)
    for name, layer in plan_hc_smoe(model, trace, inputs, n_experts=4, linkage=linkage).items():
        assert len(layer.groups) == 4
        assert all(usage[name][group[0]] == usage[name][list(group)].max() for group in layer.groups)


def test_bad_input_is_named():
    model, trace, _ = prepared()
    with pytest.raises(ValueError, match=r"\(hc_smoe\)"):
        hc_smoe(model, trace, n_experts=9)
    with pytest.raises(ValueError, match="linkage must be one of"):
        hc_smoe(model, trace, linkage="centroid")
    deepseek, deepseek_trace, _ = prepared("deepseek_v3")
    with pytest.raises(ValueError, match="groups of experts"):
        hc_smoe(deepseek, deepseek_trace, router="mean")
