"""SCE: select, calculate, erase; each by hand, and against a plain form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import load, merge_files, ranks, save, sce, selection
from notebook_kit.merging.sce import calculate, select


def merged(rows, base=None, **settings):
    rows = torch.as_tensor(rows)
    base = torch.zeros_like(rows[0]) if base is None else base
    return sce({"w": base}, [{"w": base + row} for row in rows], **settings)["w"]


def plain(rows, density, erase=True):
    """SCE on whole task vectors in float64."""
    tau = rows.double().reshape(len(rows), -1)
    variance = tau.var(dim=0, correction=0)
    k = int(density * int((variance > 0).sum())) if density < 1 else tau.shape[1]
    order = variance.argsort(stable=True)
    kept = torch.zeros_like(variance)
    kept[order[len(order) - k :]] = 1
    tau = tau * kept
    squares = tau.square().mean(dim=1)
    w = squares / squares.sum() if squares.sum() > 0 else torch.full_like(squares, 1 / len(rows))
    if not erase:
        return (w[:, None] * tau).sum(dim=0).reshape(rows[0].shape)
    agrees = torch.where(tau.sum(dim=0) >= 0, tau > 0, tau < 0)
    weights = w[:, None] * agrees
    total = weights.sum(dim=0)
    return ((weights * tau).sum(dim=0) / torch.where(total > 0, total, 1.0)).reshape(rows[0].shape)


def test_the_steps_by_hand():
    rows = torch.tensor([[3.0, 1.0, 1.0, 0.0], [1.0, -3.0, 1.0, 0.0]])
    # variances 1, 4, 0, 0: of the two above 0, density 0.5 keeps the second
    base = {"w": torch.zeros(4)}
    experts = [{"w": row} for row in rows]
    assert select("w", base, experts, 0.5).tolist() == [False, True, False, False]
    assert select("w", base, experts, 1.0) is None
    # weights 11/22 and 11/22; the signs of position 1 disagree, -3 has more mass
    torch.testing.assert_close(merged(rows), torch.tensor([2.0, -3.0, 1.0, 0.0]))
    torch.testing.assert_close(merged(rows, erase=False), torch.tensor([2.0, -1.0, 1.0, 0.0]))
    # selected alone: squares 1 and 9
    torch.testing.assert_close(merged(rows, density=0.5), torch.tensor([0.0, -3.0, 0.0, 0.0]))
    torch.testing.assert_close(merged(rows, density=0.5, erase=False)[1], torch.tensor(-0.9 * 3 + 0.1 * 1))
    torch.testing.assert_close(merged(rows, scale=0.5), 0.5 * merged(rows))


def test_a_tensor_comes_mostly_from_who_changed_it():
    rows = torch.tensor([[2.0, 2.0], [1.0, 1.0]])  # weights 4/5 and 1/5
    torch.testing.assert_close(merged(rows), torch.tensor([1.8, 1.8]))
    small = 1e-4 * rows
    torch.testing.assert_close(merged(small), 1e-4 * torch.tensor([1.8, 1.8]))
    torch.testing.assert_close(merged(small, floor=1e-6), 1e-4 * torch.tensor([1.5, 1.5]))


@given(st.integers(1, 6), st.integers(0, 10**6), st.floats(0, 1), st.booleans())
@settings(deadline=None, max_examples=40)
def test_it_is_the_plain_form(count, seed, density, erase):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 6, 5, generator=g)
    rows[:, 0] = 0
    found = merged(rows, density=density, erase=erase)
    torch.testing.assert_close(found, plain(rows, density, erase).float(), rtol=1e-4, atol=1e-5)


def test_many_positions_are_selected_through_a_sample(monkeypatch):
    monkeypatch.setattr(ranks, "SAMPLE", 64)
    monkeypatch.setattr(selection, "CHUNK", 100)
    rows = torch.randn(3, 2000)
    for density in (0.01, 0.3, 0.97):
        torch.testing.assert_close(merged(rows, density=density), plain(rows, density).float(), rtol=1e-4, atol=1e-5)


def test_equal_variances_at_the_edge_leave_exactly_the_share():
    rows = torch.tensor([[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0]])
    base, experts = {"w": torch.zeros(4)}, [{"w": row} for row in rows]
    assert select("w", base, experts, 0.5).tolist() == [False, False, True, True]
    assert merged(rows, density=0.5, erase=False).tolist() == [0, 0, 0, 0]


def test_one_expert_copies_and_nothing_learnt():
    row = torch.randn(3, 4)
    torch.testing.assert_close(merged(row[None]), row)
    torch.testing.assert_close(merged(row.repeat(4, 1, 1)), row)
    base = torch.randn(3, 4)
    # one expert has no variance: a share of nothing is nothing
    assert torch.equal(merged(row[None], base, density=0.5), base)
    assert torch.equal(merged(torch.zeros(2, 3, 4), base), base)
    assert torch.equal(merged(torch.randn(2, 3, 4), base, density=0.0), base)


def test_weights_of_a_tensor_sum_to_one():
    w = calculate(iter([(None, None, torch.tensor([[1.0, 1.0], [2.0, 0.0]]))]), 2, 2)
    torch.testing.assert_close(w, torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_odd_tensors_and_precisions(dtype):
    base = {"s": torch.tensor(1.0), "e": torch.zeros(0, 3), "w": torch.randn(3, 2), "n": torch.tensor([3])}
    base = {key: t.to(dtype) if t.is_floating_point() else t for key, t in base.items()}
    experts = [{key: t + 1 if t.is_floating_point() else t for key, t in base.items()} for _ in range(10)]
    out = sce(base, experts)
    torch.testing.assert_close(out["s"], experts[0]["s"])
    torch.testing.assert_close(out["w"], experts[0]["w"], rtol=0.01, atol=0.01)
    assert (out["e"].shape, out["n"].tolist()) == ((0, 3), [3])
    assert sce(base, experts, density=0.4)["e"].shape == (0, 3)


def test_files_stream(tmp_path):
    models = [{"a": torch.randn(4, 3), "b": torch.randn(5)} for _ in range(4)]
    paths = [save(weights, tmp_path / f"{i}.safetensors") for i, weights in enumerate(models)]
    out = merge_files(sce, paths[0], paths[1:], tmp_path / "o.safetensors", progress=False, density=0.5)
    whole = sce(models[0], models[1:], density=0.5)
    assert all(torch.equal(whole[key], tensor) for key, tensor in load(out).items())
