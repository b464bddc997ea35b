"""SMoRA: gates, the bias that evens the load, every granularity."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from notebook_kit.mixtures import LoRAMoE, SMoRA, split_experts, stack_experts


def layer(**values):
    made = SMoRA(nn.Linear(12, 10), **{"rank": 8, "k": 4} | values).eval()
    made.B.data.normal_()
    return made


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([1, 2, 4]), st.sampled_from(["renormalised", "raw"]), st.integers(0, 99))
def test_the_formula(granularity, gate, seed):
    torch.manual_seed(seed)
    if gate == "renormalised" and granularity == 4:
        gate = "raw"
    made, x = layer(granularity=granularity, gate=gate, alpha=6), torch.randn(5, 12)
    y, blocks = made(x), 8 // granularity
    s = (x @ made.router.weight.T).softmax(1)
    best = s.topk(4 // granularity).indices
    G = torch.zeros_like(s).scatter(1, best, s.gather(1, best))
    if gate == "renormalised":
        G = 4 // granularity * G / G.sum(1, keepdim=True)
        torch.testing.assert_close(G.sum(1) * granularity, torch.full((5,), 4.0))  # mean 1 over the active ranks
    assert ((G > 0).sum(1) == 4 // granularity).all()
    A, B = stack_experts(made.A, made.B)
    expected = made.host(x) + 6 / 4 * (G.repeat_interleave(granularity, 1) * (x @ A.T)) @ B.T
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    assert made.n_experts == blocks


def test_an_even_router_is_a_lora_of_the_picked_ranks():
    made, x = layer(), torch.randn(5, 12)
    made.router.weight.data.zero_()  # ties go to the lowest index
    A, B = stack_experts(made.A, made.B)
    torch.testing.assert_close(made(x), made.host(x) + x @ (B[:, :4] @ A[:4]).T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularity", [1, 2, 4, 8])
def test_all_ranks_at_even_gates_are_a_plain_lora(granularity):
    made, x = layer(k=8, granularity=granularity), torch.randn(5, 12)
    if granularity < 8:  # a single block has gate 1 whatever its router says
        made.router.weight.data.zero_()
    A, B = stack_experts(made.A, made.B)
    torch.testing.assert_close(made(x), made.host(x) + x @ (B @ A).T, atol=1e-5, rtol=1e-5)


def test_a_token_sees_a_change_of_rank_k():
    made = layer()
    x = torch.randn(1, 12)
    made(x)
    picked, weights = made.routing.experts[0], made.routing.weights[0]
    A, B = stack_experts(made.A, made.B)
    delta = (B[:, picked] * weights) @ A[picked]
    assert torch.linalg.matrix_rank(delta) == 4
    torch.testing.assert_close(made(x), made.host(x) + x @ delta.T, atol=1e-5, rtol=1e-5)


def test_the_bias_selects_and_does_not_weigh():
    made, x = layer(gate="raw"), torch.randn(6, 12)
    made(x)
    first = made.routing
    made.router.bias += 0.3  # for all alike: nothing changes
    made(x)
    assert torch.equal(made.routing.experts, first.experts)
    made.router.bias[3] += 5
    made(x)
    assert (made.routing.experts == 3).any(1).all()
    torch.testing.assert_close(made.routing.weights, made.routing.probs.gather(1, made.routing.experts))


def test_the_step_of_the_bias_by_hand():
    router = layer(rank=4, k=1, gate="raw", bias_rate=0.001).router
    router.counts.copy_(torch.tensor([5.0, 3, 2, 2]))
    router.update_bias()
    torch.testing.assert_close(router.bias, torch.tensor([-0.001, 0, 0.001, 0.001]))


def test_training_evens_the_load():
    torch.manual_seed(1)
    made, x = layer(bias_rate=0.01).train(), torch.randn(200, 12) + 1
    with torch.no_grad():
        made(x)
        uneven = made.routing.load.max()
        for _ in range(60):
            made(x)
    assert made.routing.load.max() < 0.75 * uneven


def test_more_combinations_at_the_same_cost():
    fine, coarse = SMoRA(nn.Linear(64, 64)), SMoRA(nn.Linear(64, 64), granularity=8, gate="raw")
    counts = [math.comb(made.n_experts, made.router.k) for made in (fine, coarse)]
    assert counts == [4426165368, 8]
    assert fine.A.numel() == coarse.A.numel()


def test_a_bank_of_loras_becomes_ranks_and_back():
    bank = LoRAMoE(nn.Linear(12, 10), n_experts=4, rank=2)
    A, B = stack_experts(bank.A.detach(), bank.B.detach())
    fine = layer()
    fine.A.data, fine.B.data = (part.contiguous() for part in split_experts(A, B, 8))
    back = split_experts(*stack_experts(fine.A, fine.B), 4)
    assert torch.equal(back[0], bank.A)
    assert torch.equal(back[1], bank.B)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"k": 9}, "k=9 must be at most rank=8"),
        ({"granularity": 3}, "granularity=3 must divide both"),
        ({"granularity": 4}, "use gate='raw', or a smaller granularity"),
    ],
)
def test_what_does_not_fit(values, match):
    with pytest.raises(ValueError, match=match):
        layer(**values)


def test_a_single_raw_sigmoid_does_not_fold():
    made = layer(k=8, granularity=8, gate="raw", scores="sigmoid")
    with pytest.raises(ValueError, match="single expert of constant weight"):
        made.factors()
    layer(k=8, granularity=8, gate="raw").factors()
