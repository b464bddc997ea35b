"""sweep: every point of the grid once, in the order of the grid, on whatever computes it."""

import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Annotated

import numpy as np
import pytest

from notebook_kit import sweep
from notebook_kit.figures.sweeps import sweep_view
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.widgets import SweepResult


def product(
    x,
    offset=0.0,
    *,
    k: Annotated[int, Range(1, 9)] = 2,
    t: Annotated[float | None, Range(0, 1)] = None,
    how: Annotated[str, Choice("plus", "minus")] = "plus",
    on: bool = True,
):
    """Multiply."""
    return (x * k * (1.0 if t is None else t) + offset) * (1 if how == "plus" else -1) * on


def later_is_quicker(x, *, k: Annotated[int, Range(1, 9)] = 2):
    time.sleep(0.02 * (4 - k))
    return float(x * k)


def double(value):
    return 2 * value


class Score(float):
    def __new__(cls, value, tasks):
        made = super().__new__(cls, value)
        made.tasks = tasks
        return made


GRID = {"k": [3, 1, 2], "t": [0.25, 1.0]}


def plain(frame):
    return frame.drop(columns="seconds")


def test_rows_stand_in_the_order_of_the_grid():
    result = sweep(product, 10.0, grid=GRID, progress=False, offset=1.0)
    assert isinstance(result, SweepResult)
    assert list(result.frame.columns) == ["k", "t", "score", "seconds"]
    assert result.frame["k"].tolist() == [3, 3, 1, 1, 2, 2]
    assert result.frame["t"].tolist() == [0.25, 1, 0.25, 1, 0.25, 1]
    assert result.frame["score"].tolist() == [8.5, 31, 3.5, 11, 6, 21]
    assert (result.frame["seconds"] >= 0).all()
    assert repr(result) == "SweepResult(product: 6 settings, best {'k': 3, 't': 1.0})"


def test_best_can_be_passed_on():
    result = sweep(product, 10.0, grid={**GRID, "how": ["minus", "plus"], "on": [True, False]}, progress=False)
    assert result.best == {"k": 3, "t": 1.0, "how": "plus", "on": True}
    assert [type(value) for value in result.best.values()] == [int, float, str, bool]
    assert product(10.0, **result.best) == result.frame["score"].max()
    one = sweep(later_is_quicker, 1.0, grid={"k": [2, 4]}, progress=False)
    assert one.best == {"k": 4}
    assert type(one.best["k"]) is int


def test_none_stays_none():
    result = sweep(product, 1.0, grid={"t": [0.5, None], "k": [1, 2]}, progress=False)
    assert result.frame["t"].tolist() == [0.5, 0.5, None, None]
    assert result.best == {"t": None, "k": 2}
    assert result.figure.data


def test_tasks_get_columns_and_nan_is_not_the_best():
    def score(value):
        return Score(float("nan") if value > 20 else value, {"a": value, "<b>": -value})

    result = sweep(product, 10.0, grid=GRID, score=score, progress=False)
    assert list(result.frame.columns) == ["k", "t", "score", "a", "<b>", "seconds"]
    assert result.best == {"k": 2, "t": 1.0}
    hopeless = sweep(product, 1.0, grid=GRID, score=lambda value: float("nan"), progress=False)
    with pytest.raises(ValueError, match="every score of this sweep is NaN"):
        hopeless.best  # noqa: B018
    assert repr(hopeless) == "SweepResult(product: 6 settings, every score NaN)"


# ---------------------------------------------------------------- executors
def test_threads_and_processes_give_the_same_table():
    here = sweep(product, 10.0, grid=GRID, score=double, progress=False)
    with ThreadPoolExecutor(3) as threads:
        pooled = sweep(product, 10.0, grid=GRID, score=double, executor=threads, progress=False)
    assert plain(pooled.frame).equals(plain(here.frame))


def test_the_order_of_completion_does_not_matter():
    with ThreadPoolExecutor(4) as threads:
        result = sweep(later_is_quicker, 1.0, grid={"k": [1, 2, 3, 4]}, executor=threads, progress=False)
    assert result.frame["k"].tolist() == [1, 2, 3, 4]
    assert result.frame["score"].tolist() == [1, 2, 3, 4]


def test_processes():
    import multiprocessing

    here = sweep(product, 10.0, grid=GRID, progress=False)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(2, mp_context=context) as processes:
        pooled = sweep(product, 10.0, grid=GRID, executor=processes, progress=False)
    assert plain(pooled.frame).equals(plain(here.frame))


