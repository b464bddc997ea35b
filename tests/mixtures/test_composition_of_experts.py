"""The budget programme by hand and against enumeration, the table at work, and what happens when it cannot be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from notebook_kit.mixtures import CompositionOfExperts
from notebook_kit.mixtures.composition_of_experts import entropy
from notebook_kit.mixtures.expert_budget import agreeing_labels, compose, mean_win_rate, win_rates

S = torch.tensor([[0.9, 0.5, 0.6], [0.2, 0.8, 0.6]])
SIZES, TRAFFIC = (7, 9, 4), (30, 70)


class Says(nn.Module):
    """An expert that gives its number, and counts how many prompts it saw."""

    def __init__(self, number, size=3):
        super().__init__()
        self.weight, self.number, self.seen = nn.Parameter(torch.zeros(size)), number, 0

    def forward(self, x):
        self.seen += len(x)
        return torch.full((len(x), 1), float(self.number)) + 0 * x[:, :1]


def made(threshold=None, budget=None, scores=S, general=None, dtype=torch.float32):
    """Prompts are their category logits."""
    experts = [Says(k, size) for k, size in enumerate(SIZES)]
    options = {"traffic": TRAFFIC, "general": general, "budget": budget, "threshold": threshold}
    return CompositionOfExperts(experts, nn.Identity(), scores.to(dtype), **options)


@pytest.mark.parametrize(
    ("budget", "hosted", "value"),
    [
        (4, (2,), 60),
        (9, (1,), 71),
        (11, (1,), 71),
        (13, (1, 2), 74),
        (16, (0, 1), 83),
        (20, (0, 1), 83),
    ],
)
def test_the_worked_example(budget, hosted, value):
    found = compose(S, SIZES, budget, traffic=TRAFFIC)
    assert found.hosted == hosted
    assert found.value == pytest.approx(value, rel=1e-6)
    assert set(found.mapping.tolist()) == set(hosted)
    assert found.size == sum(SIZES[k] for k in hosted) <= budget
    assert compose(S, SIZES, budget, traffic=[12.5 * n for n in TRAFFIC]).hosted == hosted


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="budget 3: the smallest, expert 2, needs 4"):
        compose(S, SIZES, 3)
    with pytest.raises(ValueError, match=r"budget 9: experts \[0, 2\], which must be hosted, need 11"):
        compose(S, SIZES, 9, host=(2, 0))
    with pytest.raises(ValueError, match="3 sizes and 2 traffic weights, got 2 and 2"):
        compose(S, (1, 2), 3)
    with pytest.raises(ValueError, match="scores must be finite"):
        compose(S * math.nan, SIZES, 9)
    with pytest.raises(ValueError, match="traffic must be finite and not negative"):
        compose(S, SIZES, 9, traffic=(1, -1))
    with pytest.raises(ValueError, match="host names experts 0 to 2"):
        compose(S, SIZES, 20, host=(3,))


problem = st.tuples(st.integers(1, 6), st.integers(1, 10), st.integers(0, 2**31), st.booleans())


@given(problem)
@settings(deadline=None, max_examples=20)
def test_value_grows_with_the_budget_and_ends_at_the_best_of_each_row(case):
    m, k, seed, coarse = case
    generator = torch.Generator().manual_seed(seed)
    s = torch.rand(m, k, generator=generator)
    s = (4 * s).round() / 4 if coarse else s
    sizes = torch.randint(1, 9, (k,), generator=generator).tolist()
    found = [compose(s, sizes, budget) for budget in (min(sizes), sum(sizes) // 2 + min(sizes), sum(sizes))]
    assert found[0].value <= found[1].value + 1e-12 <= found[2].value + 2e-12
    assert found[2].value == pytest.approx(s.double().max(1).values.mean().item(), abs=1e-12)
    for one in found:
        assert set(one.mapping.tolist()) == set(one.hosted)


def test_budgets_finer_than_the_solver():
    """A set that is over by 1e-9 of the budget is over."""
    sizes, s = (72e9, 1.0, 36e9), torch.tensor([[1.0, 0.0, 0.5]])
    assert compose(s, sizes, 72e9 - 1).hosted == (2,)
    assert compose(s, sizes, 72e9).hosted == (0,)
    near = torch.tensor([[0.5, 0.5 + 1e-7]])
    assert compose(near, (1, 2), 2).hosted == (1,)


def test_ties_go_to_the_smaller_then_to_the_lower():
    assert compose(torch.ones(2, 3), (2, 1, 3), 6).mapping.tolist() == [1, 1]
    assert compose(torch.ones(2, 3), (2, 2, 1), 5, host=(0, 1)).mapping.tolist() == [0, 0]
    assert compose(torch.ones(2, 3), (2, 2, 1), 5, host=(0, 1, 2)).mapping.tolist() == [2, 2]
    assert len(compose(torch.zeros(1, 10), [0] * 10, 0).hosted) == 1


def test_with_a_perfect_router_accuracy_is_the_programmes_value():
    correct = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 1, 1], [0, 1, 0], [1, 1, 0]]).float()
    categories = torch.tensor([0, 0, 1, 1, 1])
    scores = torch.stack([correct[categories == m].mean(0) for m in range(2)])
    found = compose(scores, SIZES, 16, traffic=[0.4, 0.6])
    achieved = correct.gather(1, found.mapping[categories][:, None]).mean().item()
    assert achieved == pytest.approx(found.value, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_expert_answers_each_prompt(dtype):
    model = made(dtype=dtype)
    prompts = torch.tensor([[5.0, 0], [0, 5], [4, 0], [0, 0]], dtype=dtype)
    assert model(prompts).flatten().tolist() == [0, 1, 0, 0]
    assert [expert.seen for expert in model.experts] == [3, 1, 0]
    assert model.active_size(prompts) == (3 * 7 + 9) / 4
    assert model(prompts[:0]).shape == (0, 1)
    assert model.route(prompts[:0]).experts.tolist() == []
    model.recompose(13)
    assert model(prompts).flatten().tolist() == [2, 1, 2, 2]


def test_the_fallback():
    prompts = torch.tensor([[9.0, 0], [0, 9], [0.1, 0], [0, 0]])
    assert made(threshold=0.3, general=2)(prompts).flatten().tolist() == [0, 1, 2, 2]
    assert not made(threshold=math.log(2), general=2).route(prompts).uncertain.any()
    always = made(threshold=0.0, general=2)
    assert always.route(prompts).uncertain.all()
    assert not always.route(torch.tensor([[500.0, 0.0]])).uncertain.any()
    best = made(threshold=0.3)  # 30 s_0 + 70 s_1 = 41, 71, 60
    assert best.general == 1
    assert 1 in best.composition.hosted
    assert made(threshold=0.3, budget=8).general == 2
    with pytest.raises(ValueError, match=r"experts \[1\], which must be hosted, need 9"):
        made(threshold=0.3, budget=8, general=1)


def test_entropy_never_passes_its_bound():
    for m in range(1, 40):
        assert entropy(torch.full((1, m), 1 / m)).item() <= float(torch.tensor(float(m)).log())


def test_bad_input():
    with pytest.raises(ValueError, match="scores has 3 columns, there are 2 experts"):
        CompositionOfExperts([Says(0), Says(1)], nn.Identity(), S)
    with pytest.raises(ValueError, match="knows 3 categories, scores 2"):
        made()(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="NaN"):
        made()(torch.full((1, 2), math.nan))
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 20\]"):
        made(threshold=-1)


def test_one_expert_and_gradients():
    one = CompositionOfExperts([nn.Linear(2, 3)], nn.Linear(2, 4), torch.ones(4, 1))
    x = torch.randn(5, 2)
    torch.testing.assert_close(one(x), one.experts[0](x))
    one(x).sum().backward()
    assert one.experts[0].weight.grad is not None
    assert one.category_router.weight.grad is None


def test_win_rates_by_hand():
    scores = torch.tensor([[1.0, 0, 1], [1, 1, 0], [0, 0, 0]])
    rates = win_rates(scores, torch.tensor([0, 0, 1]), 2)
    assert rates[0].tolist() == [[0.5, 0.75, 0.75], [0.25, 0.5, 0.5], [0.25, 0.5, 0.5]]
    torch.testing.assert_close(rates + rates.mT, torch.ones(2, 3, 3))
    assert rates[1].unique().tolist() == [0.5]
    assert mean_win_rate(rates)[0].tolist() == [0.75, 0.375, 0.375]
    assert mean_win_rate(rates[:, :1, :1]).tolist() == [[0.5], [0.5]]
    with pytest.raises(ValueError, match=r"counts \[2, 1, 0\]"):
        win_rates(scores, torch.tensor([0, 0, 1]), 3)


def test_labels_spread_where_neighbours_agree():
    known = torch.tensor([[0.0, 0], [0, 1], [9, 0], [9, 1]])
    labels = torch.tensor([0, 0, 1, 1])
    asked = torch.tensor([[0.0, 0.5], [9, 0.5], [4.5, 0.5]])
    assert agreeing_labels(asked[:2], known, labels, k=2).tolist() == [0, 1]
    assert agreeing_labels(asked, known, labels, k=4).tolist() == [-1, -1, -1]
