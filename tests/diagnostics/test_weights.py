"""Diagnostics of weights: against plain formulas, on matrices whose answer is known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.diagnostics.weights import (
    METRICS,
    TaskVectors,
    effective_rank,
    low_rank,
    overlap,
    product_svd,
    stable_rank,
    task_vectors,
)
from notebook_kit.weights import IncompatibleWeights


@pytest.fixture
def weights():
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(6, 4, generator=g), "b": torch.randn(6, generator=g), "n": torch.tensor(3)}
    experts = [
        {key: t + 0.1 * torch.randn(t.shape, generator=g) if t.is_floating_point() else t for key, t in base.items()}
        for _ in range(3)
    ]
    return base, experts


@settings(deadline=None, max_examples=30)
@given(m=st.integers(1, 9), r=st.integers(1, 12), n=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_product_svd_is_the_svd_of_the_product(m, r, n, seed):
    g = torch.Generator().manual_seed(seed)
    left, right = torch.randn(m, r, generator=g).double(), torch.randn(r, n, generator=g).double()
    u, s, vh = product_svd(left, right)
    k = min(m, r, n)
    assert (u.shape, s.shape, vh.shape) == ((m, k), (k,), (k, n))
    torch.testing.assert_close((u * s) @ vh, left @ right)
    torch.testing.assert_close(s, torch.linalg.svdvals(left @ right)[:k])
    torch.testing.assert_close(u.T @ u, torch.eye(k, dtype=torch.float64))


def test_ranks_of_known_spectra():
    assert stable_rank(torch.tensor([2.0, 1.0, 1.0])).item() == pytest.approx(1.5)
    assert stable_rank(torch.ones(5)).item() == pytest.approx(5)
    assert effective_rank(torch.ones(5)).item() == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0])).item() == pytest.approx(1)
    assert torch.isnan(stable_rank(torch.zeros(3)))
    assert torch.isnan(effective_rank(torch.zeros(3)))
    both = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert stable_rank(both).tolist() == [1.0, 2.0]


def test_overlap_of_known_subspaces():
    eye = torch.eye(4)
    assert overlap(eye[:, :2], eye[:, :2]).item() == 1
    assert overlap(eye[:, :2], eye[:, 2:]).item() == 0
    assert overlap(eye[:, :2], eye[:, 1:3]).item() == 0.5
    assert overlap(eye[:, :2], eye[:, [1, 0]]).item() == 1


def test_against_plain_formulas(weights):
    base, experts = weights
    vectors = TaskVectors(base, experts)
    assert vectors.names == ["expert 0", "expert 1", "expert 2"]
    assert (vectors.tensors, vectors.matrices, vectors.widest) == (["w", "b"], ["w"], 4)
    tau = [{key: expert[key] - base[key] for key in ("w", "b")} for expert in experts]
    assert vectors.norms()[0, 1] == pytest.approx((tau[1]["w"].norm() / base["w"].norm()).item())
    flat = [torch.cat([t["w"].flatten(), t["b"]]) for t in tau]
    cosine = torch.nn.functional.cosine_similarity(flat[0], flat[2], dim=0).item()
    assert vectors.cosine()[0, 2] == pytest.approx(cosine, abs=1e-6)
    assert vectors.cosine("w")[1, 1] == pytest.approx(1)
    agree = (tau[0]["w"].sign() == tau[1]["w"].sign()).float().mean().item()
    assert vectors.sign_agreement("w")[0, 1] == pytest.approx(agree)
    spectrum = torch.linalg.svdvals(tau[2]["w"])
    np.testing.assert_allclose(vectors.singular_values("w")[2], spectrum, rtol=1e-5)
    assert vectors.stable_ranks()[0, 2] == pytest.approx(stable_rank(spectrum).item(), rel=1e-5)
    u = [torch.linalg.svd(t["w"])[0][:, :2] for t in tau]
    assert vectors.subspace_overlap("w", 2)[0, 1] == pytest.approx(overlap(u[0], u[1]).item(), abs=1e-5)


def test_sign_agreement_counts_only_what_both_keep():
    base = {"w": torch.zeros(4)}
    experts = [{"w": torch.tensor([4.0, 3.0, 0.1, 0.1])}, {"w": torch.tensor([5.0, -2.0, -0.1, -0.1])}]
    vectors = TaskVectors(base, experts)
    assert vectors.sign_agreement("w")[0, 1] == 0.25
    assert vectors.sign_agreement("w", 0.5)[0, 1] == 0.5
    assert vectors.sign_agreement("w", 0.25)[0, 1] == 1
    assert vectors.sign_agreement(None, 0.5)[0, 1] == 0.5


def test_per_tensor_is_the_mean_over_the_others(weights):
    vectors = TaskVectors(*weights)
    for metric in METRICS:
        keys, table = vectors.per_tensor(metric, rank=2)
        assert table.shape == (len(keys), 3)
        assert np.isfinite(table).all()
    pairs = vectors.cosine("b")
    assert vectors.per_tensor("cosine")[1][1, 0] == pytest.approx((pairs[0, 1] + pairs[0, 2]) / 2)
    frame = vectors.table(rank=2)
    assert len(frame) == 6
    assert frame.loc[frame.tensor == "b", "stable_rank"].isna().all()
    assert frame.norm.to_numpy().reshape(2, 3) == pytest.approx(vectors.norms())
    alone = TaskVectors(weights[0], weights[1][:1])
    assert np.isnan(alone.per_tensor("cosine")[1]).all()


def test_convolutions_and_stacked_experts():
    base = {"conv": torch.zeros(5, 2, 3, 3), "experts": torch.zeros(4, 6, 3), "one": torch.zeros(1, 8)}
    expert = {key: torch.randn(t.shape) for key, t in base.items()}
    vectors = TaskVectors(base, [expert])
    assert vectors.matrices == ["conv", "experts"]
    np.testing.assert_allclose(
        vectors.singular_values("conv")[0], torch.linalg.svdvals(expert["conv"].reshape(5, 18)), rtol=1e-5
    )
    np.testing.assert_allclose(
        vectors.singular_values("experts")[0], torch.linalg.svdvals(expert["experts"].reshape(24, 3)), rtol=1e-5
    )
    assert np.isnan(vectors.norms()).all()


def test_bad_input(weights):
    base, experts = weights
    with pytest.raises(IncompatibleWeights, match="shape"):
        TaskVectors(base, [experts[0] | {"w": torch.zeros(3, 3)}])
    with pytest.raises(ValueError, match="names must have one entry per expert, 3, got 1"):
        TaskVectors(base, experts, ["a"])
    vectors = TaskVectors(base, experts)
    with pytest.raises(ValueError, match="metric must be one of norm, cosine"):
        vectors.per_tensor("angle")
    with pytest.raises(ValueError, match="no floating tensor is called 'x'; there are w, b"):
        vectors.cosine("x")
    with pytest.raises(ValueError, match=r"'b' of shape \[6\] has no singular values"):
        vectors.singular_values("b")


def test_task_vectors_are_kept_until_the_weights_change(weights):
    base, experts = weights
    first = task_vectors(base, experts, ["a", "b", "c"])
    assert task_vectors(dict(base), list(experts), ["a", "b", "c"]) is first
    assert task_vectors(base, experts[:2], ["a", "b"]) is not first
    first = task_vectors(base, experts)
    experts[1]["w"].add_(1)
    second = task_vectors(base, experts)
    assert second is not first
    assert second.norms()[0, 1] > first.norms()[0, 1]
    experts[0] = {key: tensor.clone() for key, tensor in experts[0].items()}
    assert task_vectors(base, experts) is not second


def test_low_rank_is_the_best_cut(weights):
    base, experts = weights
    full = low_rank(base, experts[0], rank=4)
    assert list(full) == list(base)
    assert full["n"] == 3
    for key in ("w", "b"):
        torch.testing.assert_close(full[key], experts[0][key])
    tau = experts[0]["w"] - base["w"]
    singular = torch.linalg.svdvals(tau)
    cut = low_rank(base, experts[0], rank=2)
    torch.testing.assert_close((experts[0]["w"] - cut["w"]).norm(), singular[2:].norm())
    assert torch.linalg.matrix_rank(cut["w"] - base["w"], atol=1e-5) == 2
    torch.testing.assert_close(cut["b"], experts[0]["b"])
    twice = low_rank(base, experts[0], rank=2, strength=2.0)
    torch.testing.assert_close(twice["w"] - base["w"], 2 * (cut["w"] - base["w"]))
    assert torch.equal(low_rank(base, experts[0], strength=0.0)["w"], base["w"])
    assert low_rank({"w": base["w"].half()}, {"w": experts[0]["w"].half()})["w"].dtype == torch.float16
