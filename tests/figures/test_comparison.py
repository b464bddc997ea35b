"""The picture of a comparison: order, lines, and what is left out."""

import numpy as np
import pandas as pd
import pytest

from notebook_kit.figures.comparison import comparison_view, tasks_of

FRAME = pd.DataFrame(
    [
        ("base", "base", 0.2, 0.1, 0.3, ""),
        ("expert a", "expert", 0.5, 0.9, 0.1, ""),
        ("best", "experts", 0.9, 0.9, 0.9, ""),
        ("multitask reference", "reference", 0.8, 0.8, np.nan, ""),
        ("low", "method", 0.4, 0.7, 0.1, ""),
        ("high", "method", 0.6, 0.5, 0.7, "scale=1"),
        ("broken", "method", np.nan, np.nan, np.nan, "needs data"),
    ],
    columns=["model", "kind", "score", "<t>", "u", "settings"],
)


def test_dots_are_sorted_and_lines_go_through_every_row():
    figure = comparison_view(FRAME, unit="accuracy")
    assert tasks_of(FRAME) == ["<t>", "u"]
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert [trace.name for trace in lines] == ["base", "best", "multitask reference"]
    assert list(lines[0].y) == ["high", "low"]
    big = figure.data[-1]
    assert list(big.y) == ["high", "low"]
    np.testing.assert_allclose(big.x, [0.6, 0.4])
    small = figure.data[-2]
    assert sorted(small.x) == [0.1, 0.5, 0.7, 0.7]
    assert list(zip(small.hovertext, small.y, small.x, strict=True))[1] == ("<t>", "low", 0.7)
    assert figure.layout.title.text == "2 merging methods, 1 more without a score (see the table)"
    assert figure.layout.xaxis.title.text == "accuracy"


def test_one_task_sorts_by_it():
    figure = comparison_view(FRAME, task="<t>", unit="accuracy")
    assert list(figure.data[-1].y) == ["low", "high"]
    assert figure.layout.xaxis.title.text == "<t>: accuracy"
    assert list(comparison_view(FRAME, task="u", best_first=False).data[-1].y) == ["low", "high"]


def test_the_map_has_a_row_a_model():
    trace = comparison_view(FRAME, picture="map").data[0]
    assert list(trace.y) == ["base", "best", "multitask reference", "high", "low"]
    assert list(trace.x) == ["<t>", "u", "mean"]
    assert trace.z.shape == (5, 3)
    assert (trace.zmin, trace.zmax) == pytest.approx((0.1, 0.9))
    no_tasks = FRAME[["model", "kind", "score", "settings"]]
    assert list(comparison_view(no_tasks, picture="map").data[0].x) == ["mean"]
    assert len(comparison_view(no_tasks).data) == 4


def test_refusals():
    with pytest.raises(ValueError, match="task must be one of mean, <t>, u, got 'v'"):
        comparison_view(FRAME, task="v")
    with pytest.raises(ValueError, match="no method has a score"):
        comparison_view(FRAME[FRAME["model"] == "broken"])
