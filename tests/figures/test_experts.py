import numpy as np
import pandas as pd
import pytest

from notebook_kit.diagnostics.experts import expert_merge_view
from notebook_kit.figures.experts import (
    expert_merge_figure,
    experts_score_figure,
    experts_similarity_figure,
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


@pytest.mark.parametrize("method", ["merge", "drop", "replace"])
def test_one_look(method):
    model, trace, _ = prepared()
    figure = expert_merge_figure(expert_merge_view(model, trace, n_experts=3, method=method), -1.5)
    assert "8 experts become 3" in figure.layout.title.text
    assert "score -1.500" in figure.layout.title.text
    assert [trace.type for trace in figure.data] == ["bar", "heatmap"]
    assert len(figure.data[0].x) == 8
