import numpy as np
import pytest
import torch

from notebook_kit.diagnostics.random_routers import Paths
from notebook_kit.figures.random_routers import disagreement_view, schedule_view, slim_view
from notebook_kit.hyperparameters import hyperparameters


def titles(figure):
    return {axis.title.text for axis in [*figure.select_xaxes(), *figure.select_yaxes()]} - {""}


@pytest.mark.parametrize("schedule", hyperparameters(schedule_view)["schedule"].options)
@pytest.mark.parametrize("direction", ["up", "down"])
def test_schedules_stay_within_their_ends(schedule, direction):
    figure = schedule_view(k_min=3, k_max=12, schedule=schedule, direction=direction)
    y = figure.data[0].y
    assert y.min() >= 3
    assert y.max() <= 12
    assert titles(figure) == {"share of training done", "experts a token, k"}
    assert schedule_view(k_min=9, k_max=2, schedule=schedule).data[0].y.tolist() == [9] * len(y)


def test_slim_view_marks_the_nearest_k():
    curves = {"a": {1: 0.5, 2: 0.7, 4: 0.9}, "b": {1: 0.6, 4: 0.8}}
    figure = slim_view(curves, {"a": [1, 2, 4]}, k=3)
    course, line, point, other, second = figure.data
    assert course.y.tolist() == [1, 2, 4]
    assert line.y.tolist() == [0.5, 0.7, 0.9]
    assert (point.x.tolist(), point.y.tolist()) == ([2], [0.7])
    assert other.y.tolist() == [0.6, 0.8]
    assert second.x.tolist() == [4]
    assert figure.layout.title.text == "k = 3: accuracy 0.700 to 0.800"
    assert {"share of training done", "experts a token at inference, k", "accuracy"} <= titles(figure)
    assert slim_view({}, {}).layout.title.text == "k = 2: accuracy "


def test_disagreement_is_on_one_scale():
    paths = [(0, 0), (0, 1)]
    square = torch.tensor([[0.0, 0.2], [0.2, 0.0]])
    runs = {
        0.0: Paths(paths, square, torch.eye(2), {(0, 0): 0.9, (0, 1): 0.8}, 0.95),
        5.0: Paths(paths, square / 4, torch.ones(2, 2), {(0, 0): 0.9, (0, 1): 0.9}, 0.92),
    }
    first, last = (disagreement_view(runs, consistency_coef=value) for value in (0.0, 4.0))
    assert first.data[0].zmax == last.data[0].zmax == pytest.approx(0.2)
    assert first.layout.title.text == "consistency_coef 0: mean disagreement 0.2000 nats, same answer 0.0%"
    assert last.layout.title.text == "consistency_coef 5: mean disagreement 0.0500 nats, same answer 100.0%"
    assert list(first.data[0].x) == ["0-0", "0-1"]
    np.testing.assert_allclose(first.data[1].y, [0.9, 0.8])
    assert {"path (expert of each layer)", "path", "accuracy (dot: a path, bar: all experts)"} <= titles(first)
