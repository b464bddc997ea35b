"""Scores as bars."""

import numpy as np

from notebook_kit.figures.scores import compare_scores, score_figure


class Score(float):
    def __new__(cls, **tasks):
        made = super().__new__(cls, sum(tasks.values()) / max(1, len(tasks)))
        made.tasks = tasks
        return made


def test_a_bar_a_task_and_a_diamond_where_it_stood():
    plot = score_figure(Score(a=0.5, b=0.7), Score(b=0.2, a=0.1), title="merged")
    bars, first = plot.data
    assert list(bars.x) == ["a", "b"]
    np.testing.assert_allclose(bars.y, [0.5, 0.7])
    np.testing.assert_allclose(first.y, [0.1, 0.2])  # by name, whatever their order
    assert plot.layout.title.text == "merged: mean 0.600"
    assert plot.layout.xaxis.title.text == "task"
    assert tuple(plot.layout.yaxis.range) == (0, 1.02)


def test_a_plain_number_is_one_bar():
    plot = score_figure(-3.5)
    assert list(plot.data[0].x) == ["all"]
    assert len(plot.data) == 1
    assert plot.layout.yaxis.range is None
    assert score_figure(0.5, y="accuracy").layout.yaxis.title.text == "accuracy"


def test_no_tasks_and_nan_draw_too():
    assert len(score_figure(Score()).data[0].x) == 0
    assert score_figure(Score(a=float("nan"), b=0.5)).data


def test_models_side_by_side():
    plot = compare_scores({"average": Score(a=0.1, b=0.2), "<i>ties</i>": Score(a=0.3, b=0.4)}, y="accuracy")
    assert [trace.name for trace in plot.data] == ["average", "<i>ties</i>"]
    assert plot.layout.barmode == "group"
    assert plot.data[0].marker.color != plot.data[1].marker.color
    np.testing.assert_allclose(plot.data[1].y, [0.3, 0.4])
