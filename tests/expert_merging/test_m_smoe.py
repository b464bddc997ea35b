import copy

import pytest
import torch

from notebook_kit.diagnostics.experts import plant_permuted_copies
from notebook_kit.expert_merging import Aligner, average_experts, drop_experts, expert_view, m_smoe, plan_m_smoe
from notebook_kit.expert_merging.align_experts import expert_of
from notebook_kit.expert_merging.m_smoe import expert_similarity
from notebook_kit.routing import RoutingTrace
from tests.expert_merging.moes import KINDS, Listed, ids, logits, made_up_trace, moe, prepared, trace_of


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_experts_changes_nothing(kind):
    model, trace, before = prepared(kind)
    for merge in (m_smoe, average_experts):
        new = merge(model, trace, n_experts=8)
        assert (logits(new) - before).abs().max() < 1e-6
        assert type(new).__mro__[2] is type(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"align": False}, {"adaptive": True}, {"similarity": "router-weight"}])
def test_fewer_experts_are_stored_and_the_original_is_untouched(kind, options):
    model, trace, before = prepared(kind)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    new = m_smoe(model, trace, n_experts=3, **options)
    layers = expert_view(new)
    assert sum(len(layer) for layer in layers) == 3 * len(layers)
    assert all(layer.experts.gate_up_proj.shape[0] == len(layer) for layer in layers)
    assert all(len(layer.router) == 8 for layer in layers)
    assert torch.isfinite(logits(new)).all()
    assert (logits(new) - before).abs().max() > 1e-3
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(model), before)


def test_alignment_alone_changes_no_function():
    model, _, before = prepared()
    new = copy.deepcopy(model)
    for layer in expert_view(new):
        aligner = Aligner("weight")
        moved = [aligner(layer, e, 0) for e in range(8)]
        assert not torch.equal(moved[3]["gate"], layer.gate[3])
        layer.write(*(torch.stack([weights[name] for weights in moved]) for name in ("gate", "up", "down")))
    assert (logits(new) - before).abs().max() < 1e-5


def plant():
    usage = [0.2, 0.2, 0.2, 0.2, 0.05, 0.05, 0.05, 0.05]
    model = moe()
    model = plant_permuted_copies(
        model, dict.fromkeys([layer.name for layer in expert_view(model)], torch.tensor(usage))
    )
    # Copies are grouped with their original because the router likes both for the same reasons.
    base = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    return model, made_up_trace(model, usage, torch.cat([base, 0.5 * base], 1))


def test_planted_copies_merge_without_loss_when_aligned_and_only_then():
    model, trace = plant()
    plan = plan_m_smoe(model, trace, n_experts=4)
    assert plan["model.layers.0.mlp"].groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    before = logits(model)
    for align in (True, "weight"):
        new = m_smoe(model, trace, n_experts=4, align=align)
        assert (logits(new) - before).abs().max() < 1e-5 * before.abs().max()
        for layer, original in zip(expert_view(new), expert_view(model), strict=True):
            torch.testing.assert_close(layer.gate, original.gate[:4], atol=1e-5, rtol=1e-5)
    for new in (
        m_smoe(model, trace, n_experts=4, align=False),
        average_experts(model, trace, n_experts=4),
        m_smoe(model, trace, n_experts=4, signs=False),
    ):
        assert (logits(new) - before).abs().max() > 1e-2 * before.abs().max()


def test_planted_copies_merge_without_loss_by_activations():
    model, trace = plant()
    before = logits(model)
    new = m_smoe(model, trace, n_experts=4, align="activation", batches=[ids(3, n=24)])
    naive = m_smoe(model, trace, n_experts=4, align=False)
    assert (logits(new) - before).abs().max() < 1e-3 * before.abs().max()
    assert (logits(naive) - before).abs().max() > 1e-2 * before.abs().max()


def test_a_sketch_finds_planted_copies_and_most_of_what_matching_finds():
    layer = expert_view(plant()[0])[0]
    exact, rough = Aligner("weight"), Aligner("sketch", sketch=8)
    for copy_, original in ((4, 0), (5, 1)):
        assert torch.equal(rough.order(layer, copy_, original)["units"], exact.order(layer, copy_, original)["units"])
        assert torch.equal(
            rough.order(layer, copy_, original).signs["units"], exact.order(layer, copy_, original).signs["units"]
        )

    def agreement(aligner):
        a, b = expert_of(layer, 0), aligner(layer, 1, 0)
        return sum((a[name] * b[name]).sum().item() for name in a)

    assert agreement(Aligner("none")) < 0.5 * agreement(rough) < 0.5 * agreement(exact)
    assert torch.equal(Aligner("sketch").order(layer, 1, 0)["units"], exact.order(layer, 1, 0)["units"])  # d is small
    with pytest.raises(ValueError, match=r'how must be .*got "?\'?best'):
        Aligner("best")


