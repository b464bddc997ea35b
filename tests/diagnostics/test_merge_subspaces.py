"""Spectra, interference, and DOGE's record, on matrices small enough to know the answer."""

import numpy as np
import pytest
import torch

from notebook_kit.diagnostics.merge_subspaces import (
    doge_path,
    doge_view,
    energy_table,
    interference,
    matrix_of,
    merge_spectra,
    spectrum_table,
)
from notebook_kit.merging import isotropic


def models(count=2, shape=(6, 8)):
    g = torch.Generator().manual_seed(0)

    def draw():
        return {"w": torch.randn(*shape, generator=g), "b": torch.randn(3, generator=g)}

    return draw(), [draw() for _ in range(count)]


def test_spectra_are_those_of_the_change():
    base = {"w": torch.eye(2), "experts.up": torch.zeros(2, 2, 3)}
    moved = {"w": torch.eye(2) + torch.diag(torch.tensor([3.0, 4.0])), "experts.up": torch.ones(2, 2, 3)}
    np.testing.assert_allclose(merge_spectra(base, {"one": moved}, "w")["one"], [4, 3], rtol=1e-6)
    (values,) = merge_spectra(base, {"one": moved}).values()  # the largest tensor: experts below each other
    np.testing.assert_allclose(values, [12**0.5, 0, 0], atol=1e-5)
    with pytest.raises(ValueError, match="'b' is no matrix of base; there are w"):
        matrix_of(models()[0], "b")


def test_a_flat_merge_has_full_effective_rank():
    base, experts = models()
    table = spectrum_table(base, {"flat": isotropic(base, experts), "first": experts[0]}).set_index("model")
    assert table.loc["flat", "effective_rank"] == pytest.approx(6, rel=1e-3)
    assert table.loc["flat", "stable_rank"] == pytest.approx(6, rel=1e-3)
    assert table.loc["first", "effective_rank"] < 5.9
    assert table.loc["first", "norm"] == pytest.approx(float((experts[0]["w"] - base["w"]).norm()), rel=1e-5)


def test_interference_is_zero_for_orthogonal_tasks_and_after_the_turn():
    base = {"w": torch.zeros(2, 2)}
    apart = [{"w": torch.diag(torch.tensor(d))} for d in ([3.0, 0.0], [0.0, 2.0])]
    assert interference(base, apart)["before"].item() == pytest.approx(0, abs=1e-6)
    # u_1 · u_2 = 1 / √2 and v_1 · v_2 = 1 / √2: (0 c; c 0) diag(1, 2) (0 c; c 0) = diag(2, 1) / 2
    tilted = [{"w": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}, {"w": torch.ones(2, 2)}]
    row = interference(base, tilted).iloc[0]
    assert row["before"] == pytest.approx(1.5, rel=1e-5)
    assert row["after"] == pytest.approx(0, abs=1e-5)
    assert row["before_share"] == pytest.approx(1.5 / (3 * 2), rel=1e-5)
    assert interference({"w": torch.zeros(1, 5)}, [{"w": torch.ones(1, 5)}] * 2).empty  # no direction for each


def test_a_recorded_descent():
    base, experts = models(3)
    path = doge_path(base, experts, lambda weights: float(weights["w"].sum()), grid=(0, 5, 20), lr=1e-2)
    assert path.steps == (0, 5, 20)
    assert [len(one["w"].losses) for one in path.details] == [1, 6, 21]
    torch.testing.assert_close(path.details[1]["w"].losses, path.details[2]["w"].losses[:6])
    assert set(path.taus) == {"w"}
    assert doge_view(path, steps=11).index == 1
    assert doge_view(path, steps=1000).tensor == "w"
    still, moved = (energy_table(path.details[i]).iloc[0] for i in (0, 2))
    assert still["norm"] == still["inside"] == 0
    assert 0 < moved["inside"] < 1
    assert moved["by_chance"] == pytest.approx(moved["rank"] / 6)
    with pytest.raises(ValueError, match="no treated tensor is called 'b'; there are w"):
        doge_view(path, tensor="b")
