"""LiveFigure: one small widget, redrawn in place by one message, with a still for where no kernel is."""

import base64
import gzip

import numpy as np
import plotly.graph_objects as go
import pytest

from notebook_kit.figures.style import figure, heatmap
from notebook_kit.widgets import LiveFigure
from notebook_kit.widgets.live_figure import plotly_js


def picture(values):
    return figure([heatmap(np.asarray(values, dtype=float), limit=1.0)], x="expert", y="token")


def test_a_redraw_is_one_message_of_little_more_than_its_numbers(front_end):
    widget = LiveFigure(picture(np.zeros((64, 8))))
    assert len([data for data, _ in front_end.sent if "frame" in data["state"]]) == 1  # with its state, at once
    first = widget.frame["id"]
    front_end.clear()
    widget.show(picture(np.ones((64, 8))))
    assert len(front_end.updates()) == len(front_end.sent) == 1
    assert set(front_end.updates()[0]) == {"frame"}
    assert front_end.bytes() == 4 * 64 * 8
    assert widget.frame["id"] == first


def test_the_same_picture_again_is_not_sent(front_end):
    widget = LiveFigure(picture(np.zeros((3, 3))))
    front_end.clear()
    widget.show(picture(np.zeros((3, 3))))
    assert not front_end.sent


def test_plotly_crosses_the_wire_only_when_asked(front_end):
    widget = LiveFigure(picture(np.zeros((4, 4))))
    widget.show(picture(np.ones((4, 4))))
    assert front_end.bytes() < 1000
    front_end.clear()
    front_end.press(widget, kind="something else")
    assert not front_end.sent
    front_end.press(widget, kind="plotly.js")
    (data, buffers), = front_end.sent  # fmt: skip
    assert data["content"] == {"kind": "plotly.js"}
    assert 5e5 < front_end.bytes() < 2.5e6
    assert gzip.decompress(buffers[0]).lstrip().startswith(b"/**")
    assert plotly_js() is plotly_js()


def test_the_front_end_is_small():
    assert len(LiveFigure._esm if isinstance(LiveFigure._esm, str) else str(LiveFigure._esm)) < 50_000
    sources = [str(LiveFigure().trait_values()[name]) for name in ("_esm", "_css")]
    assert 1000 < len(sources[0].encode()) < 50_000
    assert len(sources[1].encode()) < 20_000
    assert "http://" not in sources[0]
    assert "https://" not in sources[0]
    assert "innerHTML" not in sources[0]


def test_a_still_stands_beside_the_widget():
    data, _ = LiveFigure(picture([[0, 1], [1, np.nan]]))._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"]
    png = base64.b64decode(data["image/png"])
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(png) < 60_000
    assert data["text/plain"] == "LiveFigure(heatmap 2x2 in [0, 1], sum 2)"


def test_an_empty_one():
    widget = LiveFigure()
    data, _ = widget._repr_mimebundle_()
    assert repr(widget) == "LiveFigure(empty)"
    assert "image/png" not in data
    widget.show(picture([[1.0]]))
    assert "heatmap 1x1" in repr(widget)


def test_a_picture_without_a_still_is_shown_all_the_same(monkeypatch):
    monkeypatch.delenv("NOTEBOOK_KIT_STRICT", raising=False)
    data, _ = LiveFigure(go.Figure(go.Bar(x=["a", 1], y=[1, 2])))._repr_mimebundle_()
    assert "image/png" in data
    assert "application/vnd.jupyter.widget-view+json" in data


def test_text_that_looks_like_html_stays_text():
    evil = "<img src=x onerror=alert(1)>"
    widget = LiveFigure(figure([heatmap(np.ones((1, 1)), x=[evil], y=["b"])]))
    assert widget.frame["data"][0]["x"] == [evil]  # the front end sets it as text; plotly's own markup knows no img
    data, _ = widget._repr_mimebundle_()
    assert "text/html" not in data


def test_a_bad_figure_changes_nothing():
    widget = LiveFigure(picture([[1.0]]))
    before, frame = widget.figure, widget.frame
    with pytest.raises(TypeError):
        widget.show("not a figure")
    assert widget.figure is before
    assert widget.frame is frame