def test_a_dask_client(monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr("distributed.utils._get_ip", lambda *_, **__: "127.0.0.1")  # it would ask the network
    here = sweep(product, 10.0, grid=GRID, progress=False)
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        pooled = sweep(product, 10.0, grid=GRID, executor=client, progress=False)
    assert plain(pooled.frame).equals(plain(here.frame))


def test_an_error_comes_through_and_ends_the_rest():
    def breaks(x, *, k: Annotated[int, Range(1, 9)] = 2):
        raise RuntimeError(f"no {k}")

    for executor in (None, ThreadPoolExecutor(1)):
        with pytest.raises(RuntimeError, match="no 1"):
            sweep(breaks, 1.0, grid={"k": [1]}, executor=executor, progress=False)


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("grid", "fixed", "text"),
    [
        ({}, {}, "grid must give at least one value"),
        ({"k": []}, {}, "grid must give at least one value"),
        ({"k": [1, 10]}, {}, r"k must be in \[1, 9\], got 10 \(product\)"),
        ({"k": [1, 2.5]}, {}, "k must be an integer"),
        ({"kk": [1]}, {}, "product has no hyperparameter 'kk'.*did you mean 'k'"),
        ({"x": [1]}, {}, "product has no hyperparameter 'x'"),
        ({"how": ["plus", "times"]}, {}, "how must be one of"),
        ({"k": [1]}, {"t": 2.0}, "t must be in"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_runs(grid, fixed, text):
    with pytest.raises(ValueError, match=text):
        sweep(lambda_like, 1.0, grid=grid, progress=False, **fixed)


def lambda_like(
    x,
    *,
    k: Annotated[int, Range(1, 9)] = 2,
    t: Annotated[float, Range(0, 1)] = 0.5,
    how: Annotated[str, Choice("plus", "minus")] = "plus",
):
    pytest.fail("it ran")


lambda_like.__name__ = "product"


def test_a_result_that_is_no_number_asks_for_a_score():
    def returns_a_dict(x, *, k: Annotated[int, Range(1, 9)] = 2):
        return {"w": x}

    with pytest.raises(TypeError, match="returns_a_dict returned dict, which is no number: give `score`"):
        sweep(returns_a_dict, 1.0, grid={"k": [1]}, progress=False)


# ---------------------------------------------------------------- pictures
def test_figures_of_one_and_two_hyperparameters_and_choices():
    one = sweep(product, 1.0, grid={"k": [1, 2, 3]}, progress=False).figure
    assert [trace.type for trace in one.data] == ["scatter"]
    assert (one.layout.xaxis.title.text, one.layout.yaxis.title.text) == ("k", "score")
    two = sweep(product, 1.0, grid={"k": [1, 2, 3], "t": [0.5, 1.0]}, progress=False).figure
    assert [trace.name for trace in two.data] == ["t 0.5", "t 1"]
    np.testing.assert_array_equal(two.data[1].y, [1, 2, 3])
    choice = sweep(product, 1.0, grid={"how": ["plus", "minus"]}, progress=False).figure
    assert list(choice.data[0].x) == ["minus", "plus"]
    crowded = sweep(product, 1.0, grid={"k": range(1, 9), "t": np.linspace(0, 1, 9).tolist()}, progress=False).figure
    assert crowded.data[0].type == "heatmap"
    assert crowded.data[0].z.shape == (8, 9)


def test_the_widget_moves_through_axes_and_measures():
    def score(value):
        return Score(value, {"a": value, "b": -value})

    result = sweep(product, 1.0, grid={**GRID, "how": ["plus", "minus"]}, score=score, progress=False)
    widget = result.widget()
    rows = {row["name"]: row["options"] for row in widget.controls}
    assert rows["x"] == ["k", "t", "how"]
    assert rows["measure"] == ["score", "a", "b"]
    for x in rows["x"]:
        for by in rows["by"]:
            for picture in rows["picture"]:
                widget.settings = {"x": x, "by": by, "picture": picture, "measure": "b"}
    data = result._repr_mimebundle_()[0]
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(data)
    widget.settings = {"x": "k", "by": "t", "picture": "map", "measure": "b"}
    expected = sweep_view(result.frame, **widget.settings)
    np.testing.assert_array_equal(widget.value.data[0].z, expected.data[0].z)


def test_a_page_of_it(tmp_path, capsys):
    result = sweep(product, 1.0, grid=GRID, progress=False)
    path = result.to_html(tmp_path / "sweep.html")
    assert "2 pictures" in capsys.readouterr().out
    assert 'id="page"' in path.read_text("utf-8")
