"""A sweep's table as lines and as a map."""

import numpy as np
import pandas as pd
import pytest

from notebook_kit.figures.sweeps import sweep_view

FRAME = pd.DataFrame(
    {
        "k": [1, 1, 2, 2, 1, 1, 2, 2],
        "how": ["a", "b"] * 4,
        "seed": [0, 0, 0, 0, 1, 1, 1, 1],
        "score": [1.0, 2, 3, 4, 5, 6, 7, np.nan],
    }
)


def test_a_line_shows_the_best_over_all_else():
    plot = sweep_view(FRAME, x="k")
    np.testing.assert_array_equal(plot.data[0].x, [1, 2])
    np.testing.assert_array_equal(plot.data[0].y, [6, 7])
    assert plot.layout.title.text == "score, best over all else"
    same = sweep_view(FRAME, x="k", by="k")
    np.testing.assert_array_equal(same.data[0].y, [6, 7])


def test_lines_by_a_second_one():
    plot = sweep_view(FRAME, x="k", by="how")
    assert [trace.name for trace in plot.data] == ["how a", "how b"]
    np.testing.assert_array_equal(plot.data[0].y, [5, 7])
    np.testing.assert_array_equal(plot.data[1].y, [6, 4])


def test_choices_are_points_not_a_line():
    trace = sweep_view(FRAME, x="how").data[0]
    assert trace.mode == "markers"
    assert list(trace.x) == ["a", "b"]


def test_a_map():
    plot = sweep_view(FRAME, x="k", by="how", picture="map")
    (trace,) = plot.data
    np.testing.assert_array_equal(trace.z, [[5, 7], [6, 4]])
    assert (list(trace.x), list(trace.y)) == (["1", "2"], ["a", "b"])
    assert (trace.zmin, trace.zmax) == (4, 7)
    assert (plot.layout.xaxis.title.text, plot.layout.yaxis.title.text) == ("k", "how")


@pytest.mark.parametrize("picture", ["lines", "map"])
def test_holes_in_the_table(picture):
    holes = FRAME[(FRAME["k"] == 1) | (FRAME["how"] == "a")]
    plot = sweep_view(holes, x="k", by="how", picture=picture)
    values = plot.data[0].z if picture == "map" else plot.data[1].y
    assert np.isnan(values).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("picture", ["lines", "map"])
def test_nothing_but_nan_draws_without_a_warning(picture):
    plot = sweep_view(FRAME.assign(score=np.nan), x="k", by="how", picture=picture)
    if picture == "map":
        assert np.isfinite([plot.data[0].zmin, plot.data[0].zmax]).all()
