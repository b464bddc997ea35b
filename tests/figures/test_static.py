"""A still without a browser: every trace of the kit is drawn, foreign ones are named, and none of them fails."""

import io

import matplotlib.image
import numpy as np
import plotly.graph_objects as go
import pytest

from notebook_kit.figures.static import to_png
from notebook_kit.figures.style import PALETTE, figure, heatmap


def pixels(plot, **options):
    return matplotlib.image.imread(io.BytesIO(to_png(plot, **options)))[..., :3]


def coloured(image, colour, tolerance=0.02):
    """The share of pixels of a colour, given as #rrggbb."""
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return float((np.abs(image - wanted) < tolerance).all(axis=-1).mean())


@pytest.fixture
def lenient(monkeypatch):
    monkeypatch.delenv("NOTEBOOK_KIT_STRICT", raising=False)


def test_size_and_background():
    image = pixels(figure([], height=240), width=500)
    assert image.shape == (240, 500, 3)
    assert (image == 1).all()
    assert pixels(figure([], height=240), width=500, dpi=50).shape == (120, 250, 3)


def test_a_bar_is_as_high_as_its_number():
    image = pixels(figure([{"type": "bar", "x": ["a", "b"], "y": [1.0, 2.0], "marker": {"color": PALETTE[0]}}]))
    wanted = np.array([0x00, 0x72, 0xB2]) / 255
    columns = (np.abs(image - wanted) < 0.02).all(axis=-1).sum(axis=0)
    left, right = columns[: len(columns) // 2].max(), columns[len(columns) // 2 :].max()
    assert right == pytest.approx(2 * left, rel=0.03)


def test_a_heatmap_has_its_colours_where_they_belong():
    z = np.array([[0.0, 1.0], [1.0, 0.0]])
    plot = figure([heatmap(z, showscale=False)], yaxis={"autorange": "reversed"})
    image = pixels(plot)
    low, high = "#00204d", "#ffea46"
    assert coloured(image, low) == pytest.approx(coloured(image, high), rel=0.05)
    assert coloured(image, low) > 0.2
    rows, columns = np.where((np.abs(image - np.array([0xFF, 0xEA, 0x46]) / 255) < 0.02).all(axis=-1))
    upper = rows < np.median(rows)
    assert columns[upper].mean() > columns[~upper].mean()  # row 0 is on top, its second cell is high


@pytest.mark.parametrize(
    ("trace", "colour"),
    [
        (go.Scatter(y=[1, 2], line={"color": "rgb(230, 159, 0)", "width": 8}), "#e69f00"),
        (go.Scatter(y=[1, 2], line={"color": "rgba(0,158,115,1)", "width": 8}), "#009e73"),
        (go.Scatter(x=[1, 2], y=[1, 2], mode="markers", marker={"color": "#D55E00", "size": 30}), "#d55e00"),
        (go.Scatter(y=[1], mode="markers", marker={"color": ["rgb(213,94,0)"], "size": 30}), "#d55e00"),
        (go.Bar(y=["a"], x=[3], orientation="h", marker={"color": "rgb(213,94,0)"}), "#d55e00"),
        (go.Bar(x=["a", "b"], y=[3, None], marker={"color": ["#D55E00", "#009E73"]}), "#d55e00"),
        (go.Histogram(x=[1, 1, 2], marker={"color": "#CC79A7"}), "#cc79a7"),
        (go.Histogram(y=[1, 1, 2], marker={"color": "#CC79A7"}), "#cc79a7"),
        (go.Heatmap(z=[[1, 2]], colorscale=[[0, "rgb(1,2,3)"], [1, "rgb(213,94,0)"]]), "#d55e00"),
    ],
)
def test_plotlys_ways_to_write_a_colour(trace, colour):
    assert coloured(pixels(go.Figure(trace)), colour) > 0.002


@pytest.mark.parametrize(
    "trace",
    [
        go.Box(y=[1, 2, 3], name="a"),
        go.Contour(z=[[1, 2], [3, 4]]),
        go.Scattergl(y=[1, 2]),
        go.Scatter(x=[1, 2]),
        go.Scatter(x=[1, 2], y=[None, 2]),
        go.Scatter(x=["a", "b"], y=[1, 2], mode="markers+text", text=["<b>x</b>", "$y_1$"]),
        go.Scatter(x=[1, 2], y=[1, 2], mode="markers", marker={"size": [3, 4], "color": [1, 2]}),
        go.Heatmap(z=[[None, 2]], x=["a", "b"]),
        go.Heatmap(z=[[1, 2]], colorscale="RdBu"),
        go.Heatmap(z=np.full((2, 2), np.nan)),
    ],
)
def test_it_draws(trace):
    assert pixels(go.Figure(trace)).min() < 0.9


@pytest.mark.parametrize("trace", [go.Scatter(), go.Bar(), go.Heatmap(), go.Scatter(x=[], y=[])])
def test_nothing_to_draw_is_no_error(trace):
    assert pixels(go.Figure(trace)).shape[0] == 360


@pytest.mark.parametrize(
    "trace", [go.Pie(values=[1, 2]), go.Violin(y=[1, 2, 3]), go.Surface(z=[[1, 2]]), go.Scatterpolar(r=[1], theta=[2])]
)
def test_a_foreign_trace_is_named(trace):
    assert coloured(pixels(go.Figure(trace)), "#000000", 0.3) > 0.001


def test_a_trace_that_cannot_be_drawn_does_not_take_the_picture_with_it(lenient, monkeypatch):
    odd = go.Figure([go.Bar(x=["a", 1], y=[1, 2])])
    assert coloured(pixels(odd), "#000000", 0.3) > 0.001
    monkeypatch.setenv("NOTEBOOK_KIT_STRICT", "1")
    with pytest.raises(TypeError):
        to_png(odd)


def test_markup_and_dollars_are_plain_text():
    plot = figure(
        [{"type": "bar", "x": ["<b>a</b>", "$\\frac{", "&lt;x&gt;"], "y": [1, 2, 3], "name": "$_$"}],
        title="<i>$x</i>",
        x="$",
        y="a_b$",
    )
    assert pixels(plot).min() < 0.5


def test_stacked_grouped_log_and_subplots():
    bars = [{"type": "bar", "x": ["a", "b"], "y": [1, 2], "name": name} for name in "xy"]
    heights = {}
    for mode in ("stack", "group", "overlay"):
        heights[mode] = coloured(pixels(figure(bars, barmode=mode, yaxis={"range": [0, 5]})), PALETTE[0].lower())
    assert heights["stack"] > heights["group"]
    line = {"type": "scatter", "x": [1, 10, 100], "y": [1, 10, 100]}
    assert pixels(figure([line], xaxis={"type": "log"}, yaxis={"type": "log", "range": [0, 2]})).min() < 0.5
    two = figure(
        [line, {**line, "xaxis": "x2", "yaxis": "y2"}],
        xaxis={"domain": [0, 0.4]},
        xaxis2={"domain": [0.6, 1]},
        yaxis2={"anchor": "x2"},
    )
    image = pixels(two)
    wanted = (np.abs(image - np.array([0x00, 0x72, 0xB2]) / 255) < 0.02).all(axis=-1).any(axis=0)
    assert wanted[:360].any()


def sankey(**node):
    link = {"source": [0, 0, 1], "target": [2, 3, 3], "value": [0.5, 0.25, 0.25], "color": "#56B4E9"}
    node = {"label": ["a", "b", "c", "&lt;d&gt;"], "color": ["#D55E00"] * 4, "pad": 10} | node
    return go.Figure(go.Sankey(node=node, link=link), layout={"height": 300})


def test_a_sankey_has_nodes_as_high_as_their_flow():
    image = pixels(sankey())
    rows = (np.abs(image - np.array([0xD5, 0x5E, 0x00]) / 255) < 0.02).all(axis=-1)
    columns = np.flatnonzero(rows.any(axis=0))
    left = rows[:, columns[2]].sum()
    right = rows[:, columns[-3]].sum()
    assert left == pytest.approx(right, rel=0.05)  # both columns carry the whole flow
    assert coloured(image, "#56b4e9") > 0.2
    placed = pixels(sankey(x=[0.001, 0.001, 0.999, 0.999], y=[0.8, 0.2, 0.2, 0.8]))
    assert np.abs(placed - image).max() > 0.5  # b stands above a now


def test_an_empty_sankey_is_an_empty_picture():
    assert (pixels(go.Figure(go.Sankey(link={"source": [], "target": [], "value": []}))) == 1).all()


def test_bars_begin_at_their_base():
    bar = {"type": "bar", "orientation": "h", "x": [1.0, 1.0], "base": [0.0, 3.0], "y": [0, 1], "width": 0.9}
    image = pixels(figure([{**bar, "marker": {"color": PALETTE[0]}}], barmode="overlay", xaxis={"range": [0, 4]}))
    blue = (np.abs(image - np.array([0x00, 0x72, 0xB2]) / 255) < 0.02).all(axis=-1)
    half = np.flatnonzero(blue.any(axis=1)).mean()
    low, high = blue[int(half) + 20 :].any(axis=0), blue[: int(half) - 20].any(axis=0)
    assert np.flatnonzero(low).max() < np.flatnonzero(high).min()