def test_an_expert_that_is_never_used_leaves_the_merge_unchanged():
    model, _, _ = prepared()
    trace = made_up_trace(model, [0.3, 0.3, 0.2, 0.2, 0, 0, 0, 0])
    new = m_smoe(model, trace, n_experts=4)
    for layer, original in zip(expert_view(new), expert_view(model), strict=True):
        assert torch.equal(layer.gate, original.gate[:4])
        assert torch.equal(layer.down, original.down[:4])


def test_two_picks_of_one_group_add_their_weights():
    model, trace, _ = prepared()
    block = m_smoe(model, trace, n_experts=1).model.layers[0].mlp
    x = torch.randn(1, 5, 32)
    weights = torch.tensor([[0.7, 0.3]]).expand(5, 2)
    twice = block.experts(x[0], torch.tensor([[2, 6]]).expand(5, 2), weights)
    once = block.experts(x[0], torch.tensor([[4]]).expand(5, 1), torch.ones(5, 1))
    torch.testing.assert_close(twice, once)
    torch.testing.assert_close(block(x)[0], once)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_implementation_agrees(implementation):
    model, trace, _ = prepared()
    new = m_smoe(model, trace, n_experts=3)
    expected = logits(new)
    new.set_experts_implementation(implementation)
    assert (logits(new) - expected).abs().max() < 1e-5


def test_lists_of_experts_share_modules_after_the_merge():
    torch.manual_seed(0)
    model = Listed()
    x = torch.randn(40, 6)
    from notebook_kit.routing import record_routing

    with record_routing(model) as trace:
        before = model(x)
    assert torch.equal(m_smoe(model, trace, n_experts=4)(x), before)
    for align in (True, False, "activation"):
        new = m_smoe(model, trace, n_experts=2, align=align, batches=[x])
        assert len({id(expert) for expert in new.block.experts}) == 2
        assert sum(p.numel() for p in new.block.experts.parameters()) == 2 * 3 * 30
        assert torch.isfinite(new(x)).all()
    assert len({id(expert) for expert in model.block.experts}) == 4


def test_similarity_bases_differ_and_weights_see_permuted_copies_as_strangers():
    model, trace = plant()
    layer = expert_view(model)[0]
    by_logits, by_row, by_weight = (
        expert_similarity(layer, trace.layer(0).logits, basis) for basis in ("router-logits", "router-weight", "weight")
    )
    assert by_logits[0, 4] == pytest.approx(1, abs=1e-5)
    assert by_row[0, 4] == pytest.approx(1, abs=1e-5)
    assert by_weight[0, 4] < 0.7


def test_the_aligner_matches_a_pair_once(monkeypatch):
    model, _, _ = prepared()
    layer, aligner = expert_view(model)[0], Aligner("weight")
    first = aligner(layer, 3, 0)
    monkeypatch.setattr("notebook_kit.expert_merging.align_experts.weight_matching", None)
    again = aligner(layer, 3, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(aligner(layer, 0, 0)[name], expert_of(layer, 0)[name]) for name in ("gate", "up", "down"))


def test_sixteen_bit_models_stay_sixteen_bit():
    model, trace, _ = prepared()
    half = copy.deepcopy(model).to(torch.bfloat16)
    for options in ({}, {"align": "activation", "batches": [ids()]}):
        new = m_smoe(half, trace, n_experts=2, **options)
        assert {parameter.dtype for parameter in new.parameters()} == {torch.bfloat16}


def test_bad_input_is_named():
    model, trace, _ = prepared()
    with pytest.raises(ValueError, match=r"n_experts must be in \[1, 8\], got 9 \(m_smoe\)"):
        m_smoe(model, trace, n_experts=9)
    with pytest.raises(ValueError, match=r"n_experts must be in \[1, 512\]"):
        m_smoe(model, trace, n_experts=0)
    with pytest.raises(ValueError, match=r"\(average_experts\)"):
        average_experts(model, trace, n_experts=9)
    with pytest.raises(ValueError, match="trace is empty"):
        m_smoe(model, RoutingTrace(list(trace.layers), k=2))
    with pytest.raises(ValueError, match="m_smoe needs at least one batch"):
        m_smoe(model, trace, align="activation", batches=[])
    with pytest.raises(ValueError, match="needs batches"):
        Aligner("activation")
    with pytest.raises(ValueError, match="merged already"):
        m_smoe(m_smoe(model, trace), trace)
    with pytest.raises(ValueError, match="align must be one of True, False"):
        m_smoe(model, trace, align="somehow")
    other = trace_of(moe("qwen3_moe"))
    assert m_smoe(model, other) is not None  # same layers, same experts: nothing could tell
    with pytest.raises(ValueError, match="another model"):
        drop_experts(model, trace_of(moe("deepseek_v3")))
