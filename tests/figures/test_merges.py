"""Figures of merges: axes have titles, numbers are the diagnostics', every control can be moved to its ends."""

import numpy as np
import pytest
import torch

from notebook_kit import explore
from notebook_kit.diagnostics.merges import factorwise_error, kept_shares, score_surface, sign_conflicts
from notebook_kit.figures.merges import adapter_sum_view, kept_figure, merge_view, surface_view
from notebook_kit.figures.static import to_png
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging import average, ties
from notebook_kit.zoo import Score

BASE = {"layer.weight": torch.zeros(4, 6), "bias": torch.zeros(4)}


@pytest.fixture
def experts():
    generator = torch.Generator().manual_seed(0)
    return [{k: t + torch.randn(t.shape, generator=generator) for k, t in BASE.items()} for _ in range(3)]


@pytest.fixture
def merges(experts):
    return {"average": average(BASE, experts), "ties": ties(BASE, experts)}


def test_merge_view_draws_the_diagnostics(experts, merges):
    conflicts = merge_view(BASE, experts, merges, picture="sign conflicts", density=0.5)
    table = sign_conflicts(BASE, experts, density=0.5)
    np.testing.assert_allclose(conflicts.data[0].x, table["conflict"])
    assert sum(trace.x[0] for trace in conflicts.data) == pytest.approx(1)
    assert conflicts.layout.barmode == "stack"
    kept = merge_view(BASE, experts, merges, picture="kept changes", density=0.3)
    shares = kept_shares(BASE, experts, merges["ties"], density=0.3)
    assert list(kept.data[0].x) == ["average", "ties"]
    np.testing.assert_allclose(kept.data[0].z[:, 1], shares.mean(axis=1), rtol=1e-6)
    one = merge_view(BASE, experts, merges, picture="kept changes", density=0.3, method="ties", names=list("xyz"))
    assert list(one.data[0].x) == list("xyz")
    np.testing.assert_allclose(one.data[0].z, shares, rtol=1e-6)
    spectrum = merge_view(BASE, experts, merges, picture="spectrum", tensor="layer.weight")
    assert [trace.name for trace in spectrum.data] == ["experts, mean", "average", "ties"]
    with pytest.raises(ValueError, match="picture must be one of"):
        merge_view(BASE, experts, merges, picture="none")


def test_a_method_that_is_not_there():
    with pytest.raises(ValueError, match="method must be 'all methods' or one of ties, got 'tise'"):
        kept_figure({"ties": np.zeros((2, 3))}, ["a", "b"], list("xyz"), method="tise")


def test_merge_view_moves(experts, merges):
    limits = {"tensor": Choice("layer.weight"), "method": Choice("all methods", "ties")}
    widget = explore(merge_view, BASE, experts, merges, limits=limits)
    for name, row in widget._schema.items():
        for value in list(row.options) or [row.low, row.high]:
            widget.settings = {name: value}
            assert not widget.error
        widget.settings = {name: row.default}
    for picture in widget._schema["picture"].options:
        assert to_png(merge_view(BASE, experts, merges, picture=picture))


def test_surface_view(experts, merges):
    models = dict(zip(("base", "a", "b"), (BASE, *experts[:2]), strict=True))

    def score(weights):
        return Score({"<t>": -float(weights["bias"].norm()), "u": 0.5}, "points")

    surface = score_surface(models, score, n=4, also=merges, progress=False)
    points = surface.place(merges)
    figure = surface_view(surface, points, task="<t>")
    np.testing.assert_allclose(figure.data[0].z, surface.scores["<t>"], rtol=1e-6)
    assert list(figure.data[1].text) == ["base", "a", "b"]
    assert list(figure.data[2].text) == ["average", "ties"]
    nearest = surface_view(
        surface, points, farthest=float((points["distance"].min() + 1e-6) / points["distance"].max())
    )
    assert len(nearest.data[2].text) == 1
    with pytest.raises(ValueError, match="task must be one of mean, <t>, u"):
        surface_view(surface, points, task="v")
    widget = explore(surface_view, surface, points, limits={"task": Choice(*surface.scores)})
    for settings in ({"shade": "map"}, {"farthest": 0.0}, {"task": "u"}):  # u is flat
        widget.settings = settings
        assert not widget.error
        assert to_png(widget.figure)


def test_adapter_sum_view():
    generator = torch.Generator().manual_seed(0)
    adapters = [
        ({"w.A": torch.randn(2, 6, generator=generator), "w.B": torch.randn(5, 2, generator=generator)}, 1.0)
        for _ in range(2)
    ]
    figure = adapter_sum_view(adapters, weight=0.5, rank=2)
    assert figure.data[0].x[0] == pytest.approx(factorwise_error(adapters, [0.5, 0.5])["error"][0])
    assert 0 < figure.data[1].x[0] < 1
    assert adapter_sum_view(adapters, rank=4).data[1].x[0] == 0
    widget = explore(adapter_sum_view, adapters, limits={"rank": Range(1, 8)})
    for weight in (0.0, 1.0):
        widget.settings = {"weight": weight}
        assert not widget.error
        assert widget.figure.data[0].x[0] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two adapters, got 1"):
        adapter_sum_view(adapters[:1])
