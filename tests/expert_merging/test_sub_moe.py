import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from transformers import AutoModelForCausalLM

from notebook_kit.alignment import permute, random_permutations
from notebook_kit.diagnostics.expert_compression import compression_frame
from notebook_kit.expert_merging import (
    calibration_inputs,
    expert_view,
    merge_in_subspace,
    output_statistics,
    plan_sub_moe,
    sub_moe,
    union_spectrum,
    usage_of,
)
from notebook_kit.expert_merging.align_experts import expert_of, spec_of
from notebook_kit.expert_merging.clusters import k_means
from notebook_kit.expert_merging.outputs import expert_output, trace_batches
from notebook_kit.expert_merging.subspace import whitening_of
from tests.expert_merging.moes import KINDS, ids, logits, made_up_trace, prepared


def plain(matrices, f, rank, whitening=None):
    """Equations 6 to 11 as they stand, by numpy's SVD."""
    w = [np.asarray(m, dtype=np.float64) for m in matrices]
    s = [np.eye(w[0].shape[1])] * len(w) if whitening is None else [np.asarray(one, np.float64) for one in whitening]
    u, sigma, vt = np.linalg.svd(np.concatenate([a @ b for a, b in zip(w, s, strict=True)], 1), full_matrices=False)
    blocks = np.split(vt, len(w), 1)
    v = sum(share * block @ np.linalg.inv(one) for share, block, one in zip(f, blocks, s, strict=True))
    return u[:, :rank] @ np.diag(sigma[:rank]) @ v[:rank]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(2, 7), st.integers(2, 7), st.integers(0, 99), st.booleans())
def test_parity_with_the_equations(n, out, into, seed, whiten):
    g = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(out, into, generator=g) for _ in range(n)]
    f = torch.rand(n, generator=g) + 0.1
    f = (f / f.sum()).tolist()
    scales = [whitening_of(torch.randn(20, into, generator=g), "full") for _ in range(n)] if whiten else None
    for rank in {1, min(out, into), out}:
        left, right = merge_in_subspace(matrices, f, rank=rank, whitening=scales)
        expected = torch.from_numpy(plain(matrices, f, rank, scales)).float()
        torch.testing.assert_close(left @ right, expected, atol=2e-4, rtol=1e-3)
    left, right = merge_in_subspace(matrices, f, whitening=scales)
    average = sum(share * m for share, m in zip(f, matrices, strict=True))
    torch.testing.assert_close(left @ right, average, atol=1e-4, rtol=1e-4)


def test_rank_r_is_a_projection_of_the_average():
    matrices, f = [torch.randn(6, 9) for _ in range(3)], (0.5, 0.3, 0.2)
    left, right = merge_in_subspace(matrices, f, rank=4)
    u = torch.linalg.svd(torch.cat(matrices, 1)).U[:, :4]
    average = sum(share * m for share, m in zip(f, matrices, strict=True))
    torch.testing.assert_close(left @ right, u @ u.T @ average, atol=1e-5, rtol=1e-4)
    across = merge_in_subspace(matrices, f, rank=4, axis="input")
    v = torch.linalg.svd(torch.cat(matrices, 0)).Vh[:4]
    torch.testing.assert_close(across[0] @ across[1], average @ v.T @ v, atol=1e-5, rtol=1e-4)


def test_by_hand():
    w1, w2 = torch.tensor([[2.0, 0], [0, 0]]), torch.tensor([[0.0, 0], [0, 1]])
    assert union_spectrum([w1, w2])[:2].tolist() == pytest.approx([2, 1])
    full = torch.matmul(*merge_in_subspace([w1, w2], (0.5, 0.5)))
    one = torch.matmul(*merge_in_subspace([w1, w2], (0.5, 0.5), rank=1))
    torch.testing.assert_close(full, torch.tensor([[1.0, 0], [0, 0.5]]))
    torch.testing.assert_close(one, torch.tensor([[1.0, 0], [0, 0]]))


