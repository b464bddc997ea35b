"""The k-th largest of values that come in pieces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import ranks
from notebook_kit.merging.ranks import kth_largest
from notebook_kit.merging.selection import trims


@given(st.integers(0, 10**6), st.integers(1, 700), st.booleans(), st.data())
@settings(deadline=None, max_examples=40)
def test_it_is_exact_however_it_is_sampled(seed, d, integers, data):
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(-5, 6, (d,), generator=g).float() if integers else torch.randn(d, generator=g)
    ks = data.draw(st.lists(st.integers(1, d), min_size=1, max_size=3))
    walks = []

    def pieces():
        return walks.append(1) or iter(values.split(50))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "SAMPLE", 16)
        found = kth_largest(pieces, d, ks)
    ordered = values.sort(descending=True).values
    assert found == [float(ordered[k - 1]) for k in ks]


def test_two_walks_are_enough_for_large_models():
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    walks = []
    found = kth_largest(lambda: walks.append(1) or iter(values.split(1 << 15)), len(values), [1, 40_000, 400_000])
    ordered = values.sort(descending=True).values
    assert found == [float(ordered[i]) for i in (0, 39_999, 399_999)]
    assert len(walks) == 2


def test_counts_may_be_given():
    base, expert = {"a": torch.zeros(5), "b": torch.zeros(3)}, {"a": torch.arange(1.0, 6), "b": torch.arange(6.0, 9)}
    kept = trims(base, [expert], density=0.0, scope="model", count=lambda d: d - 6)[0]
    assert kept["a"].threshold == 7.0
    kept = trims(base, [expert], density=0.0, scope="tensor", count=lambda d: 1)[0]
    assert (kept["a"].threshold, kept["b"].threshold) == (5.0, 8.0)
