import numpy as np
import pytest

from notebook_kit.diagnostics.checkpoint_merges import length_view, penalty_view, stock_view
from notebook_kit.figures.checkpoint_merges import length_figure, penalty_figure, stock_figure
from tests.diagnostics.test_checkpoint_merges import LOSSES, RUN, STEPS, measure, right_angles


def titles(figure):
    return [axis.title.text for kind in ("xaxes", "yaxes") for axis in getattr(figure, f"select_{kind}")()]


def test_bars_trace_and_curve_of_a_run():
    figure = penalty_figure(penalty_view(RUN, LOSSES, STEPS, measure, n_last=3, points=3), y="loss")
    bars, trace, picked, curve, here, last, uniform = figure.data
    assert list(bars.y) == pytest.approx([0, 0, 3 / 7, 4 / 7])
    assert (list(trace.x), list(picked.x)) == (STEPS, [30, 40])
    assert [t.name for t in figure.data if t.showlegend] == ["merged", "last checkpoint", "uniform average"]
    assert list(here.y) == pytest.approx([curve.y[1]])
    assert (set(last.y), uniform.line.dash) == ({3.0}, "dot")
    assert titles(figure) == ["training step", "penalty", "training loss (nats)", "weight", "loss"]


@pytest.mark.parametrize("n_experts", [2, 4])
def test_the_triangle_and_the_share(n_experts):
    view = stock_view({"one task": right_angles()}, n_experts=n_experts)
    figure = stock_figure(view)
    by_name = {trace.name: trace for trace in figure.data if trace.name}
    assert list(by_name) == ["base", "experts", "their mean", "Model Stock", "mean of the others"]
    assert list(by_name["Model Stock"].x) == [0]
    assert len(by_name["experts"].x) == n_experts
    assert bool(np.isnan(by_name["mean of the others"].x[0])) is (n_experts == 4)
    assert all(titles(figure))
    assert "cos θ 0.00, t 0.00" in figure.layout.title.text


def test_lengths_on_the_way_and_by_tensor():
    figure = length_figure(length_view({"trained apart": right_angles()}, t=0.5))
    lines = [trace for trace in figure.data if trace.type == "scatter" and trace.mode == "lines"]
    assert [trace.name for trace in lines] == ["straight line", "SLERP", "Karcher"]
    assert len({trace.line.dash for trace in lines}) == 3
    bars = [trace for trace in figure.data if trace.type == "bar"]
    assert [trace.y[0] for trace in bars] == pytest.approx([0.5, 1.0])
    assert all(titles(figure))
