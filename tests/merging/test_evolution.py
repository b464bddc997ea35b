import builtins

import numpy as np
import pytest
import torch

from notebook_kit.merging import cma_es, map_elites, slerp_search
from notebook_kit.weights import unflatten

BASE = {"w": torch.zeros(20)}
HALVES = torch.full((2, 20), 0.01)
HALVES[0, :10] = HALVES[1, 10:] = 1.0
EXPERTS = [{"w": row} for row in HALVES]


def points(weights):
    return (weights["w"] > 0.5).float()


def bowl(x):
    return -float(((x - torch.tensor([1.0, -2.0, 0.5])) ** 2).sum())


def test_cma_finds_the_bottom_of_a_bowl_and_leaves_numpy_alone(monkeypatch):
    for name in ("seed", "randn"):
        monkeypatch.setattr(np.random, name, lambda *_: pytest.fail("numpy's global generator was used"))
    found = cma_es(torch.zeros(3), bowl, sigma=0.5, evals=400)
    torch.testing.assert_close(found.flat, torch.tensor([1.0, -2.0, 0.5]), atol=1e-2, rtol=0)
    assert len(found.history) <= 400
    assert (found.history.diff() >= 0).all()
    assert found.score == pytest.approx(bowl(found.flat))
    assert torch.equal(found.flat, cma_es(torch.zeros(3), bowl, sigma=0.5, evals=400).flat)
    assert not torch.equal(found.flat, cma_es(torch.zeros(3), bowl, sigma=0.5, evals=400, seed=1).flat)


def test_cma_within_bounds_and_with_a_diagonal():
    held = cma_es(torch.zeros(3), bowl, sigma=0.3, evals=300, bounds=(-1.0, 1.0))
    torch.testing.assert_close(held.flat, torch.tensor([1.0, -1.0, 0.5]), atol=0.05, rtol=0)
    target = torch.linspace(-1, 1, 300)
    start = torch.zeros(300)

    def score(x):
        return -float(((x - target) ** 2).mean())

    found = cma_es(start, score, sigma=0.3, evals=600, pop_size=20, diagonal=True)
    assert found.score > -0.9 * float((target**2).mean())
    assert len(found.history) == 600


def test_map_elites_keeps_the_best_of_each_cell():
    first = torch.arange(20) < 10
    found = map_elites(BASE, EXPERTS, score_points=points, groups=(first, ~first), evals=200)
    assert found.score > 0.9
    assert found.history[0] == 0.5
    assert (found.history.diff() >= 0).all()
    assert float(points(unflatten(found.flat, BASE)).mean()) == pytest.approx(found.score)
    again = map_elites(BASE, EXPERTS, score_points=points, groups=(first, ~first), evals=200)
    assert torch.equal(found.flat, again.flat)
    alone = map_elites(BASE, EXPERTS[:1], score_points=points, groups=(first, ~first), evals=30, mutation_std=0.1)
    assert alone.score >= 0.5  # one cell at first: a parent mates itself


def test_slerp_search_walks_the_whole_arc():
    found = slerp_search(BASE, EXPERTS, score_points=points, evals=51)
    assert found.score == 1.0  # halfway both halves are 0.7
    assert len(found.history) == 51
    flat = slerp_search(BASE, EXPERTS, score_points=lambda weights: points(weights) * 0, evals=5)
    torch.testing.assert_close(flat.flat, HALVES[0])


def test_bad_input_is_named(monkeypatch):
    first = torch.arange(20) < 10
    with pytest.raises(ValueError, match="groups must be two masks with a point each, got 1"):
        map_elites(BASE, EXPERTS, score_points=points, groups=(first,))
    with pytest.raises(ValueError, match=r"bins must be in \[1, 100\], got 0 \(map_elites\)"):
        map_elites(BASE, EXPERTS, score_points=points, groups=(first, ~first), bins=0)
    with pytest.raises(ValueError, match="exactly two experts, got 1"):
        slerp_search(BASE, EXPERTS[:1], score_points=points)
    with pytest.raises(ValueError, match="evals must be at least one generation, 7, got 3"):
        cma_es(torch.zeros(3), bowl, evals=3)
    with pytest.raises(ValueError, match="sigma must be in"):
        cma_es(torch.zeros(3), bowl, sigma=0.0)
    real = builtins.__import__

    def without_cma(name, *rest):
        if name == "cma":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_cma)
    with pytest.raises(ImportError, match="pip install cma"):
        cma_es(torch.zeros(3), bowl)
