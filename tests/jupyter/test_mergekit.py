"""mergekit's family by hand; against mergekit itself: tests/parity/test_workbench.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.jupyter.mergekit import FAMILY, METHODS, OWN, SHARED
from notebook_kit.jupyter.sparse_sum import _top, sparse_sum

TAU = torch.tensor([[4.0, -1.0, 0.5, 2.0], [-1.0, -2.0, 0.25, 3.0]])
BASE = {"w": torch.ones(4), "n": torch.tensor(1), "s": torch.tensor(2.0), "e": torch.empty(0)}
EXPERTS = [BASE | {"w": 1 + row} for row in TAU]


def change(**options):
    settings = {"sparsify": "magnitude", "weights": [1.0, 1.0], "density": [1.0, 1.0]} | options
    result = sparse_sum(BASE, EXPERTS, **settings)
    assert torch.equal(result["n"], BASE["n"])
    assert torch.equal(result["s"], BASE["s"])
    assert result["e"].shape == (0,)
    return (result["w"] - 1).tolist()


def test_by_hand():
    assert change() == [3.0, -3.0, 0.75, 5.0]
    assert change(scale=0.5) == [1.5, -1.5, 0.375, 2.5]
    assert change(weights=[1.0, 3.0]) == [1.0, -7.0, 1.25, 11.0]
    assert change(weights=[1.0, 3.0], normalize=True) == pytest.approx([0.25, -1.75, 0.3125, 2.75])
    assert change(elect=True) == [4.0, -3.0, 0.75, 5.0]
    assert change(elect=True, normalize=True) == [4.0, -1.5, 0.375, 2.5]
    # Each keeps its own share: the two largest of the first, the largest of the second.
    assert change(density=[0.5, 0.25]) == [4.0, 0.0, 0.0, 5.0]
    # Norms 7.5 and 6.25 come back: 6 entries' worth for the first, 3 for the second.
    rescaled = change(density=[0.5, 0.25], rescale=True)
    assert rescaled == pytest.approx([5.0, 0.0, 0.0, 2.5 + 6.25])
    # gamma drops the largest, density keeps two of what is left.
    assert change(sparsify="outliers", density=[0.5, 0.5], gamma=[0.25, 0.25]) == [-1.0, -3.0, 0.0, 2.0]
    # An even vote counts as plus.
    assert change(weights=[1.0, 4.0], elect=True)[0] == 4.0


def test_at_least_one_entry_stays_by_magnitude():
    assert change(density=[0.01, 0.01]) == [4.0, 0.0, 0.0, 3.0]
    assert change(density=[0.0, 0.0]) == [0.0] * 4


def test_random_ones_keep_their_share_and_norm():
    base, expert = {"w": torch.zeros(60, 80)}, {"w": torch.randn(60, 80)}
    for sparsify, extra in (("random", {}), ("rank", {"epsilon": [0.2]})):
        common = {"sparsify": sparsify, "weights": [1.0], "density": [0.4], "rescale": True, **extra}
        merged = sparse_sum(base, [expert], **common)["w"]
        assert float((merged != 0).float().mean()) == pytest.approx(0.4, abs=0.03)
        assert float(merged.abs().sum()) == pytest.approx(float(expert["w"].abs().sum()), rel=1e-4)
        assert torch.equal(merged, sparse_sum(base, [expert], **common)["w"])
        assert not torch.equal(merged, sparse_sum(base, [expert], seed=1, **common)["w"])
    large, small = (expert["w"].abs() > 1.2), (expert["w"].abs() < 0.3)
    assert (merged[large] != 0).float().mean() > (merged[small] != 0).float().mean() + 0.15


@settings(deadline=None, max_examples=40)
@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=12), k=st.integers(0, 13))
def test_exactly_k_of_the_largest_also_among_equals(values, k):
    tau = torch.tensor(values, dtype=torch.float32)
    keep = _top(tau, k)
    assert int(keep.sum()) == min(k, len(values))
    if 0 < k < len(values):
        assert tau[keep].abs().min() >= tau[~keep].abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_formats(dtype):
    base, experts = {"w": BASE["w"].to(dtype)}, [{"w": expert["w"].to(dtype)} for expert in EXPERTS]
    merged = sparse_sum(base, experts, sparsify="magnitude", weights=[1.0, 1.0], density=[0.5, 0.25])["w"]
    assert merged.dtype == dtype
    assert (merged - 1).tolist() == [4.0, 0.0, 0.0, 5.0]


def test_tables_agree():
    assert set(SHARED) == set(METHODS)
    assert set(OWN) <= set(METHODS)
    assert set(FAMILY) <= set(OWN)
