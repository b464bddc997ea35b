"""A figure is split into a skeleton and its numbers, and nothing of it is lost or executed on the way."""

import json

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit.figures.style import figure, heatmap
from notebook_kit.widgets.wire import digest, encode
from tests.untyped import untyped


def decoded(frame):
    """What the front end sees: arrays put back where their places are."""
    arrays = [
        np.frombuffer(buffer, dtype=shape["dtype"]).reshape(shape["shape"])
        for buffer, shape in zip(frame["buffers"], frame["arrays"], strict=True)
    ]

    def fill(node):
        if isinstance(node, dict):
            return arrays[node["$array"]] if "$array" in node else {key: fill(value) for key, value in node.items()}
        return [fill(item) for item in node] if isinstance(node, list) else node

    return fill(frame["data"])


def line(y, **layout):
    return figure([{"type": "scatter", "x": np.arange(len(y)), "y": np.asarray(y, dtype=float)}], **layout)


def test_numbers_travel_as_bytes_and_come_back():
    frame = encode(line([1.5, np.nan, -2, np.inf]))
    trace = decoded(frame)[0]
    np.testing.assert_array_equal(trace["y"], np.array([1.5, np.nan, -2, np.inf], dtype=np.float32))
    np.testing.assert_array_equal(trace["x"], [0, 1, 2, 3])
    assert {array["dtype"] for array in frame["arrays"]} == {"f4", "i4"}
    assert all(isinstance(buffer, memoryview) and buffer.format == "B" for buffer in frame["buffers"])


def test_what_is_left_is_valid_json_without_nan():
    plot = go.Figure(go.Scatter(x=[1, 2], y=[1, 2], marker={"color": [1.0, float("nan")]}, text=[float("inf"), "a"]))
    frame = encode(plot)
    skeleton = {key: value for key, value in frame.items() if key != "buffers"}
    assert json.loads(json.dumps(skeleton, allow_nan=False))["data"][0]["marker"]["color"] == [1.0, None]


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.array([1, 2], dtype=np.int64), "i4"),
        (np.array([1, 2**40], dtype=np.int64), "f4"),
        (np.array([1, 2**31], dtype=np.uint64), "f4"),
        (np.array([-5, 5], dtype=np.int8), "i4"),
        (np.array([1, 255], dtype=np.uint8), "i4"),
        (np.array([0.1, 0.2], dtype=np.float64), "f4"),
        (np.array([0.1, 0.2], dtype=np.float16), "f4"),
    ],
)
def test_dtypes_of_the_front_end(array, dtype):
    frame = encode(go.Figure(go.Scatter(y=array)))
    assert frame["arrays"][0]["dtype"] == dtype
    np.testing.assert_allclose(decoded(frame)[0]["y"], array.astype(float), rtol=1e-3)


def test_heatmaps_keep_rows_and_get_a_scale():
    z = np.arange(6.0).reshape(2, 3)
    frame = encode(go.Figure(go.Heatmap(z=z[:, ::-1])))
    trace = decoded(frame)[0]
    np.testing.assert_array_equal(trace["z"], z[:, ::-1])
    assert (trace["zmin"], trace["zmax"]) == (0, 5)
    lists = encode(go.Figure(go.Heatmap(z=z.tolist())))
    np.testing.assert_array_equal(decoded(lists)[0]["z"], z)
    empty = encode(go.Figure(go.Heatmap(z=np.full((2, 2), np.nan))))
    assert decoded(empty)[0]["zmin"] == decoded(empty)[0]["zmax"] == 0


def test_text_dates_and_odd_shapes_stay_readable():
    dates = np.array(["2020-01-02", "2020-01-03"], dtype="datetime64[D]")
    trace = decoded(encode(go.Figure(go.Bar(x=["<b>a</b>", "b"], y=[1, 2], customdata=np.zeros((1, 2, 2))))))[0]
    assert trace["x"] == ["<b>a</b>", "b"]
    assert trace["customdata"] == [[[0, 0], [0, 0]]]
    assert [str(day)[:10] for day in decoded(encode(go.Figure(go.Scatter(x=dates, y=[1, 2]))))[0]["x"]] == [
        "2020-01-02",
        "2020-01-03",
    ]


def test_the_id_changes_with_all_but_the_numbers():
    first = encode(line([1, 2, 3]))["id"]
    assert encode(line([7, 8, 9]))["id"] == first
    assert encode(line([1, 2, 3]))["id"] == first
    assert encode(line([1, 2, 3, 4]))["id"] != first
    assert encode(line([1, 2, 3], title="x"))["id"] != first
    assert encode(line([1, 2, 3], height=300))["id"] != first
    marked = line([1, 2, 3])
    marked.data[0].name = "b"
    assert encode(marked)["id"] != first


@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.integers(1, 4))
@settings(deadline=None, max_examples=30)
def test_any_heatmap_comes_back(values, rows):
    z = np.tile(np.array(values, dtype=np.float32), (rows, 1))
    np.testing.assert_array_equal(decoded(encode(figure([heatmap(z, limit=1.0)])))[0]["z"], z)


def test_the_figure_itself_is_not_changed():
    plot = go.Figure(go.Heatmap(z=[[1, 2]]))
    before = plot.to_plotly_json()
    encode(plot)
    assert plot.to_plotly_json() == before


def test_only_figures_are_drawn():
    with untyped(), pytest.raises(TypeError, match="draw must return a plotly Figure, got dict"):
        encode({"data": []})


def test_the_digest_tells_pictures_apart():
    assert digest(line([1, 2, 3])) == "scatter 3 in [1, 3], sum 6"
    assert digest(figure([heatmap(np.ones((2, 3)))])) == "heatmap 2x3 in [1, 1], sum 6"
    assert digest(line([np.nan, 1])) == "scatter 2 in [1, 1], sum 1"
    assert digest(line([np.nan])) == "scatter 1 in [0, 0], sum 0"
    assert digest(go.Figure()) == "empty"
    assert digest(go.Figure(go.Pie(labels=["a"]))) == "pie"
    assert digest(go.Figure([go.Bar(y=[1]), go.Bar(y=[2])])).count("bar") == 2
