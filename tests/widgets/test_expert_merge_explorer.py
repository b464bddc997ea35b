import pytest
import torch

from notebook_kit.expert_merging import drop_experts, hc_smoe, m_smoe, sub_moe
from notebook_kit.figures.experts import expert_merge_figure
from notebook_kit.routing import RoutingTrace
from notebook_kit.widgets import ExpertMergeExplorer
from tests.expert_merging.moes import ids, logits, made_up_trace, prepared


def explorer(**options):
    model, trace, before = prepared()
    calls = []

    def score(merged):
        calls.append(1)
        return -float((logits(merged) - before).abs().mean())

    return model, trace, ExpertMergeExplorer(model, trace, score, **options), calls


def test_moving_a_control_shows_what_the_function_gives():
    model, trace, shown, _ = explorer()
    controls = {control["name"]: control for control in shown.controls}
    assert (controls["n_experts"]["low"], controls["n_experts"]["high"]) == (1, 8)
    assert controls["layer"]["high"] == 1
    assert controls["align"]["options"] == [True, False]
    shown.settings = {"n_experts": 2, "align": False}
    assert shown.code == "expert_merge_view(model, trace, n_experts=2, align=False)"
    assert torch.equal(logits(shown.value.model), logits(m_smoe(model, trace, n_experts=2, align=False)))
    shown.settings = {"n_experts": 8, "align": True}
    assert shown.score == pytest.approx(0, abs=1e-6)


def test_another_layer_costs_no_score():
    _, _, shown, calls = explorer()
    before = shown.score
    shown.settings = {"layer": 1}
    assert len(calls) == 1
    assert shown.score == before
    shown.settings = {"n_experts": 3}
    assert len(calls) == 2


def test_activations_and_pins():
    _, _, shown, _ = explorer(batches=[ids()], n_experts=3)
    shown.settings = {"align": "activation"}
    shown.pin()
    assert "align=activation" in shown.pins[0]["label"]
    assert len(shown.value.groups) == 3
    assert shown.value.model is not prepared()[0]


def test_every_method_is_offered_and_what_was_seen_stays():
    model, trace, shown, _ = explorer(n_experts=3)
    methods = next(control for control in shown.controls if control["name"] == "method")["options"]
    for method in methods:
        shown.settings = {"method": method}
        assert len(shown.value.groups) == 3
    expected = {
        "hierarchical": hc_smoe(model, trace, n_experts=3, align=True, n_calibration=512),
        "subspace": sub_moe(model, trace, n_experts=3, align=True, n_calibration=512),
        "reconstruction": drop_experts(model, trace, n_experts=3, by="reconstruction", n_calibration=512),
    }
    for method, model_of in expected.items():
        shown.settings = {"method": method}
        assert torch.equal(logits(shown.value.model), logits(model_of))
    picture = expert_merge_figure(shown.value, shown.score, seen=[(1, "merge", True, 0.0)])
    assert len(picture.data) == 2 + len(methods)


def test_a_trace_without_tokens_offers_what_needs_none():
    model, _, _ = prepared()
    trace = made_up_trace(model, [1 / 8] * 8)
    trace._chunks["tokens"][0] = -torch.ones(len(trace), dtype=torch.long)
    methods = next(c for c in ExpertMergeExplorer(model, trace).controls if c["name"] == "method")["options"]
    assert methods == ["merge", "drop", "replace"]


def test_bad_input_is_named():
    model, trace, shown, _ = explorer()
    with pytest.raises(ValueError, match=r"n_experts must be in \[1, 8\]"):
        shown.settings = {"n_experts": 9}
    with pytest.raises(ValueError, match="trace is empty"):
        ExpertMergeExplorer(model, RoutingTrace(list(trace.layers), k=2))
    assert ExpertMergeExplorer(model, trace).score is None
