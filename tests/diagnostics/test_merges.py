"""Numbers about merges: hand-worked conflicts and shares, a plane that returns its corners, the adapters' trap."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.adapters import merge_adapters
from notebook_kit.diagnostics.merges import (
    change_spectra,
    factorwise,
    factorwise_error,
    kept_shares,
    known_merges,
    needs_no_data,
    plane_of,
    score_surface,
    sign_conflicts,
)
from notebook_kit.merging import average, task_arithmetic, ties
from notebook_kit.weights import IncompatibleWeights
from notebook_kit.zoo import Score

TAU = torch.tensor([[3.0, -1.0, 0.2, -2.0, 0.0], [1.0, 2.0, -0.1, -1.0, 0.0], [2.0, 0.0, 0.0, 0.5, 0.0]])
BASE = {"w": torch.ones(5), "n": torch.tensor(2)}
EXPERTS = [{"w": 1 + row, "n": torch.tensor(2)} for row in TAU]


def test_conflicts_by_hand():
    """Column by column: all plus, both signs, both, both, nobody."""
    row = sign_conflicts(BASE, EXPERTS).iloc[0]
    assert row.tolist() == ["w", 5, 0.6, 0.2, 0.0, 0.2]
    # The two largest of each: entries 0 and 3, 0 and 1, 0 and 3.
    row = sign_conflicts(BASE, EXPERTS, density=0.4).iloc[0]
    assert row[["conflict", "agree", "alone", "nobody"]].tolist() == pytest.approx([0.2, 0.2, 0.2, 0.4])


def test_kept_shares_by_hand():
    merged = {"w": 1 + torch.tensor([1.0, 1.0, 1.0, -1.0, 5.0]), "n": torch.tensor(2)}
    table = kept_shares(BASE, EXPERTS, merged, density=1.0)
    np.testing.assert_allclose(table, [[3 / 4, 3 / 4, 1 / 2]])
    np.testing.assert_allclose(kept_shares(BASE, EXPERTS, merged, density=0.2), [[1, 1, 1]])
    assert np.isnan(kept_shares(BASE, [BASE], merged)).all()


def test_kept_shares_do_not_depend_on_strength_and_are_1_for_the_expert_itself():
    weak, strong = (task_arithmetic(BASE, EXPERTS, scale=scale) for scale in (0.1, 2.0))
    np.testing.assert_array_equal(kept_shares(BASE, EXPERTS, weak), kept_shares(BASE, EXPERTS, strong))
    assert kept_shares(BASE, EXPERTS, EXPERTS[0], density=1.0)[0, 0] == 1
    assert kept_shares(BASE, EXPERTS, BASE, density=1.0).tolist() == [[0, 0, 0]]
    elected = kept_shares(BASE, EXPERTS, ties(BASE, EXPERTS, density=1.0), density=1.0)
    assert elected.mean() >= 0.5


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_density_has_a_range(density):
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
        sign_conflicts(BASE, EXPERTS, density=density)
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
        kept_shares(BASE, EXPERTS, BASE, density=density)


def test_spectra_before_and_after():
    base = {"w": torch.zeros(2, 2)}
    models = {"a": {"w": torch.diag(torch.tensor([3.0, 1.0]))}, "b": {"w": torch.diag(torch.tensor([0.0, 2.0]))}}
    spectra = change_spectra(base, models | {"mean": average(base, list(models.values()))}, "w")
    for name, values in {"a": [3, 1], "b": [2, 0], "mean": [1.5, 1.5]}.items():
        np.testing.assert_allclose(spectra[name], values, atol=1e-6)
    with pytest.raises(ValueError, match="no floating tensor is called 'v'"):
        change_spectra(base, models, "v")


# ---------------------------------------------------------------- the plane
def random_models(seed, n=3):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (3, 4), "b": (3,)}
    return {
        name: {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()} | {"n": torch.tensor(1)}
        for name in "abcd"[:n]
    }


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), x=st.floats(-3, 3), y=st.floats(-3, 3))
def test_a_plane_gives_back_its_corners_and_measures_distances_of_weight_space(seed, x, y):
    models = random_models(seed)
    plane = plane_of(models)
    for name, corner in plane.corners.items():
        for key, tensor in plane.at(*corner).items():
            torch.testing.assert_close(tensor, models[name][key], rtol=0, atol=1e-5)
        assert plane.project(models[name]) == pytest.approx((*corner, 0), abs=1e-5)
    point = plane.at(x, y)
    assert plane.project(point) == pytest.approx((x, y, 0), abs=1e-4)
    away = torch.cat([(point[key] - models["a"][key]).reshape(-1) for key in ("w", "b")]).norm()
    assert float(away) == pytest.approx((x**2 + y**2) ** 0.5, abs=1e-4)


def test_a_model_beside_the_plane():
    base = {"w": torch.zeros(3)}
    e = torch.eye(3)
    plane = plane_of({"base": base, "a": {"w": 2 * e[0]}, "b": {"w": 3 * e[1]}})
    assert plane.corners == {"base": (0.0, 0.0), "a": (2.0, 0.0), "b": (0.0, 3.0)}
    assert plane.project({"w": e.sum(0)}) == pytest.approx((1, 1, 1))


def test_planes_that_are_none():
    models = random_models(0)
    with pytest.raises(ValueError, match="three models, got 2"):
        plane_of({name: models[name] for name in "ab"})
    line = {"a": {"w": torch.zeros(2)}, "b": {"w": torch.ones(2)}, "c": {"w": 3 * torch.ones(2)}}
    with pytest.raises(ValueError, match="a, b, c lie on one line"):
        plane_of(line)
    with pytest.raises(ValueError, match="lie on one line"):
        plane_of({"a": line["a"], "b": line["a"], "c": line["b"]})
    with pytest.raises(IncompatibleWeights, match="in c"):
        plane_of(models | {"c": {"w": torch.zeros(2)}})


def test_a_surface_scores_each_point_once_and_reaches_all_models():
    models = random_models(1, n=4)
    calls = []

    def score(weights):
        calls.append(weights)
        return Score({"t": float(weights["w"].sum()), "u": 1.0}, "points")

    three = {name: models[name] for name in "abc"}
    surface = score_surface(three, score, n=5, also={"d": models["d"]}, progress=False)
    assert len(calls) == 25
    assert surface.unit == "points"
    assert set(surface.scores) == {"mean", "t", "u"}
    at = surface.plane.at(float(surface.x[3]), float(surface.y[1]))
    assert surface.scores["t"][1, 3] == pytest.approx(float(at["w"].sum()), abs=1e-5)
    points = surface.place(models)
    assert points["model"].tolist() == list("abcd")
    for axis, values in (("x", surface.x), ("y", surface.y)):
        assert values[0] < points[axis].min()
        assert values[-1] > points[axis].max()
    with pytest.raises(ValueError, match="n must be at least 2"):
        score_surface(three, score, n=1)


# ---------------------------------------------------------------- adapters
def one(a, b, scaling=1.0):
    return {"w.A": torch.tensor([a]), "w.B": torch.tensor([b]).T}, scaling


def test_factorwise_by_hand():
    """(B₁ + B₂)(A₁ + A₂) / 2 holds B₁A₂ and B₂A₁ besides what is wanted."""
    first, second = one([1.0, 0.0], [1.0, 0.0]), one([0.0, 1.0], [0.0, 1.0])
    left, right = factorwise([first, second], [0.5, 0.5])["w"]
    torch.testing.assert_close(left @ right, torch.full((2, 2), 0.5))
    row = factorwise_error([first, second], [0.5, 0.5]).iloc[0]
    assert row[["norm", "factorwise", "error", "scale"]].tolist() == pytest.approx([0.5**0.5, 1, 1, 1], abs=1e-6)


def test_factorwise_is_exact_for_one_adapter_and_keeps_signs():
    source = one([1.0, 2.0], [3.0, -1.0], scaling=2.5)
    for weight in (1.0, -0.7):
        left, right = factorwise([source], [weight])["w"]
        torch.testing.assert_close(left @ right, weight * merge_adapters([source]).deltas()["w"])
    assert factorwise_error([source], [0.0])["error"].isna().all()


def test_factors_of_two_ranks_have_no_sum():
    wide = {"w.A": torch.ones(2, 2), "w.B": torch.ones(2, 2)}, 1.0
    with pytest.raises(ValueError, match="w has ranks 1 and 2"):
        factorwise([one([1.0, 0.0], [1.0, 0.0]), wide])


def test_known_merges():
    known = known_merges()
    assert {"average", "ties", "dare", "slerp", "task_arithmetic"} <= set(known)
    assert needs_no_data(known["ties"])
    assert "merge_files" not in known
