import numpy as np
import pandas as pd
import pytest

from notebook_kit.diagnostics.expert_compression import compression_view
from notebook_kit.diagnostics.experts import METHODS, expert_merge_view, linkage_of
from notebook_kit.figures.experts import (
    compression_figure,
    dendrogram_figure,
    expert_merge_figure,
    experts_memory_figure,
    experts_score_figure,
    experts_similarity_figure,
    subset_losses_figure,
    usage_figure,
)
from notebook_kit.figures.style import NEUTRAL
from tests.expert_merging.moes import prepared

GROUPS = ((1, 3), (2,))
USAGE = np.array([0.1, 0.5, 0.3, 0.1])


def test_usage_is_coloured_by_group_and_deleted_experts_are_grey():
    (bars,) = usage_figure(USAGE, GROUPS).data
    assert list(bars.x) == ["1", "3", "2", "0"]
    np.testing.assert_allclose(bars.y, [0.5, 0.1, 0.3, 0.1])
    assert bars.marker.color[0] == bars.marker.color[1] != bars.marker.color[2]
    assert bars.marker.color[3] == NEUTRAL
    # The group stands there as text too, for whoever cannot tell the colours apart.
    assert list(bars.text) == ["0", "0", "1", "×"]


def test_similarity_is_ordered_by_group_with_a_frame_a_group():
    s = np.arange(16.0).reshape(4, 4) / 16
    figure = experts_similarity_figure(s, (*GROUPS, (0,)))
    np.testing.assert_allclose(figure.data[0].z[0], s[1][[1, 3, 2, 0]], rtol=1e-6)
    assert list(figure.layout.xaxis.ticktext) == ["1", "3", "2", "0"]
    assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(-0.5, 1.5), (1.5, 2.5), (2.5, 3.5)]


def test_seeds_become_a_mean_with_its_spread():
    frame = pd.DataFrame(
        {"n_experts": [1, 1, 2, 2, 1, 2], "method": ["a"] * 4 + ["b"] * 2, "score": [-3.0, -1, -1, -1, -4, -2]}
    )
    a, b = experts_score_figure(frame).data
    assert list(a.y) == [-2, -1]
    assert list(a.error_y.array) == [1, 0]
    assert list(a.error_y.arrayminus) == [1, 0]
    assert (b.name, list(b.y)) == ("b", [-4, -2])
    assert a.line.dash != b.line.dash


@pytest.mark.parametrize("method", METHODS)
def test_one_look(method):
    model, trace, _ = prepared()
    view = expert_merge_view(model, trace, n_experts=3, method=method)
    figure = expert_merge_figure(view, -1.5)
    assert "8 experts become 3" in figure.layout.title.text
    assert "score -1.500" in figure.layout.title.text
    if method == "hierarchical":
        assert [trace.type for trace in figure.data] == ["bar", "scatter", "scatter"]
    else:
        assert [trace.type for trace in figure.data] == ["bar", "heatmap"]
    assert len(figure.data[0].x) == 8
    seen = [(98304, "merge", True, -1.0), (view.parameters[1], method, False, -1.5)]
    below = [trace for trace in expert_merge_figure(view, -1.5, seen=seen).data if trace.xaxis == "x3"]
    assert sum(len(trace.x) for trace in below) == 2
    assert next(trace.marker.symbol for trace in below if trace.name == method)[-1] == "x"
    assert max(trace.x.max() for trace in below if len(trace.x)) == 1


def test_a_dendrogram_is_cut_between_two_joins():
    joins = linkage_of(np.array([[0.0], [0.1], [1.0], [1.3]]))
    figure = dendrogram_figure(joins, 2)
    below, above = figure.data
    assert sum(x is None for x in below.x) == 2
    assert sum(x is None for x in above.x) == 1
    (cut,) = figure.layout.shapes
    assert joins[1, 2] < cut.y0 < joins[2, 2]
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2", "3"]
    assert dendrogram_figure(joins, 4).layout.shapes[0].y0 < joins[0, 2]
    assert dendrogram_figure(joins, 1).layout.shapes[0].y0 > joins[2, 2]


def test_memory_losses_and_compression():
    frame = pd.DataFrame({"method": ["a", "a", "b"], "memory": [0.5, 0.25, 0.3], "score": [-1.0, -2, -1.5]})
    a, b = experts_memory_figure(frame).data
    assert list(a.x) == [0.25, 0.5]
    assert (a.mode, b.mode) == ("lines+markers", "markers")
    (bars,) = subset_losses_figure(pd.DataFrame({"kept": [(0, 1), (0, 2)], "loss": [1.0, 2.0]})).data
    assert list(bars.customdata) == ["0 1", "0 2"]
    assert bars.marker.color[0] != bars.marker.color[1]
    model, trace, _ = prepared()
    view = compression_view(model, trace, n_experts=4, rank=8, density=0.5)
    figure = compression_figure(view, -1.5)
    assert "score -1.500" in figure.layout.title.text
    assert [len(trace.x) for trace in figure.data] == [8, 24, 3]
    np.testing.assert_allclose(sum(figure.data[2].y[1:]), sum(view.stored.values()) / view.before)
