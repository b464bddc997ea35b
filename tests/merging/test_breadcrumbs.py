"""Breadcrumbs: which ranks stay, counted by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import breadcrumbs, ties


def ranks_kept(n, order=None, **options):
    """The magnitude ranks, 1 the smallest, that a task vector of n different magnitudes keeps."""
    tau = torch.arange(1.0, n + 1) * torch.tensor([1.0, -1.0]).repeat(n)[:n]
    tau = tau if order is None else tau[torch.tensor(order)]
    merged = breadcrumbs({"w": torch.zeros(n)}, [{"w": tau}], scale=1.0, **options)["w"]
    assert torch.equal(merged[merged != 0], tau[merged != 0])
    return sorted(int(value) for value in merged[merged != 0].abs())


def test_the_band_of_the_card():
    assert ranks_kept(10, density=0.5, gamma=0.1) == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [
        (1.0, 0.0, range(1, 11)),
        (1.0, 0.3, range(1, 11)),  # nothing may be dropped, so the top stays
        (0.8, 0.3, range(1, 9)),  # two to drop, three wanted: both go at the top
        (0.5, 0.0, range(6, 11)),
        (0.5, 0.04, range(6, 11)),  # ⌊0.04 · 10⌋ = 0: no empty mask
        (0.0, 0.1, []),
        (0.1, 0.5, [5]),
    ],
)
def test_other_bands(density, gamma, kept):
    assert ranks_kept(10, density=density, gamma=gamma) == list(kept)


@given(st.permutations(range(12)), st.floats(0, 1), st.floats(0, 0.5), st.sampled_from(["tensor", "model"]))
@settings(deadline=None, max_examples=40)
def test_the_count_is_exact_and_the_order_of_entries_no_matter(order, density, gamma, scope):
    kept = ranks_kept(12, order, density=density, gamma=gamma, scope=scope)
    assert len(kept) == int(density * 12)
    assert kept == ranks_kept(12, density=density, gamma=gamma, scope=scope)
    assert not kept or kept == list(range(kept[0], kept[-1] + 1))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.floats(0, 1), st.floats(0, 0.5))
@settings(deadline=None, max_examples=40)
def test_the_count_is_exact_where_magnitudes_tie(values, density, gamma):
    tau = torch.tensor([float(value or 4) for value in values])
    merged = breadcrumbs({"w": torch.zeros(len(tau))}, [{"w": tau}], density=density, gamma=gamma, scale=1.0)["w"]
    assert int(merged.count_nonzero()) == int(density * len(tau))


def test_gamma_zero_is_trimming_by_magnitude():
    base = {"a": torch.randn(9, 5), "b": torch.randn(31)}
    experts = [{key: tensor + torch.randn(tensor.shape) for key, tensor in base.items()} for _ in range(3)]
    for scope in ("tensor", "model"):
        ours = breadcrumbs(base, experts, density=0.3, gamma=0.0, scale=0.5, scope=scope)
        trimmed = ties(base, experts, density=0.3, scale=0.5, scope=scope, elect="none", combine="sum")
        for key in base:
            torch.testing.assert_close(ours[key], trimmed[key])


def test_in_the_model_layers_compete():
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    expert = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([50.0, 60, 70, 80])}
    merged = breadcrumbs(base, [expert], density=0.5, gamma=0.125, scope="model", scale=1.0)
    assert merged["a"].tolist() == [0, 0, 0, 4]
    assert merged["b"].tolist() == [50, 60, 70, 0]


def test_rescaling_gives_the_old_norm_back():
    tau = torch.randn(20, 10)
    merged = breadcrumbs({"w": torch.zeros(20, 10)}, [{"w": tau}], density=0.4, rescale="norm", scale=1.0)["w"]
    torch.testing.assert_close(merged.abs().sum(), tau.abs().sum())
    bare = breadcrumbs({"w": torch.zeros(20, 10)}, [{"w": tau}], density=0.4, scale=1.0)["w"]
    torch.testing.assert_close(merged / merged.norm(), bare / bare.norm())
    nothing = breadcrumbs({"w": torch.zeros(3)}, [{"w": torch.zeros(3)}], rescale="norm")["w"]
    assert nothing.tolist() == [0, 0, 0]


def test_election_and_normalization():
    base = {"w": torch.zeros(2)}
    experts = [{"w": torch.tensor([4.0, 1.0])}, {"w": torch.tensor([-1.0, 3.0])}, {"w": torch.tensor([2.0, -1.0])}]
    options = {"density": 1.0, "scale": 1.0}
    assert breadcrumbs(base, experts, **options)["w"].tolist() == [5, 3]
    assert breadcrumbs(base, experts, elect="mass", **options)["w"].tolist() == [6, 4]
    assert breadcrumbs(base, experts, elect="mass", normalize=True, **options)["w"].tolist() == [3, 2]
    assert breadcrumbs(base, experts, normalize=True, weights=[1, 1, 2], **options)["w"].tolist() == [7 / 4, 2 / 4]
