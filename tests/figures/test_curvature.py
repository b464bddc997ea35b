"""Pictures of curvature: axes are named, scales are shared, and what is drawn is what was computed."""

import numpy as np
import torch

from notebook_kit.diagnostics.curvature import decision_view, front_view, graft_view, log_pairs
from notebook_kit.figures.curvature import (
    decision_figure,
    front_figure,
    graft_figure,
    pairs_figure,
    similarity_figure,
)
from tests.diagnostics.test_curvature import BASE, EXPERTS, MOMENTS, NAMES, score


def fronts():
    from notebook_kit.diagnostics.curvature import weight_fronts
    from notebook_kit.merging import average, fisher

    ways = {"average": (average, {}), "Fisher": (fisher, {"fishers": MOMENTS})}
    return weight_fronts(BASE, EXPERTS, ways, score=score, tasks=NAMES, n_points=5)


def test_front_figure_marks_one_weight_on_each_line():
    table = fronts()
    picture = front_figure(front_view(table, weight=0.5), tasks=NAMES)
    assert [trace.name for trace in picture.data] == ["average", "Fisher", "average, here", "Fisher, here"]
    assert picture.data[0].line.color == picture.data[2].marker.color != picture.data[1].line.color
    here = table[(table["merge"] == "Fisher") & (table["weight"] == 0.5)].iloc[0]
    assert picture.data[3].x.tolist() == [here["a"]]
    assert picture.layout.xaxis.title.text == "accuracy on first"
    assert picture.layout.yaxis.title.text == "accuracy on second"
    assert "λ = 0.50 for first" in picture.layout.title.text


def test_decision_figure_has_one_scale_for_both_and_a_signed_one():
    picture = decision_figure(decision_view(MOMENTS, NAMES, tensor="w"))
    a, b, ratio = picture.data
    assert (a.zmin, a.zmax) == (b.zmin, b.zmax)
    assert ratio.zmin == -ratio.zmax
    assert not a.showscale
    assert "louder: second (−), first (+)" in ratio.colorbar.title.text
    assert picture.layout.yaxis.title.text == "output"
    zero = {"w": torch.zeros(2, 2)}
    assert len(decision_figure(decision_view([zero, zero], NAMES)).data) == 3


def test_graft_figure():
    from notebook_kit.diagnostics.curvature import graft_curves

    curves = graft_curves(BASE, EXPERTS, MOMENTS, score=score, names=NAMES, densities=(0.3, 1.0))
    view = graft_view(BASE, EXPERTS, MOMENTS, score, NAMES, curves, density=0.3)
    picture = graft_figure(view)
    lines = {trace.name: trace for trace in picture.data if trace.type == "scatter"}
    assert list(lines) == ["graft: FFG", "graft: magnitude", "merge: OTA + FFG", "grafts, here", "merge, here"]
    assert lines["merge, here"].y.tolist() == [view.scores["merge"]]
    (kept,) = (trace for trace in picture.data if trace.type == "heatmap")
    np.testing.assert_allclose(kept.z, view.kept.to_numpy(), atol=1e-6)
    assert picture.layout.xaxis.title.text == "density (share kept)"
    assert picture.layout.xaxis2.title.text == "expert"
    nothing = graft_view(BASE, EXPERTS, MOMENTS, score, NAMES, curves, density=0.01)
    assert graft_figure(nothing).data[-1].zmax > 0


def test_curvatures_compared():
    frame, correlation = log_pairs(*MOMENTS)
    picture = pairs_figure(frame, correlation, x="v", y="F", title="first")
    assert [trace.name for trace in picture.data] == ["b", "w"]
    assert sum(len(trace.x) for trace in picture.data) == 10
    assert picture.layout.title.text == f"first: correlation {correlation:.2f}"
    assert pairs_figure(frame, 1.0, x="v", y="F").layout.title.text == "correlation 1.00"
    assert picture.layout.xaxis.title.text == "log₁₀ v"
    square = similarity_figure(np.array([[1, 0.5], [0.5, 1]], dtype=np.float32), NAMES)
    assert (square.data[0].zmin, square.data[0].zmax) == (0.5, 1)
    assert similarity_figure(np.ones((2, 2), dtype=np.float32), NAMES).data[0].zmin == 0.9
