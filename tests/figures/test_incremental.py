import numpy as np
import pytest

from notebook_kit.diagnostics.incremental import incremental_view
from notebook_kit.figures.incremental import incremental_figure, retrieval_figure, stream_figure
from tests.diagnostics.test_incremental import planted


def test_lines_differ_in_dash_as_well_as_colour():
    figure = stream_figure({"a": [1.0, 0.5], "b": [1.0, 0.8]})
    assert [list(line.x) for line in figure.data] == [[1, 2], [1, 2]]
    assert len({line.line.dash for line in figure.data}) == 2
    assert figure.layout.yaxis.title.text == "accuracy, all classes seen"


def test_two_matrices_share_their_colours():
    left, right = retrieval_figure(np.eye(3), np.full((3, 3), 1 / 3)).data
    assert (left.zmin, left.zmax) == (right.zmin, right.zmax) == (0, 1)
    assert (left.showscale, right.showscale) == (False, True)


@pytest.mark.parametrize("show", ["classes", "adapters", "tasks"])
def test_one_look_has_a_line_a_ring_and_a_matrix(show):
    view = incremental_view({0.1: planted()}, {"other": np.ones(2)}, tasks_seen=2, show=show, ensemble=False)
    figure = incremental_figure(view)
    other, mine, ring, cells = figure.data
    assert (other.name, mine.name, cells.type) == ("other", "these settings", "heatmap")
    assert (list(ring.x), list(ring.y)) == ([2], [0.75])
    assert "accuracy 0.750 over 2 tasks" in figure.layout.title.text
    assert figure.layout.xaxis2.title.text
    assert figure.layout.yaxis2.title.text
