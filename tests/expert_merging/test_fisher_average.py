import copy

import pytest
import torch
from torch import nn

from notebook_kit.expert_merging import expert_view, m_smoe
from notebook_kit.expert_merging.align_experts import Aligner
from notebook_kit.expert_merging.fisher_average import expert_fishers, fisher_average
from tests.expert_merging.moes import KINDS, Listed, ids, logits, made_up_trace, moe, prepared
from tests.expert_merging.test_m_smoe import plant


def test_by_hand():
    layer = expert_view(moe())[0]
    fishers = copy.deepcopy(layer.block)
    with torch.no_grad():
        fishers.experts.gate_up_proj.zero_()
        for e, f in ((0, 1.0), (1, 3.0), (2, 5.0)):
            fishers.experts.gate_up_proj[e] = f
        fishers.experts.down_proj.zero_()
    combine = fisher_average(Aligner("none"), {layer.name: type(layer)(layer.name, fishers)})
    gate, up, down = combine(layer, (0, 1), (0.8, 0.2))
    torch.testing.assert_close(gate, (layer.gate[0] + 3 * layer.gate[1]) / 4)
    torch.testing.assert_close(up, (layer.up[0] + 3 * layer.up[1]) / 4)
    torch.testing.assert_close(down, 0.8 * layer.down[0] + 0.2 * layer.down[1])  # nothing is felt: the plan decides


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_fishers_are_squares_of_gradients(kind):
    model = copy.deepcopy(prepared(kind)[0])
    model.requires_grad_(False)
    batches = [ids(0, n=2), {"input_ids": ids(1, n=2)}]
    fishers = expert_fishers(model, batches)
    assert not any(p.requires_grad for p in model.parameters())
    (first, *_), layers = expert_view(model), expert_view(model)
    weight = first.experts.down_proj.requires_grad_()
    squares = []
    for batch in (ids(0, n=2), ids(1, n=2)):
        z = model(batch).logits
        loss = nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        squares.append(torch.autograd.grad(loss, weight)[0].square())
    felt = fishers[first.name].experts.down_proj
    torch.testing.assert_close(felt, sum(squares) / 2, rtol=1e-3, atol=1e-9 * felt.max().item())
    assert list(fishers) == [layer.name for layer in layers]


@pytest.mark.parametrize("kind", KINDS)
def test_all_kept_is_the_identity_and_fewer_are_stored(kind):
    model, trace, before = prepared(kind)
    new = m_smoe(model, trace, n_experts=8, merge_weights="fisher")
    assert (logits(new) - before).abs().max() < 1e-5 * before.abs().max()
    new = m_smoe(model, trace, n_experts=3, merge_weights="fisher")
    assert [len(layer) for layer in expert_view(new)] == [3] * len(expert_view(new))
    assert torch.isfinite(logits(new)).all()
    assert (logits(new) - logits(m_smoe(model, trace, n_experts=3))).abs().max() > 1e-3


def test_planted_copies_merge_without_loss():
    model, trace = plant()
    before = logits(model)
    new = m_smoe(model, trace, n_experts=4, merge_weights="fisher", batches=[ids(3)])
    assert (logits(new) - before).abs().max() < 1e-5 * before.abs().max()
    naive = m_smoe(model, trace, n_experts=4, merge_weights="fisher", batches=[ids(3)], align=False)
    assert (logits(naive) - before).abs().max() > 1e-2 * before.abs().max()


def test_half_precision_stays():
    model, trace, _ = prepared()
    half = copy.deepcopy(model).to(torch.bfloat16)
    new = m_smoe(half, trace, n_experts=2, merge_weights="fisher")
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in new.parameters())


def test_bad_input_is_named():
    model, trace, _ = prepared()
    with pytest.raises(ValueError, match="at least one batch"):
        expert_fishers(model, [])
    with pytest.raises(ValueError, match=r"token ids \[n, length >= 2\], got \[4, 1\]"):
        expert_fishers(model, [ids(length=1)])
    with pytest.raises(ValueError, match="at least one batch"):
        m_smoe(model, trace, merge_weights="fisher", batches=iter([]))
    torch.manual_seed(0)
    listed = Listed()
    with pytest.raises(ValueError, match="token ids"):
        expert_fishers(listed, [torch.randn(4, 6)])
    with pytest.raises(ValueError, match="merge_weights must be one of 'frequency', 'uniform', 'reversed', 'random'"):
        m_smoe(model, trace, merge_weights="somehow")
    assert all(p.requires_grad for p in model.parameters())  # a failed call leaves the model as it was


def test_random_weights_follow_the_seed():
    model, trace, _ = prepared()
    one, same, other = (m_smoe(model, trace, n_experts=2, merge_weights="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(logits(one), logits(same))
    assert not torch.equal(logits(one), logits(other))


def test_outputs_group_permuted_copies():
    model, _ = plant()
    # The router has no reason to see that 4 to 7 are copies of 0 to 3; their outputs tell.
    trace = made_up_trace(model, [0.2, 0.2, 0.2, 0.2, 0.05, 0.05, 0.05, 0.05])
    before = logits(model)
    found = m_smoe(model, trace, n_experts=4, similarity="output", batches=[ids(3)])
    assert [layer.expert_map for layer in expert_view(found)] == [(0, 1, 2, 3, 0, 1, 2, 3)] * 2
    assert (logits(found) - before).abs().max() < 1e-5 * before.abs().max()
    blind = m_smoe(model, trace, n_experts=4)
    assert (logits(blind) - before).abs().max() > 1e-2 * before.abs().max()
