"""DELLA: probabilities by rank, true on average, DARE where epsilon is zero."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.merging import dare, della
from notebook_kit.merging.della import drop_by_rank, keep_probabilities


def test_the_probabilities_of_the_card():
    p = keep_probabilities(torch.tensor([0.1, 0.4, 0.2, 0.3]), density=0.5, epsilon=0.2)
    torch.testing.assert_close(p, torch.tensor([0.3, 0.7, 1.3 / 3, 1.7 / 3]))
    rows = keep_probabilities(torch.tensor([[0.1, -0.4, 0.2, 0.3], [9.0, 7, -8, 6]]), density=0.5, epsilon=0.2)
    torch.testing.assert_close(rows[0], p)
    torch.testing.assert_close(rows[1], torch.tensor([0.7, 1.3 / 3, 1.7 / 3, 0.3]))


def test_a_row_is_ranked_alone_or_with_its_tensor():
    tau = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert keep_probabilities(tau, density=0.5, epsilon=0.3)[:, 0].tolist() == pytest.approx([0.2, 0.2])
    whole = keep_probabilities(tau, density=0.5, epsilon=0.3, scope="tensor")
    assert whole.reshape(-1).tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (0,), (3, 0), (2, 3, 4), (2, 3, 1, 4)])
def test_shapes_of_every_kind(shape):
    tau = torch.randn(shape)
    p = keep_probabilities(tau, density=0.6, epsilon=0.1)
    assert p.shape == tau.shape
    if tau.numel():
        assert float(p.mean()) == pytest.approx(0.6)
    if shape == (2, 3, 4):  # stacked experts: rows along the last axis; a convolution's channel is one row
        assert float(p.mean(dim=-1).std()) < 1e-6
    if shape == (2, 3, 1, 4):
        assert p.reshape(2, -1).sort(dim=1).values[0].tolist() == pytest.approx(
            [0.5 + 0.2 * r / 11 for r in range(12)], abs=1e-6
        )


@given(st.floats(0, 1), st.floats(0, 0.5), st.integers(2, 20))
@settings(deadline=None, max_examples=40)
def test_the_window_fits_and_the_mean_is_the_density(density, epsilon, n):
    p = keep_probabilities(torch.randn(n), density=density, epsilon=epsilon)
    assert float(p.min()) >= -1e-6
    assert float(p.max()) <= 1 + 1e-6
    assert float(p.mean()) == pytest.approx(density, abs=1e-5)
    width = min(epsilon, density, 1 - density)
    assert float(p.max() - p.min()) == pytest.approx(2 * width, abs=1e-5)


def test_the_expectation_is_the_task_vector():
    tau, n = torch.linspace(-2, 2, 30).reshape(6, 5), 2000
    keep = keep_probabilities(tau, density=0.4, epsilon=0.3)
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([drop_by_rank(tau, keep, "inverse", g) for _ in range(n)])
    error, bound = (draws.mean(dim=0) - tau).abs(), (tau**2 * (1 - keep) / keep / n).sqrt()
    assert (error <= 4 * bound + 1e-6).all()
    assert (error <= 3 * bound + 1e-6).float().mean() >= 0.95
    bare = torch.stack([drop_by_rank(tau, keep, "none", g) != 0 for _ in range(n)]).float().mean(dim=0)
    assert ((bare - keep).abs()[tau != 0] < 0.05).all()


def test_large_entries_survive_more_often():
    tau = torch.randn(50, 40)
    kept = della({"w": torch.zeros(50, 40)}, [{"w": tau}], density=0.4, epsilon=0.3, rescale="none")["w"] != 0
    large = tau.abs() > tau.abs().median()
    assert float(kept[large].float().mean()) > float(kept[~large].float().mean()) + 0.15


def test_epsilon_zero_is_dare():
    base = {"w": torch.randn(6, 5), "v": torch.randn(7)}
    experts = [{key: t + torch.randn(t.shape) for key, t in base.items()} for _ in range(3)]
    for rescale in ("inverse", "norm", "none"):
        options = {"density": 0.5, "rescale": rescale, "scale": 0.6, "seed": 4}
        ours = della(base, experts, epsilon=0.0, elect="none", normalize=False, **options)
        voted = della(base, experts, epsilon=0.0, elect="mass", **options)
        for key in base:
            torch.testing.assert_close(ours[key], dare(base, experts, **options)[key])
            torch.testing.assert_close(voted[key], dare(base, experts, elect="mass", **options)[key])


def test_seeds_reproduce_and_density_zero_is_base():
    base, expert = {"w": torch.randn(9, 8)}, {"w": torch.randn(9, 8)}
    first, again, other = (della(base, [expert], seed=seed)["w"] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for rescale in ("inverse", "norm", "none"):
        assert torch.equal(della(base, [expert], density=0.0, rescale=rescale)["w"], base["w"])


def test_names_not_places_make_the_masks():
    w, v = torch.randn(30), torch.randn(30)
    one = della({"w": torch.zeros(30), "v": torch.zeros(30)}, [{"w": w, "v": v}])
    two = della({"v": torch.zeros(30), "w": torch.zeros(30)}, [{"v": v, "w": w}])
    assert all(torch.equal(one[key], two[key]) for key in one)
