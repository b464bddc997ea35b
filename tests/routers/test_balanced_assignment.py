"""BASE: the worked example, exactness against scipy, and that training and evaluation decide differently."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from notebook_kit.mixtures import MoE
from notebook_kit.routers import BalancedAssignment
from notebook_kit.routers.assignment import balanced_assignment

CARD = torch.tensor([[3.0, 2], [4, 1], [5, 4.5], [1, 0]])


def by_scipy(scores, slots):
    """The largest total that a general solver finds."""
    columns = np.repeat(scores.double().numpy(), slots, axis=1)
    rows, chosen = linear_sum_assignment(columns, maximize=True)
    return columns[rows, chosen].sum()


def test_the_worked_example():
    routing = BalancedAssignment(1, 2).train().route(CARD)
    assert routing.experts.reshape(-1).tolist() == [0, 0, 1, 1]
    assert CARD.gather(1, routing.experts).sum() == 11.5
    torch.testing.assert_close(routing.weights, CARD.gather(1, routing.experts).sigmoid())
    assert BalancedAssignment(1, 2).eval().route(CARD).experts.reshape(-1).tolist() == [0, 0, 0, 0]
    assert BalancedAssignment(1, 2, evaluation="balanced").eval().route(CARD).load.tolist() == [0.5, 0.5]


@settings(deadline=None, max_examples=40)
@given(
    n_tokens=st.integers(1, 40),
    n_experts=st.integers(1, 9),
    kind=st.sampled_from(["normal", "few values", "skewed", "heavy tails", "equal rows"]),
    seed=st.integers(0, 10_000),
)
def test_it_is_the_best_assignment_there_is(n_tokens, n_experts, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n_tokens, n_experts, generator=generator)
    if kind == "few values":
        scores = scores.round()
    if kind == "skewed":
        scores = scores + 5 * torch.randn(n_experts, generator=generator)
    if kind == "heavy tails":
        scores = scores.sinh() ** 5
    if kind == "equal rows":
        scores = scores[:1].repeat(n_tokens, 1)
    slots = -(-n_tokens // n_experts)
    experts = balanced_assignment(scores, slots)
    assert torch.bincount(experts, minlength=n_experts).max() <= slots
    total = scores.double().gather(1, experts[:, None]).sum().item()
    assert total == pytest.approx(by_scipy(scores, slots), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("rows", [1, 4096])
def test_many_tokens(rows):
    scores = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0)) + torch.linspace(-3, 3, 16)
    scores = scores.repeat(4096 // rows, 1)
    assert torch.bincount(balanced_assignment(scores, 256)).tolist() == [256] * 16


def test_a_constant_added_to_a_row_changes_nothing():
    scores = torch.randn(24, 4)
    moved = scores + torch.randn(24, 1)
    assert torch.equal(balanced_assignment(scores, 6), balanced_assignment(moved, 6))


def test_infinite_scores_forbid_and_force():
    scores = torch.zeros(4, 2)
    scores[0, 0] = scores[1, 0] = -torch.inf
    scores[2, 1] = scores[3, 0] = torch.inf
    assert balanced_assignment(scores, 2).tolist()[3] == 0
    assert balanced_assignment(scores, 3)[:2].tolist() == [1, 1]


def test_gradient_reaches_w_through_sigma_alone():
    router = BalancedAssignment(6, 3)
    x = torch.randn(9, 6)
    routing = router(x)
    routing.weights.sum().backward()
    assert router.weight.grad.abs().sum() > 0
    expected = sum(
        (a.sigmoid() * (1 - a.sigmoid())) * row
        for row, a, e in zip(x, routing.logits.detach().gather(1, routing.experts), routing.experts, strict=True)
        if int(e) == 0
    )
    torch.testing.assert_close(router.weight.grad[0], expected)
    assert routing.aux_loss == 0


class Residual(torch.nn.Module):
    """The paper's expert: x + FF2(relu(FF1(LN x))), FF2 at zero."""

    def __init__(self, d):
        super().__init__()
        self.norm, self.ff1, self.ff2 = torch.nn.LayerNorm(d), torch.nn.Linear(d, 8), torch.nn.Linear(8, d, bias=False)
        torch.nn.init.zeros_(self.ff2.weight)

    def inner(self, x):
        return self.ff2(self.ff1(self.norm(x)).relu())

    def forward(self, x):
        return x + self.inner(x)


class Inner(torch.nn.Module):
    def __init__(self, expert):
        super().__init__()
        self.expert = expert

    def forward(self, x):
        return self.expert.inner(x)


def test_the_layer_starts_as_the_identity_and_equals_a_residual_around_the_inner_experts():
    experts, x = [Residual(6) for _ in range(3)], torch.randn(9, 6)
    base = MoE(experts, BalancedAssignment(6, 3), residual=True)
    torch.testing.assert_close(base(x), x)
    for expert in experts:
        torch.nn.init.normal_(expert.ff2.weight)
    inner = MoE([Inner(expert) for expert in experts], base.router)
    torch.testing.assert_close(base(x), x + inner(x))
    a = base.router.logits(x).gather(1, base.routing.experts)
    by_hand = torch.cat([experts[int(e)](row[None]) for row, e in zip(x, base.routing.experts, strict=True)])
    torch.testing.assert_close(base(x), a.sigmoid() * by_hand + (1 - a.sigmoid()) * x)


def test_it_sees_the_future_where_it_is_balanced():
    assert BalancedAssignment(6, 3).causal
    assert not BalancedAssignment(6, 3, evaluation="balanced").causal
