"""Iso-C and Iso-CTS: flat spectra, the card's numbers, how directions are shared out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import isotropic
from notebook_kit.merging.isotropic import split_of


def star(*taus, **options):
    return isotropic({"w": torch.zeros(taus[0].shape)}, [{"w": tau} for tau in taus], **options)["w"]


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_cts(taus, common):
    """Iso-CTS step by step, with whole SVDs."""
    u, s, vh = torch.linalg.svd(sum(taus), full_matrices=False)
    n_common, d = split_of(len(s), len(taus), common)
    us, ss, vs = [], [], []
    for tau in taus:
        a, b, c = torch.linalg.svd(tau - u[:, :n_common] @ (u[:, :n_common].T @ tau), full_matrices=False)
        us.append(a[:, :d]), ss.append(b[:d]), vs.append(c[:d])
    u_all = torch.cat([*us, u[:, :n_common]], 1)
    v_all = torch.cat([*vs, vh[:n_common]])

    def turn(x):
        return (lambda p: p[0] @ p[2])(torch.linalg.svd(x, full_matrices=False))

    return torch.cat([*ss, s[:n_common]]).mean() * turn(u_all) @ turn(v_all)


def test_the_hand_worked_diagonal():
    torch.testing.assert_close(star(torch.diag(torch.tensor([3.0, 1.0]))), 2 * torch.eye(2))
    torch.testing.assert_close(star(torch.diag(torch.tensor([3.0, 1.0])), scale=0.5), torch.eye(2))


@given(st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([(7, 7), (6, 11), (11, 6)]))
@settings(deadline=None, max_examples=30)
def test_iso_c_is_flat_keeps_the_sum_of_singular_values_and_never_grows(count, seed, shape):
    taus = [random(seed + i, *shape) for i in range(count)]
    merged, total = star(*taus), sum(taus)
    values, before = torch.linalg.svdvals(merged), torch.linalg.svdvals(total)
    torch.testing.assert_close(values, before.mean().expand_as(values), rtol=2e-3, atol=1e-4)
    assert merged.norm() <= total.norm() * 1.0001
    assert torch.allclose(merged, star(*taus[::-1]), atol=1e-3)


def test_copies_of_one_expert():
    tau = random(0, 5, 8)
    torch.testing.assert_close(star(tau, tau, tau), 3 * star(tau), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (16, 24), (24, 16)])
@pytest.mark.parametrize("common", [0.0, 0.5, 0.8])
def test_iso_cts_is_the_plain_one(shape, common):
    taus = [random(i, *shape) for i in range(3)]
    torch.testing.assert_close(star(*taus, common=common), plain_cts(taus, common), rtol=1e-3, atol=2e-3)


def test_all_in_common_is_iso_c_and_one_expert_too():
    taus = [random(i, 9, 9) for i in range(3)]
    torch.testing.assert_close(star(*taus, common=1.0), star(*taus))
    # a lone task fills up what its own sum left out
    torch.testing.assert_close(star(taus[0], common=0.3), star(taus[0]), rtol=1e-3, atol=1e-3)


@given(st.integers(1, 40), st.integers(1, 12), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_directions_are_shared_out_exactly(r, n_experts, common):
    n_common, d = split_of(r, n_experts, common)
    assert n_common + n_experts * d == r
    assert 0 <= n_common <= r
    if common == 1:
        assert d == 0


def test_a_vit_b_layer_shares_out_as_the_official_code():
    assert split_of(768, 8, 0.8) == (616, 19)


def test_low_rank_updates_stay_in_their_span():
    taus = [random(i, 8, 1) @ random(10 + i, 1, 8) for i in range(2)]
    merged = star(*taus)
    values = torch.linalg.svdvals(merged)
    mean = torch.linalg.svdvals(sum(taus)).mean()
    torch.testing.assert_close(values[:2], mean.expand(2), rtol=1e-3, atol=1e-4)
    assert values[2:].max() < 1e-4
    assert torch.isfinite(star(*taus, common=0.5)).all()


def test_vectors_get_the_mean_and_embeddings_by_choice():
    base = {"b": torch.zeros(4), "wte.weight": torch.zeros(4, 4)}
    experts = [{"b": random(i, 4), "wte.weight": random(i, 4, 4)} for i in range(2)]
    merged = isotropic(base, experts, matrices="linear")
    for name in base:
        torch.testing.assert_close(merged[name], (experts[0][name] + experts[1][name]) / 2)
    assert torch.linalg.cond(isotropic(base, experts)["wte.weight"]).item() == pytest.approx(1, rel=1e-3)


def test_fused_experts_one_by_one():
    taus = [random(i, 2, 6, 5) for i in range(3)]
    merged = isotropic({"experts.w": torch.zeros(2, 6, 5)}, [{"experts.w": tau} for tau in taus], common=0.5)
    for e in range(2):
        torch.testing.assert_close(merged["experts.w"][e], star(*(tau[e] for tau in taus), common=0.5))
