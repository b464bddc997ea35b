"""K shots choose experts and data: the card's numbers, brute force, the mixture's start."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from notebook_kit.adapters import adapter_on
from notebook_kit.mixtures import (
    KShotExperts,
    adapter_similarity,
    answer_perplexity,
    diverse_group,
    k_shot_selection,
    nearest_data,
    score_adapters,
    shortlist,
)
from notebook_kit.models import MLP
from notebook_kit.training import fit
from tests.mixtures.test_adapter_bank import X, base, library, with_expert
from tests.untyped import untyped

WORKED = torch.tensor([[1.0, 0, 0], [1.0, 0.1, 0], [0, 1.0, 0], [0, 0, 1.0]])


def test_perplexity_of_a_uniform_model_and_of_one_sample():
    logits, targets = torch.zeros(3, 5, 7), torch.randint(7, (3, 5))
    mask = torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(answer_perplexity(logits, targets, mask), torch.full((3,), 7.0))
    logits = torch.randn(3, 5, 7)
    expected = F.cross_entropy(logits[0], targets[0]).exp()
    torch.testing.assert_close(answer_perplexity(logits, targets, mask)[0], expected)
    mask[:, :2] = False
    before = answer_perplexity(logits, targets, mask)
    logits[:, :2], targets[:, :2] = torch.randn(3, 2, 7), -100  # the prompt, whatever stands there
    assert torch.equal(answer_perplexity(logits, targets, mask), before)
    mask[1] = False
    with pytest.raises(ValueError, match="shot 1 has no answer token"):
        answer_perplexity(logits, targets, mask)


def test_every_expert_is_measured_as_itself():
    model, bank = base(), library()
    accuracy, perplexity = score_adapters(model, bank, lambda net: (net(X).mean().item(), net(X).std().item()))
    for i, expert in enumerate(bank):
        y = with_expert(model, expert)(X)
        assert accuracy[i].item() == pytest.approx(y.mean().item(), abs=1e-4)
        assert perplexity[i].item() == pytest.approx(y.std().item(), abs=1e-4)


def test_shortlist_by_ranks():
    accuracy, perplexity = torch.tensor([0.9, 0.8, 0.8, 0.1]), torch.tensor([9.0, 2.0, 3.0, 1.0])
    assert shortlist(accuracy, perplexity, weight=1.0, size=4) == [0, 1, 2, 3]  # ties: the lower perplexity first
    assert shortlist(accuracy, perplexity, weight=0.0, size=4) == [3, 1, 2, 0]
    # ranks 0 1 1 3 and 3 1 2 0: sums 3, 2, 3, 3
    assert shortlist(accuracy, perplexity, size=3) == [1, 3, 2]
    assert len(shortlist(accuracy, perplexity, size=100)) == 4


def experts_of(rows):
    return [({"layers.0.A": row[None], "layers.0.B": torch.eye(4, 1)}, 1.0) for row in rows]


def test_worked_groups():
    one = {"layers.0.B": torch.zeros(4, 1)}
    similarity = adapter_similarity([(one | {"layers.0.A": row[None]}, 1.0) for row in WORKED])
    sums = {
        group: round(sum(similarity[a, b].item() for a, b in itertools.combinations(group, 2)), 4)
        for group in itertools.combinations(range(4), 3)
    }
    assert sums == {(0, 1, 2): 1.0945, (0, 1, 3): 0.995, (0, 2, 3): 0, (1, 2, 3): 0.0995}
    assert diverse_group(similarity, range(4), n_experts=3) == [0, 2, 3]
    assert diverse_group(similarity, [3, 1, 0, 2], n_experts=3) == [3, 0, 2]
    assert diverse_group(similarity, range(4), n_experts=3, diversity="least") == [0, 1, 2]
    assert diverse_group(similarity, [2, 1, 0], n_experts=2, diversity="none") == [2, 1]
    flipped = adapter_similarity(experts_of([WORKED[0], -WORKED[0]]))
    torch.testing.assert_close(flipped[0, 1], torch.tensor(2.0))  # A and B both


@settings(deadline=None, max_examples=20)
@given(m=st.integers(2, 7), n=st.integers(1, 7), seed=st.integers(0, 999))
def test_group_against_brute_force(m, n, seed):
    similarity = torch.rand(m, m, generator=torch.Generator().manual_seed(seed))
    similarity = similarity + similarity.T
    n = min(n, m)
    group = diverse_group(similarity, range(m), n_experts=n)

    def cost(g):
        return sum(similarity[a, b].item() for a, b in itertools.combinations(g, 2))

    assert len(set(group)) == n
    assert cost(group) == pytest.approx(min(map(cost, itertools.combinations(range(m), n))), abs=1e-5)


def test_copies_are_never_taken_together(monkeypatch):
    bank = library(5)
    bank = [bank[0], bank[1], *bank]  # 0 and 2, 1 and 3 are copies
    similarity = adapter_similarity(bank)
    for n in (2, 3, 4, 5):
        group = set(diverse_group(similarity, range(7), n_experts=n))
        assert not any(copies <= group for copies in ({0, 2}, {1, 3}))
    monkeypatch.setattr(k_shot_selection, "EXHAUSTIVE", 0)  # the greedy way
    for n in (2, 3, 4, 5):
        group = set(diverse_group(similarity, range(7), n_experts=n))
        assert len(group) == n
        assert not any(copies <= group for copies in ({0, 2}, {1, 3}))


def test_ranks_that_differ_have_no_cosine():
    with pytest.raises(ValueError, match=r"layers\.0: experts of different ranks"):
        adapter_similarity([library(1)[0], library(1, rank=3)[0]])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), limit=st.sampled_from([0.0, 0.1, 0.5]), n_data=st.integers(0, 60), k=st.integers(1, 5))
def test_nearest_data(seed, limit, n_data, k):
    generator = torch.Generator().manual_seed(seed)
    data, shots = torch.randn(40, 3, generator=generator), torch.randn(k, 3, generator=generator)
    kept = nearest_data(data, shots, n_data=n_data, dedup_distance=limit)
    unit = F.normalize(data, dim=1)
    distance = (unit - F.normalize(shots, dim=1).mean(0)).norm(dim=1)
    order = distance.argsort(stable=True)[: max(n_data - k, 0)].tolist()
    if limit == 0:
        assert kept.tolist() == order
    assert set(kept.tolist()) <= set(order)
    assert kept[:1].tolist() == order[:1]
    assert (distance[kept].diff() >= 0).all()
    rows = unit[kept]
    pairs = (1 - rows @ rows.T)[~torch.eye(len(rows), dtype=torch.bool)]
    assert (pairs >= limit - 1e-6).all()


def test_one_expert_alone_and_a_gate_that_always_says_it():
    model, bank = base(), library()
    one = KShotExperts(model, bank[1:2])
    torch.testing.assert_close(one(X), with_expert(model, bank[1])(X), atol=1e-5, rtol=1e-5)
    mixed = KShotExperts(model, bank)
    for layer in mixed.layers.values():
        layer.router.logits = lambda x: torch.tensor([-1e4, 0.0, -1e4]).expand(len(x), 3)
    torch.testing.assert_close(mixed(X), with_expert(model, bank[1])(X), atol=1e-5, rtol=1e-5)


def test_identical_experts_make_routing_irrelevant():
    model, bank = base(), library(1) * 4
    mixed = KShotExperts(model, bank)
    torch.testing.assert_close(mixed(X), with_expert(model, bank[0])(X), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("train", ["all", "router"])
@pytest.mark.parametrize("k", [1, 2])
def test_what_trains(train, k):
    model, y = base(), torch.randn(6, 4)
    before = {key: v.clone() for key, v in model.state_dict().items()}
    mixed = KShotExperts(model, library(), k=k, train=train)
    start = {n: p.detach().clone() for n, p in mixed.named_parameters()}
    fit(mixed, lambda g: X, lambda m, x: (m(x) - y).square().mean(), steps=3, lr=0.05, progress=False)
    for name, p in mixed.named_parameters():
        moves = name.endswith("router.weight") or (train == "all" and name.endswith((".A", ".B")))
        assert torch.equal(p, start[name]) != moves, name
    assert all(torch.equal(v, before[key]) for key, v in model.state_dict().items())


def test_ten_experts_and_half_precision():
    model, bank = base(), library(10)
    assert KShotExperts(model, bank)(X).shape == (6, 4)
    half = KShotExperts(copy.deepcopy(model).bfloat16(), bank)
    assert half(X.bfloat16()).dtype == torch.bfloat16
    assert math.isfinite(half(X.bfloat16()).float().sum().item())


def test_an_expert_without_numbers_is_named_and_not_shortlisted():
    accuracy, perplexity = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([2.0, math.nan, 3.0])
    with pytest.raises(ValueError, match="expert 1 has accuracy or perplexity NaN"):
        shortlist(accuracy, perplexity)
    assert shortlist(accuracy, torch.tensor([2.0, math.inf, 3.0])) == [0, 2, 1]


def test_data_without_numbers_or_shots():
    data, shots = torch.randn(5, 3), torch.randn(2, 3)
    for wrong in (shots[:0], torch.randn(2, 4)):
        with untyped(), pytest.raises(ValueError, match="at least one embedding of the data's width 3"):
            nearest_data(data, wrong)
    data[3, 1] = math.nan
    with pytest.raises(ValueError, match="data must be finite, row 3 is not"):
        nearest_data(data, shots)


def test_bad_input():
    with pytest.raises(ValueError, match="k must be at most the number of experts, 3, got 4"):
        KShotExperts(base(), library(), k=4)
    with pytest.raises(ValueError, match="needs at least one expert"):
        KShotExperts(base(), [])
    with pytest.raises(ValueError, match=r"layers\.0"):
        KShotExperts(MLP([9, 4]), library())
    assert set(adapter_on(base().state_dict(), library()[0])) == set(base().state_dict())
