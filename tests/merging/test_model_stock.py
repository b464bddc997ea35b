"""Model Stock: shares of the mean worked by hand, its scopes, and cosines at which the formula breaks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import average, load, merge_files, model_stock, save
from notebook_kit.merging.geometry import mean_cosine
from notebook_kit.merging.model_stock import interpolation


def at_angle(cos, k=2, length=1.0):
    """k vectors of which each pair has this cosine."""
    gram = torch.full((k, k), float(cos)).fill_diagonal_(1)
    return length * torch.linalg.cholesky(gram + 1e-9 * torch.eye(k))


def stock(rows, base=None, **settings):
    rows = torch.as_tensor(rows)
    base = torch.zeros_like(rows[0]) if base is None else base
    return model_stock({"w": base}, [{"w": base + row} for row in rows], **settings)["w"]


@pytest.mark.parametrize(("k", "cos", "t"), [(2, 0.5, 2 / 3), (3, 0.5, 0.75), (2, 0.0, 0.0), (4, 1.0, 1.0)])
def test_the_share_by_hand(k, cos, t):
    assert float(interpolation(cos, k)) == pytest.approx(t)
    if cos < 1:
        rows = at_angle(cos, k)
        torch.testing.assert_close(stock(rows), t * rows.mean(dim=0), rtol=1e-4, atol=1e-4)


def test_cosines_below_zero():
    assert float(interpolation(-0.2, 3)) == 0
    assert float(interpolation(-0.2, 3, clamp=False)) == pytest.approx(3 * -0.2 / 0.6)
    assert float(interpolation(-0.5, 3, clamp=False)) == 0  # no finite value: the base
    assert float(interpolation(-0.9, 3)) == 0
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.1]])
    assert stock(rows).tolist() == [0, 0]
    assert torch.isfinite(stock(rows, clamp=False)).all()


@given(st.integers(2, 8), st.floats(-1, 1), st.floats(-1, 1))
@settings(deadline=None, max_examples=40)
def test_the_share_is_between_and_grows_with_the_cosine(k, one, other):
    low, high = sorted((one, other))
    assert 0 <= float(interpolation(low, k)) <= float(interpolation(high, k)) + 1e-9 <= 1 + 1e-6


def test_copies_are_the_expert_and_right_angles_the_base():
    base, row = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(stock(row.repeat(3, 1, 1), base), base + row)
    base = torch.randn(5)
    torch.testing.assert_close(stock(torch.eye(5), base), base, rtol=0, atol=1e-6)


def test_the_centre_of_runs_around_it():
    """Noise of one length around a common change: the stock lies nearer to the change than the mean does."""
    g = torch.Generator().manual_seed(0)
    change = torch.randn(4000, generator=g)
    rows = change + 2 * torch.randn(3, 4000, generator=g)
    found, mean = stock(rows), rows.mean(dim=0)
    assert (found - change).norm() < 0.85 * (mean - change).norm()


def test_scopes():
    base = {"x": torch.zeros(2, 2), "v": torch.zeros(2)}
    # row 0 agrees (cos 1), row 1 is at right angles
    first = {"x": torch.tensor([[1.0, 0.0], [1.0, 0.0]]), "v": torch.tensor([1.0, 0.0])}
    other = {"x": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "v": torch.tensor([1.0, 0.0])}
    by_row = model_stock(base, [first, other], scope="row")
    torch.testing.assert_close(by_row["x"], torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(by_row["v"], first["v"])
    by_tensor = model_stock(base, [first, other])  # cos 1/2, t 2/3
    torch.testing.assert_close(by_tensor["x"], 2 / 3 * torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    by_model = model_stock(base, [first, other], scope="model")  # cos 2/3, t 4/5
    torch.testing.assert_close(by_model["v"], torch.tensor([0.8, 0.0]))


def test_rows_of_a_kernel_are_its_output_units():
    base = torch.randn(4, 3, 2, 2)
    rows = torch.randn(2, 4, 3, 2, 2) + 1
    flat = stock(rows.reshape(2, 4, -1), base.reshape(4, -1), scope="row")
    torch.testing.assert_close(stock(rows, base, scope="row").reshape(4, -1), flat)


def test_mean_of_angles_or_of_cosines():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    half = math.sqrt(0.5)
    gram = (rows @ rows.T).double()
    assert float(mean_cosine(gram)) == pytest.approx(2 * half / 3)
    assert float(mean_cosine(gram, "angles")) == pytest.approx(math.cos(math.pi / 3))
    torch.testing.assert_close(stock(rows, mean_of="angles"), 0.75 * rows.mean(dim=0))
    torch.testing.assert_close(stock(rows[:2] + 0.2, mean_of="angles"), stock(rows[:2] + 0.2))


@pytest.mark.parametrize("scope", ["tensor", "row", "model"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_odd_tensors_and_precisions(scope, dtype):
    base = {"s": torch.tensor(1.0), "e": torch.zeros(0, 3), "w": torch.randn(3, 2), "n": torch.tensor([3])}
    base = {key: t.to(dtype) if t.is_floating_point() else t for key, t in base.items()}
    experts = [{key: t + 1 if t.is_floating_point() else t for key, t in base.items()} for _ in range(10)]
    merged = model_stock(base, experts, scope=scope)
    torch.testing.assert_close(merged["s"], experts[0]["s"])
    assert merged["e"].shape == (0, 3)
    torch.testing.assert_close(merged["w"], experts[0]["w"], rtol=0.01, atol=0.01)
    assert merged["n"].tolist() == [3]
    assert torch.equal(model_stock(base, [base, base], scope=scope)["w"], base["w"])  # nothing was learnt: no NaN


@pytest.mark.parametrize("scope", ["tensor", "row", "model"])
def test_files_stream(scope, tmp_path):
    models = [{"a": torch.randn(4, 3), "b": torch.randn(5)} for _ in range(4)]
    paths = [save(weights, tmp_path / f"{i}.safetensors") for i, weights in enumerate(models)]
    out = merge_files(model_stock, paths[0], paths[1:], tmp_path / "o.safetensors", progress=False, scope=scope)
    whole = model_stock(models[0], models[1:], scope=scope)
    assert all(torch.equal(whole[key], tensor) for key, tensor in load(out).items())


def test_one_expert_has_no_angle():
    with pytest.raises(ValueError, match=r"model_stock needs at least two experts, .* got 1"):
        model_stock({"w": torch.zeros(1)}, [{"w": torch.zeros(1)}])


def test_identical_directions_are_the_average():
    rows = torch.stack([torch.ones(6), 3 * torch.ones(6)])
    base = {"w": torch.zeros(6)}
    torch.testing.assert_close(stock(rows), average(base, [{"w": row} for row in rows])["w"])
