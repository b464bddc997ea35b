"""Distances of experts by hand, usage, and SMoRA at another k."""

import pytest
import torch
from torch import nn

from notebook_kit.adapters import attach
from notebook_kit.diagnostics.lora_mixtures import expert_distances, group_shares, rank_use, redundancy, usage
from notebook_kit.mixtures import LoRAMoE, MoLA, SMoRA
from notebook_kit.models import MLP
from tests.adapters.conftest import disturb


def layer():
    made = MoLA(nn.Linear(6, 5), n_experts=4, rank=2, alpha=3)
    made.B.data.normal_()
    return made


def test_distances_and_cosines_of_the_matrices():
    made = layer()
    deltas = (made.scaling[:, None, None] * made.B @ made.A).flatten(1)
    distance, cosine = expert_distances(made)
    torch.testing.assert_close(distance, torch.cdist(deltas, deltas), atol=1e-4, rtol=1e-4)
    expected = nn.functional.cosine_similarity(deltas[:, None], deltas[None], dim=2)
    torch.testing.assert_close(cosine, expected, atol=1e-5, rtol=1e-5)


def test_what_scale_and_order_change():
    made = layer()
    distance, cosine = expert_distances(made)
    made.B.data *= 3
    wide, same = expert_distances(made)
    torch.testing.assert_close(wide, 3 * distance, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(same, cosine)
    order = torch.tensor([2, 0, 3, 1])
    made.A.data, made.B.data = made.A.data[order], made.B.data[order]
    torch.testing.assert_close(expert_distances(made)[0], wide[order][:, order])


def test_equal_experts_are_redundant():
    made = layer()
    made.A.data[:], made.B.data[:] = made.A.data[:1].clone(), made.B.data[:1].clone()
    table = redundancy(made)
    assert table.distance[0] == pytest.approx(0, abs=1e-3)
    assert table.cosine[0] == pytest.approx(1)
    made.B.data.zero_()
    assert redundancy(made).cosine[0] == 0


def test_the_table_of_a_model():
    model = MLP([6, 6, 6])
    MoLA.allocate(model, [1, 3], targets="layers", rank=2)
    assert redundancy(model).distance.isna().tolist() == [True, False]
    model(torch.randn(9, 6))
    table = redundancy(model)
    assert table.n_experts.tolist() == [1, 3]
    assert table.parameters.tolist() == [2 * 12 + 6, 3 * 2 * 12 + 3 * 6]
    assert table.largest_load[0] == 1
    with pytest.raises(ValueError, match="MLP carries no mixture"):
        redundancy(MLP([2, 2]))


def test_usage_is_the_mean_weight():
    made = layer()
    made(torch.randn(6, 6))
    labels = torch.tensor([0, 0, 1, 1, 1, -1])
    table = usage(made.routing, labels, 3)
    dense = torch.zeros(6, 4).scatter_(1, made.routing.experts, made.routing.weights.detach())
    torch.testing.assert_close(torch.tensor(table[0]), dense[:2].mean(0))
    assert table[2].sum() == 0


def test_shares_of_the_first_group():
    model = MLP([6, 6, 6]).eval()
    attach(model, LoRAMoE, targets="layers", n_experts=4, rank=2)
    model.layers[0].router.weight.data.zero_()
    model(torch.randn(3, 6))
    shares = group_shares(model)
    assert shares[0] == pytest.approx(0.5)
    assert shares.shape == (2,)


def test_other_numbers_of_ranks_leave_the_model_as_it_was():
    model = MLP([6, 6, 6]).eval()
    attach(model, SMoRA, targets="layers", rank=6, k=2)
    disturb(model)
    x, labels = torch.randn(4, 6), torch.tensor([0, 0, 1, 1])
    before = model(x).detach()
    use = rank_use(model, x, labels, ["a", "b"], lambda m: m(x).sum().item(), (1, 2, 6))
    assert torch.equal(model(x), before)
    assert use.curve[2] == pytest.approx(float(before.sum()), abs=1e-4)
    assert use.k == 2
    assert len(use.scores) == 2
    assert use.curve[1] != use.curve[6]