def test_copies_merge_to_themselves_and_error_follows_the_spectrum():
    w = torch.randn(5, 8)
    merged = torch.matmul(*merge_in_subspace([w, w, w], (0.7, 0.2, 0.1)))
    torch.testing.assert_close(merged, w, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(union_spectrum([w] * 3), 3**0.5 * torch.linalg.svdvals(w), atol=1e-5, rtol=1e-5)
    union, s = torch.cat([w, 2 * w.flip(0)], 1), union_spectrum([w, 2 * w.flip(0)])
    u = merge_in_subspace([w, 2 * w.flip(0)], (0.5, 0.5), rank=2)[0]
    error = (union - u @ u.T @ union).norm() / union.norm()
    assert error.item() == pytest.approx(((s[2:] ** 2).sum() / (s**2).sum()).sqrt().item(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_all_kept_is_the_identity(kind):
    model, trace, before = prepared(kind)
    assert (logits(sub_moe(model, trace, n_experts=8)) - before).abs().max() < 1e-6
    whole = sub_moe(model, trace, n_experts=8, rank=min(expert_view(model)[0].expert(0)[0].shape))
    assert (logits(whole) - before).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whitening", ["none", "diagonal", "full"])
def test_factors_are_stored_saved_and_loaded(kind, whitening, tmp_path):
    model, trace, before = prepared(kind)
    new = sub_moe(model, trace, n_experts=3, rank=6, whitening=whitening, align=True)
    f, d = expert_view(model)[0].expert(0)[0].shape
    biases = 2 * f + d if kind == "gpt_oss" else 0
    assert set(compression_frame(new, trace)["parameters"]) == {3 * (3 * 6 * (f + d) + biases)}
    assert torch.isfinite(logits(new)).all()
    assert torch.equal(logits(model), before)
    new.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(new))


def test_whitening_keeps_the_outputs_better_at_low_rank():
    model, trace, _ = prepared()
    inputs = calibration_inputs(model, trace, None)
    layer = expert_view(model)[0]
    x, chosen = inputs[layer.name]
    errors = {}
    for whitening in ("none", "full"):
        new = expert_view(sub_moe(model, trace, n_experts=8, rank=8, whitening=whitening, inputs=inputs))[0]
        routed = [x[(chosen == e).any(-1)] for e in range(8)]
        errors[whitening] = sum(
            (expert_output(layer, expert_of(layer, e), one) - expert_output(layer, expert_of(new, e), one)).norm() ** 2
            for e, one in enumerate(routed)
        )
    assert errors["full"] < 0.95 * errors["none"]


def test_similarity_is_of_outputs_and_ignores_the_order_of_units():
    model, trace, _ = prepared()
    layer = expert_view(model)[0]
    x = calibration_inputs(model, trace, None)[layer.name][0]
    s, means = output_statistics(layer, x)
    outputs = torch.stack([expert_output(layer, expert_of(layer, e), x) for e in range(8)])
    expected = torch.cosine_similarity(outputs[2], outputs[5], dim=-1).mean()
    torch.testing.assert_close(s[2, 5], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(means[4], outputs[4].mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(s, s.T)
    torch.testing.assert_close(s.diagonal(), torch.ones(8))
    assert s.abs().max() <= 1
    shuffled = copy.deepcopy(model)
    for one in expert_view(shuffled):
        spec = spec_of(one)
        moved = [permute(spec, random_permutations(spec, e, signs=True), expert_of(one, e)) for e in range(8)]
        one.write(*(torch.stack([weights[name] for weights in moved]) for name in ("gate", "up", "down")))
    torch.testing.assert_close(output_statistics(expert_view(shuffled)[0], x)[0], s, atol=1e-5, rtol=1e-4)
    inputs = calibration_inputs(model, trace, None)
    plans = [plan_sub_moe(m, trace, inputs, n_experts=3) for m in (model, shuffled)]
    assert plans[0] == plans[1]
    # The joint SVD of gate and up does see the order; alignment undoes it.
    options = {"n_experts": 3, "rank": 8, "inputs": inputs}
    difference = {}
    for align in (True, False):
        one, other = (logits(sub_moe(m, trace, align=align, **options)) for m in (model, shuffled))
        difference[align] = (one - other).abs().max().item()
    assert difference[False] > 10 * difference[True]


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 9), st.integers(1, 9), st.integers(0, 30))
def test_k_means_needs_only_inner_products(n, k, seed):
    k = min(n, k)
    y = torch.randn(n, 40, generator=torch.Generator().manual_seed(seed))
    groups = k_means(y @ y.T, k, restarts=20, seed=seed)
    assert sorted(e for group in groups for e in group) == list(range(n))
    assert len(groups) == k
    ours = sum(((y[list(group)] - y[list(group)].mean(0)) ** 2).sum().item() for group in groups)
    theirs = KMeans(k, n_init=10, random_state=0).fit(y.numpy()).inertia_
    assert ours <= 1.08 * theirs + 1e-3


def test_k_means_of_copies_leaves_no_cluster_empty():
    y = torch.ones(5, 3)
    assert len(k_means(y @ y.T, 3)) == 3


def test_the_leader_is_the_most_used_and_the_text_of_the_trace_is_run_again():
    model, trace, _ = prepared()
    inputs = calibration_inputs(model, trace, None)
    usage = usage_of(trace, model)
    for name, layer in plan_sub_moe(model, trace, inputs, n_experts=3).items():
        assert len(layer.groups) == 3
        assert all(usage[name][group[0]] == usage[name][list(group)].max() for group in layer.groups)
    (batch,) = trace_batches(trace)
    assert torch.equal(batch["input_ids"], ids())
    given_batches = calibration_inputs(model, trace, [ids()])
    assert all(torch.equal(inputs[name][0], given_batches[name][0]) for name in inputs)
    assert len(calibration_inputs(model, trace, None, most=10)["model.layers.0.mlp"][0]) == 10


def test_bad_input_is_named():
    model, trace, _ = prepared()
    with pytest.raises(ValueError, match=r"\(sub_moe\)"):
        sub_moe(model, trace, n_experts=9)
    with pytest.raises(ValueError, match=r"rank must be in \[1, 32\] for the experts"):
        sub_moe(model, trace, rank=33)
    with pytest.raises(ValueError, match='whitening needs axis="output"'):
        sub_moe(model, trace, rank=3, axis="input", whitening="full")
    with pytest.raises(ValueError, match="whitening must be one of"):
        sub_moe(model, trace, whitening="some")
    with pytest.raises(ValueError, match="at least one batch"):
        sub_moe(model, trace, batches=[])
    blind = made_up_trace(model, [1 / 8] * 8)
    blind._chunks["tokens"][0] = -torch.ones(len(blind), dtype=torch.long)
    with pytest.raises(ValueError, match="no token ids"):
        sub_moe(model, blind)
    w = torch.randn(2, 3)
    with pytest.raises(ValueError, match="sum to 1"):
        merge_in_subspace([w, w], (0.5, 0.6))
    with pytest.raises(ValueError, match="one shape"):
        merge_in_subspace([w, w.T], (0.5, 0.5))
    with pytest.raises(ValueError, match=r"rank must be in \[1, 2\]"):
        merge_in_subspace([w, w], (0.5, 0.5), rank=3)
    with pytest.raises(ValueError, match="one matrix for each of the 2"):
        merge_in_subspace([w, w], (0.5, 0.5), whitening=[torch.eye(3)])
