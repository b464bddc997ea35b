"""A page without a kernel: it loads nothing from anywhere, holds every picture, and data cannot break out of it."""

import base64
import gzip
import html.parser
import json
import re
import shutil
import subprocess
from typing import Annotated

import numpy as np
import pytest

from notebook_kit import explore
from notebook_kit.figures.style import figure, heatmap
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.widgets import standalone

EVIL = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)>"


def view(
    label,
    *,
    gain: Annotated[float, Range(0, 1)] = 0.2,
    k: Annotated[int, Range(1, 5)] = 2,
    rate: Annotated[float, Range(1e-4, 1, log=True)] = 1e-2,
    cap: Annotated[int | None, Range(1, 9)] = None,
    how: Annotated[str, Choice("a", "b")] = "a",
    on: bool = False,
):
    return figure([heatmap(np.full((2, k), gain), x=[label] * k, limit=1.0)], title=label)


class Page(html.parser.HTMLParser):
    """Scripts by id or type, and every attribute that could load something."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.loads, self.tags, self._open = {}, [], [], None
        self.feed(text)
        page = json.loads(self.scripts["page"])
        self.axes, self.points, self.skeletons, self.state = (
            page[key] for key in ("axes", "points", "skeletons", "state")
        )

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.loads += [value for key, value in attributes.items() if key in ("src", "href", "action", "data")]
        if tag == "script":
            self._open = attributes.get("id") or attributes.get("type")
            self.scripts[self._open] = ""

    def handle_endtag(self, tag):
        if tag == "script":
            self._open = None

    def handle_data(self, data):
        if self._open:
            self.scripts[self._open] += data


@pytest.fixture
def write(tmp_path):
    def make(label="label", settings=None, **options):
        widget = explore(view, label, title=label)
        widget.settings = settings or {}
        path = widget.to_html(tmp_path / "page.html", **options)
        return widget, path.read_text("utf-8")

    return make


def test_it_loads_nothing(write):
    _, text = write()
    page = Page(text)
    assert page.loads == []
    assert page.tags.count("script") == 3
    outside = text.replace(page.scripts["plotly"], "")
    assert not re.search(r"https?://|//cdn|@import|url\(", outside)
    library = gzip.decompress(base64.b64decode(page.scripts["plotly"])).decode()
    assert "plotly.js" in library[:200]
    assert len(text) < 3e6


def test_data_cannot_close_its_element(write):
    _, text = write(EVIL)
    page = Page(text)
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert EVIL not in text
    assert page.skeletons[0]["layout"]["title"]["text"] == EVIL
    assert page.skeletons[0]["data"][0]["x"] == [EVIL] * 2


def test_every_point_of_the_grid_is_there(write):
    _, text = write(vary=["gain", "how"], n_points=3, settings={"gain": 0.7})
    page = Page(text)
    assert page.axes == [
        {"name": "gain", "values": [0, 0.5, 0.7, 1]},
        {"name": "how", "values": ["a", "b"]},
    ]
    assert len(page.points) == 8
    gains = [np.frombuffer(base64.b64decode(point["buffers"][0]), dtype=np.float32)[0] for point in page.points]
    np.testing.assert_allclose(gains, [0, 0, 0.5, 0.5, 0.7, 0.7, 1, 1])
    assert [point["code"] for point in page.points[:2]] == ["view(label, gain=0.0)", "view(label, gain=0.0, how='b')"]
    assert len(page.skeletons) == 1  # only numbers change along it
    assert page.state["settings"]["gain"] == 0.7
    fixed = {row["name"]: row["fixed"] for row in page.state["controls"]}
    assert fixed == {"gain": False, "k": True, "rate": True, "cap": True, "how": False, "on": True}


@pytest.mark.parametrize("name", ["gain", "k", "rate", "cap", "how", "on"])
def test_the_current_value_is_on_the_grid(name, write):
    odd = {"gain": 0.123, "k": 3, "rate": 0.0123, "cap": 7, "how": "b", "on": True}
    for settings in ({}, {name: odd[name]}):
        widget, text = write(vary=[name], n_points=4, settings=settings)
        page = Page(text)
        values = page.axes[0]["values"]
        assert widget.settings[name] in values
        assert page.state["settings"] == widget.settings
        numbers = [value for value in values if value is not None]
        assert numbers == sorted(numbers, key=lambda value: (isinstance(value, str), value))
    if name == "cap":  # a slider that can be switched off stays one
        assert values[0] is None
        assert [row["optional"] for row in page.state["controls"] if row["name"] == "cap"] == [True]
    if name == "rate":
        np.testing.assert_allclose([v for v in values if v != 0.0123], np.logspace(-4, 0, 4))
    if name == "k":
        assert all(type(value) is int for value in values)


def test_what_moved_last_stays_movable(write):
    assert Page(write()[1]).axes[0]["name"] == "gain"
    assert Page(write(settings={"k": 4})[1]).axes[0]["name"] == "k"


def test_the_explorer_is_as_before(write):
    widget, _ = write(settings={"gain": 0.3})
    value, frame = widget.value, widget.frame
    with pytest.raises(ValueError, match="MB"):
        widget.to_html("never.html", max_mb=0.001)
    assert widget.value is value
    assert widget.frame is frame
    np.testing.assert_allclose(widget.value.data[0].z, 0.3)


def test_a_page_too_large_is_not_written(tmp_path):
    widget = explore(view, "x")
    with pytest.raises(ValueError, match=r"the page would be .* MB, over max_mb=0.5: vary fewer, or fewer points"):
        widget.to_html(tmp_path / "p.html", max_mb=0.5)
    with pytest.raises(ValueError, match=r"the page passes 0.0001 MB after \d+ of 16 pictures"):
        widget.to_html(tmp_path / "p.html", max_mb=0.0001)
    with pytest.raises(ValueError, match=r"view has no hyperparameter 'gian'.*did you mean 'gain'"):
        widget.to_html(tmp_path / "p.html", vary=["gian"])
    assert not list(tmp_path.iterdir())


def test_numbers_that_json_has_not(tmp_path):
    def odd(*, gain: Annotated[float, Range(0, 1)] = 0.2):
        return figure([{"type": "scatter", "y": np.array([np.nan, gain]), "marker": {"color": [float("nan"), gain]}}])

    text = explore(odd).to_html(tmp_path / "p.html", n_points=2).read_text("utf-8")
    assert json.loads(Page(text).scripts["page"], parse_constant=lambda name: pytest.fail(name))


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not here")
def test_the_script_is_sound_and_answers(write, tmp_path):
    _, text = write(vary=["gain", "cap"], n_points=3)
    page = Page(text)
    (tmp_path / "page.mjs").write_text(page.scripts["module"], "utf-8")
    subprocess.run(["node", "--check", tmp_path / "page.mjs"], check=True, capture_output=True)
    # The stand-in itself, with a widget that only listens.
    drive = """
    const elements = { page: { textContent: PAGE }, plotly: { textContent: "" }, widget: {} };
    globalThis.document = { getElementById: (id) => elements[id] };
    const answers = [];
    const widget = { render({ model }) {
      const say = () => answers.push(model.get("code"));
      model.on("change:code", say);
      for (const change of [{ gain: 0.93 }, { gain: 0.4, cap: 6.9 }, { cap: null }, { cap: 1 }]) {
        model.set("settings", { ...model.get("settings"), ...change });
        model.save_changes();
      }
      answers.push(new Float32Array(model.get("frame").buffers[0].buffer)[0]);
    } };
    start(widget);
    console.log(JSON.stringify(answers));
    """.replace("PAGE", json.dumps(page.scripts["page"]))
    (tmp_path / "drive.mjs").write_text(standalone.STAND_IN + drive, "utf-8")
    done = subprocess.run(["node", tmp_path / "drive.mjs"], check=True, capture_output=True, text=True)
    *codes, gain = json.loads(done.stdout)
    assert codes == [
        "view(label, gain=1.0)",
        "view(label, gain=0.5, cap=5)",
        "view(label, gain=0.5)",
        "view(label, gain=0.5, cap=1)",
    ]
    assert gain == 0.5
