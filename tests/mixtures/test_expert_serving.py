"""Caches by hand and against brute force; batches by hand."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.mixtures import expert_batches, expert_cache
from tests.untyped import untyped

POLICIES = ("belady", "lru", "lfu", "random")
LETTERS = [*map("ABCD".index, "ABCABDABCABD")]


def hits(sequence, capacity, policy="belady", **settings):
    return int(expert_cache(sequence, capacity=capacity, policy=policy, **settings).hits.sum())


def best(sequence, capacity):
    """Most hits of any policy that loads what is needed, by trying every eviction."""
    sequence = tuple(sequence)

    @functools.cache
    def from_here(t, held):
        if t == len(sequence):
            return 0
        expert = sequence[t]
        if expert in held:
            return 1 + from_here(t + 1, held)
        if len(held) < capacity:
            return from_here(t + 1, held | {expert})
        return max(from_here(t + 1, held - {gone} | {expert}) for gone in held)

    return from_here(0, frozenset())


def test_the_cards_sequence():
    assert (hits(LETTERS, 2, "lru"), hits(LETTERS, 2)) == (0, 3)
    assert (hits(LETTERS, 3, "lru"), hits(LETTERS, 3)) == (6, 6)


@settings(deadline=None, max_examples=40)
@given(sequence=st.lists(st.integers(0, 4), max_size=11), capacity=st.integers(1, 4))
def test_belady_is_the_best_there_is(sequence, capacity):
    ours = hits(sequence, capacity)
    assert ours == best(sequence, capacity)
    for policy in POLICIES:
        assert hits(sequence, capacity, policy) <= ours
    assert hits(sequence, capacity, lookahead=len(sequence)) == ours
    assert hits(sequence, capacity, lookahead=0) == hits(sequence, capacity, "lru")


@pytest.mark.parametrize("policy", POLICIES)
def test_what_holds_for_every_policy(policy):
    sequence = torch.randint(0, 6, (200,))
    run = expert_cache(sequence, capacity=3, policy=policy)
    for t, (expert, held) in enumerate(zip(sequence.tolist(), run.held.tolist(), strict=True)):
        assert expert in held
        before = run.held[t - 1].tolist() if t else [-1] * 3
        assert bool(run.hits[t]) == (expert in before)
        assert sum(a != b for a, b in zip(before, held, strict=True)) == (0 if run.hits[t] else 1)
    whole = expert_cache(sequence, capacity=6, policy=policy)
    assert whole.loads == len(sequence.unique())
    assert whole.hit_rate == pytest.approx(1 - whole.loads / 200)
    assert torch.equal(expert_cache(sequence, capacity=3, policy=policy).held, run.held)
    assert expert_cache([], capacity=2, policy=policy).hit_rate == 0


def test_batches_by_hand():
    # Three requests of two tokens: experts 0 1 | 1 1 | 0 0.
    choices = torch.tensor([[0, 1], [1, 1], [0, 0]])
    plain = expert_batches(choices, batch_size=3, policy="arrival")
    assert plain.batches == [[(0, 0), (1, 0), (2, 0)], [(0, 1), (1, 1), (2, 1)]]
    assert plain.loads == 4
    assert plain.waits == [0] * 6
    grouped = expert_batches(choices, batch_size=3)
    assert grouped.batches == [[(0, 0), (2, 0)], [(1, 0), (0, 1)], [(2, 1)], [(1, 1)]]
    assert grouped.loads == 4
    assert grouped.waits == [0, 0, 1, 0, 1, 1]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 500), requests=st.integers(0, 7), length=st.integers(0, 5), size=st.integers(1, 5))
def test_every_token_is_served_once_in_its_order(seed, requests, length, size):
    choices = torch.randint(0, 3, (requests, length), generator=torch.Generator().manual_seed(seed))
    for policy in ("expert", "arrival"):
        run = expert_batches(choices, batch_size=size, policy=policy)
        served = [pair for batch in run.batches for pair in batch]
        assert sorted(served) == [(r, t) for r in range(requests) for t in range(length)]
        when = {pair: number for number, batch in enumerate(run.batches) for pair in batch}
        assert all(when[r, t] < when[r, t + 1] for r, t in when if (r, t + 1) in when)
        assert all(0 < len(batch) <= size for batch in run.batches)
        assert min(run.waits, default=0) >= 0
        if policy == "expert":
            assert all(len(experts) == 1 for experts in run.experts)
        if size == 1:
            assert run.loads == choices.numel()


def test_bad_input():
    with pytest.raises(ValueError, match="experts must be numbered from 0, got -1"):
        expert_cache([0, -1])
    with pytest.raises(ValueError, match="policy must be one of 'belady', 'lru', 'lfu', 'random', got 'fifo'"):
        expert_cache([0], policy="fifo")
    for choices in (torch.zeros(3, dtype=torch.int64), torch.tensor([[0, -1]])):
        with (
            untyped(),
            pytest.raises(ValueError, match=r"choices must be \[requests, tokens\] of experts numbered from 0"),
        ):
            expert_batches(choices)
    with pytest.raises(ValueError, match=r"batch_size must be in \[1, 4096\], got 0"):
        expert_batches(torch.zeros(1, 1, dtype=torch.int64), batch_size=0)
