"""Expert choice: the worked example, even load, and that it sees the future."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.routers import ExpertChoice


def test_the_worked_example():
    z = torch.tensor([[2.0, 0], [1, 1], [0, 2], [3, 2]])
    routing = ExpertChoice(1, 2, k=1).route(z)  # C = 4 * 1 / 2 = 2
    assert routing.experts.tolist() == [[0], [1], [1], [0]]
    assert routing.weights.reshape(-1).tolist() == pytest.approx([0.8808, 0.5, 0.8808, 0.7311], abs=1e-4)


@settings(deadline=None, max_examples=30)
@given(n_tokens=st.integers(1, 30), n_experts=st.integers(1, 7), data=st.data())
def test_every_expert_is_full(n_tokens, n_experts, data):
    k = data.draw(st.integers(1, n_experts))
    z = torch.randint(-2, 3, (n_tokens, n_experts)).float()  # many ties
    routing = ExpertChoice(1, n_experts, k=k).route(z)
    counts = torch.bincount(routing.experts[routing.experts >= 0], minlength=n_experts)
    assert counts.tolist() == [-(-n_tokens * k // n_experts)] * n_experts
    assert (routing.weights[routing.experts < 0] == 0).all()
    torch.testing.assert_close(routing.load, torch.full((n_experts,), 1 / n_experts))


def test_a_later_token_changes_an_earlier_one():
    z = torch.tensor([[1.0, 0], [0.5, 0], [0, 1], [0, 1]])
    before = ExpertChoice(1, 2, k=1).route(z).experts[:2]
    z[3] = torch.tensor([5.0, 0])
    assert not torch.equal(ExpertChoice(1, 2, k=1).route(z).experts[:2], before)
    assert not ExpertChoice.causal


def test_ties_go_to_the_earlier_token():
    assert ExpertChoice(1, 2, k=1).route(torch.zeros(4, 2)).experts.tolist() == [[0, 1], [0, 1], [-1, -1], [-1, -1]]


def test_padding_is_never_chosen():
    mask = torch.tensor([0, 1, 1, 1, 1, 0]).bool()
    z = torch.randn(6, 2)
    routing = ExpertChoice(1, 2, k=1).route(z, mask=mask)
    assert (routing.experts[~mask] == -1).all()
    assert torch.bincount(routing.experts[routing.experts >= 0]).tolist() == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_gradient(dtype):
    router = ExpertChoice(8, 4).to(dtype)
    routing = router(torch.randn(10, 8, dtype=dtype))
    routing.weights.sum().backward()
    assert router.weight.grad.abs().sum() > 0


def test_bad_and_empty_input():
    assert ExpertChoice(8, 4)(torch.randn(0, 8)).experts.shape == (0, 1)
    with pytest.raises(ValueError, match="k must be at most n_experts=2, got 3"):
        ExpertChoice(8, 2, k=3)
    with pytest.raises(ValueError, match="NaN"):
        ExpertChoice(8, 2).route(torch.full((2, 2), float("nan")))
