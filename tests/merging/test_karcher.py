"""The Karcher mean: balance of the ways, lengths, SLERP for two, and places without a shortest way."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import average, karcher, slerp


def centre(*rows, **settings):
    rows = [torch.as_tensor(row) for row in rows]
    return karcher({"w": torch.zeros_like(rows[0])}, [{"w": row} for row in rows], **settings)["w"]


def log(m, u):
    """The way from m to u on the unit sphere, as a tangent vector."""
    cos = (m @ u).clamp(-1, 1)
    phi = torch.acos(cos)
    return phi / torch.sin(phi) * (u - cos * m)


def test_three_axes_meet_on_the_diagonal():
    torch.testing.assert_close(centre(*torch.eye(3)), torch.full((3,), 1 / math.sqrt(3)))
    # On a circle the mean angle is the answer: 0°, 0° and 90° give 30°; a plain mean would give 26.6°.
    found = centre([1.0, 0.0], [1.0, 0.0], [0.0, 1.0], n_iterations=50, tolerance=1e-9)
    assert math.degrees(math.atan2(found[1], found[0])) == pytest.approx(30, abs=1e-3)
    plain = centre([1.0, 0.0], [1.0, 0.0], [0.0, 1.0], n_iterations=0)
    assert math.degrees(math.atan2(plain[1], plain[0])) == pytest.approx(26.565, abs=1e-3)


def test_weights_and_lengths():
    found = centre([1.0, 0.0], [0.0, 3.0], weights=[3.0, 1.0], n_iterations=50, tolerance=1e-9)
    length, angle = 0.75 * 1 + 0.25 * 3, math.radians(22.5)
    torch.testing.assert_close(found, torch.tensor([length * math.cos(angle), length * math.sin(angle)]))
    torch.testing.assert_close(centre([1.0, 0.0], [0.0, 3.0], weights=[1.0, 0.0]), torch.tensor([1.0, 0.0]))


@given(st.integers(2, 8), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_the_ways_cancel_and_the_length_is_the_mean(count, seed):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 30, generator=g, dtype=torch.float64) + torch.randn(30, generator=g).double()
    found = centre(*rows, n_iterations=100, tolerance=1e-9)
    units = rows / rows.norm(dim=1, keepdim=True)
    m = found / found.norm()
    assert sum(log(m, u) for u in units).norm() < 1e-6
    torch.testing.assert_close(found.norm(), rows.norm(dim=1).mean())
    torch.testing.assert_close(centre(*rows.flip(0), n_iterations=100, tolerance=1e-9), found)


@given(st.floats(0.05, 0.95), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_two_of_equal_length_are_slerp(t, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 40, generator=g)
    b *= a.norm() / b.norm()
    arc = slerp({"w": a}, [{"w": a}, {"w": b}], t=t)["w"]
    torch.testing.assert_close(centre(a, b, weights=[1 - t, t], n_iterations=100), arc, rtol=1e-3, atol=1e-4)


def test_the_plain_mean_is_shorter():
    rows = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    mean = average({"w": rows[0]}, [{"w": row} for row in rows])["w"]
    assert mean.norm() < 0.4 * rows.norm(dim=1).mean()  # 1/√8 for independent ones
    torch.testing.assert_close(centre(*rows).norm(), rows.norm(dim=1).mean())


def test_copies_zeros_and_opposites():
    row = torch.randn(7)
    torch.testing.assert_close(centre(row, row, row), row)
    torch.testing.assert_close(centre(row), row)
    torch.testing.assert_close(centre(row, 3 * row), 2 * row)
    assert centre(torch.zeros(3), torch.zeros(3)).tolist() == [0, 0, 0]
    torch.testing.assert_close(centre(row, torch.zeros(7)), row / 2)  # a zero has no direction, but a length
    torch.testing.assert_close(centre(row, -row), row)
    assert torch.isfinite(centre(row, -row + 1e-4)).all()
    assert centre(torch.tensor(2.0), torch.tensor(4.0)).item() == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    rows = torch.randn(10, 4, 5).to(dtype)
    found = centre(*rows)
    assert found.dtype == dtype
    torch.testing.assert_close(found, centre(*rows.float()).to(dtype))


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0]])
def test_weights_that_make_no_mean(weights):
    with pytest.raises(ValueError, match="weights must be at least 0, and one above, got"):
        centre([1.0], [2.0], weights=weights)
