"""The widgets in the real JupyterLab: drawn, moved, pinned, pinned apart from text, themed, small on the wire."""

import os
from pathlib import Path

import pytest

from tests.browser.lab import chromium, running_lab, write_notebook

pytestmark = pytest.mark.browser

CELLS = [
    """
import torch; torch.set_num_threads(1)
import numpy as np
from typing import Annotated
from notebook_kit import explore
from notebook_kit.figures.style import figure, heatmap
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging import ties
from notebook_kit.zoo import digit_labels
bed = digit_labels()
bars = explore(ties, bed.base, bed.experts, score=bed.score)
bars
""",
    """
z = np.outer(np.arange(64), np.ones(8)).astype("float32")
names = ["&lt;img src=x onerror=alert(1)&gt;", *"abcdefg"]
def heat(*, level: Annotated[float, Range(0, 63)] = 10.0, broken: bool = False):
    if broken:
        raise RuntimeError("<b>broken</b> on purpose")
    return figure([heatmap(z + level, x=names, label="value", limit=(0, 126))], x="expert", y="token", height=400)
import os; os.environ.pop("NOTEBOOK_KIT_STRICT", None)
map_ = explore(heat)
map_
""",
    """
from notebook_kit.widgets import LiveFigure
for i in range(8):
    display(LiveFigure(heat(level=float(i))))
""",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    if chromium() is None:
        if os.environ.get("NOTEBOOK_KIT_REQUIRE_BROWSER"):
            pytest.fail("no Chromium found, and NOTEBOOK_KIT_REQUIRE_BROWSER is set")
        pytest.skip("no Chromium on this machine: install it (Debian: chromium) to run the browser tests")
    folder: Path = tmp_path_factory.mktemp("lab")
    write_notebook(folder / "widgets.ipynb", CELLS)
    with running_lab(folder) as lab:
        lab.received = []
        lab.dialogs = []
        lab.page.on("dialog", lambda dialog: (lab.dialogs.append(dialog.message), dialog.dismiss()))
        lab.page.on(
            "websocket",
            lambda socket: socket.on("framereceived", lambda data: lab.received.append(len(data))),
        )
        lab.foreign = []
        lab.page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((lab.url, "blob:", "data:", lab.url.replace("http", "ws")))
                else lab.foreign.append(request.url)
            ),
        )
        lab.open("widgets.ipynb", height=5000)
        lab.run_all()
        for index in range(3):
            lab.wait_drawn(index)
        yield lab


def drawn(lab, index):
    selector = "document.querySelectorAll('.nbk-stage .nbk-picture')"
    return lab.page.evaluate(f"(i) => Number({selector}[i].dataset.drawn)", index)


def move(lab, index, position):
    lab.page.evaluate(
        """([index, position]) => {
            const slider = document.querySelectorAll('.nbk')[index].querySelector('.nbk-slider');
            slider.value = position;
            slider.dispatchEvent(new Event('input', {bubbles: true}));
            slider.dispatchEvent(new Event('change', {bubbles: true}));
        }""",
        [index, position],
    )


def text_of(lab, index, selector):
    return lab.page.evaluate(
        "([index, selector]) => document.querySelectorAll('.nbk')[index].querySelector(selector).textContent",
        [index, selector],
    )


def pixel(lab, index):
    """Colour of the middle of the index-th widget's canvas."""
    return lab.page.evaluate(
        """(index) => {
            const canvas = document.querySelectorAll('.nbk')[index].querySelector('canvas');
            const context = canvas.getContext('2d');
            return [...context.getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data];
        }""",
        index,
    )


def test_no_error_and_no_foreign_request(lab):
    assert lab.errors() == []
    assert lab.foreign == []


def test_bars_have_axis_titles_and_move_with_the_slider(lab):
    titles = text_of(lab, 0, ".nbk-plot .infolayer")
    assert "task" in titles
    assert "accuracy" in titles
    before = drawn(lab, 0)
    move(lab, 0, 70)
    lab.wait_drawn(0, more_than=before)
    lab.page.wait_for_function("() => document.querySelector('.nbk-code').textContent.includes('density=0.7')")
    assert "score" in text_of(lab, 0, ".nbk-info")


def test_heatmap_pixels_follow_the_slider(lab):
    before, count = pixel(lab, 1), drawn(lab, 1)
    move(lab, 1, 100)
    lab.wait_drawn(1, more_than=count)
    after = pixel(lab, 1)
    assert before[3] == after[3] == 255
    assert sum(after[:2]) > sum(before[:2]) + 60  # cividis: higher is brighter


def test_text_from_data_stays_text(lab):
    assert lab.page.query_selector_all(".nbk img") == []
    assert "<img src=x" in text_of(lab, 1, ".nbk-plot")
    assert lab.dialogs == []


def test_error_shows_in_the_widget_and_goes_again(lab):
    box = lab.page.query_selector_all(".nbk")[1].query_selector("input[type=checkbox]")
    box.check()
    lab.page.wait_for_function("() => !document.querySelectorAll('.nbk')[1].querySelector('.nbk-error').hidden")
    assert "<b>broken</b> on purpose" in text_of(lab, 1, ".nbk-error summary")
    assert "Traceback" in text_of(lab, 1, ".nbk-error pre")
    box.uncheck()
    lab.page.wait_for_function("() => document.querySelectorAll('.nbk')[1].querySelector('.nbk-error').hidden")


def test_pin_keeps_a_picture_below_and_unpin_removes_it(lab):
    first = lab.page.query_selector_all(".nbk")[0]
    first.query_selector("text=Pin").click()
    lab.page.wait_for_selector(".nbk-pin .nbk-picture[data-drawn]")
    assert "density=" in first.query_selector(".nbk-pin figcaption").text_content()
    first.query_selector(".nbk-pin button").click()
    lab.page.wait_for_function("() => !document.querySelector('.nbk-pin')")


def test_keyboard_moves_a_slider(lab):
    slider = lab.page.query_selector_all(".nbk")[0].query_selector(".nbk-slider")
    before = drawn(lab, 0)
    slider.focus()
    lab.page.keyboard.press("ArrowLeft")
    lab.wait_drawn(0, more_than=before)


def test_hover_tells_the_value(lab):
    plot = lab.page.query_selector_all(".nbk")[1].query_selector(".nbk-plot")
    box = plot.bounding_box()
    lab.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    lab.page.wait_for_function("() => !document.querySelectorAll('.nbk')[1].querySelector('.nbk-tip').hidden")
    assert "expert: " in text_of(lab, 1, ".nbk-tip")


def test_plotly_crosses_the_wire_once_for_ten_pictures(lab):
    assert sum(size > 1_000_000 for size in lab.received) == 1
    assert sum(lab.received) < 4_000_000


def test_share_button_is_off(lab):
    titles = lab.page.evaluate(
        "() => [...document.querySelectorAll('.nbk .modebar-btn')].map((node) => node.dataset.title || '')"
    )
    assert titles
    assert not any("share" in title.lower() or "cloud" in title.lower() for title in titles)


def test_theme_change_recolours_text(lab):
    colour = "() => getComputedStyle(document.querySelector('.nbk-plot .xtick text')).fill"
    light = lab.page.evaluate(colour)
    lab.page.evaluate(
        "() => void window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
    )
    lab.page.wait_for_function(f"(light) => ({colour})() !== light", arg=light)
    assert sum(map(int, lab.page.evaluate(colour)[4:-1].split(",")[:3])) > 400  # light text on dark


def test_exported_page_works_without_a_kernel(lab, tmp_path):
    from notebook_kit import explore
    from notebook_kit.merging import ties
    from notebook_kit.zoo import digit_labels

    bed = digit_labels()
    path = explore(ties, bed.base, bed.experts, score=bed.score).to_html(tmp_path / "ties.html", n_points=5)
    page = lab.page.context.browser.new_context().new_page()
    try:
        page.goto(f"file://{path}")
        page.wait_for_selector(".nbk-picture[data-drawn='1']")
        page.evaluate(
            """() => {
                const slider = document.querySelector('.nbk-slider');
                slider.value = 50;
                slider.dispatchEvent(new Event('input', {bubbles: true}));
            }"""
        )
        page.wait_for_selector(".nbk-picture[data-drawn='2']")
        assert "density=0.5" in page.text_content(".nbk-code")
    finally:
        page.close()


def test_saved_notebook_with_ten_pictures_is_small_and_reopens_with_stills(lab):
    """The last test: it ends the kernel."""
    lab.page.evaluate("async () => { await window.jupyterapp.commands.execute('docmanager:save') }")
    size = lab.page.evaluate(
        "async (url) => (await (await fetch(url)).text()).length", f"{lab.url}/files/widgets.ipynb"
    )
    assert size < 1_000_000
    assert lab.page.query_selector_all(".nbk-plot"), "saving leaves the live widgets on the page"
    lab.page.evaluate("async () => { await window.jupyterapp.serviceManager.sessions.shutdownAll() }")
    lab.open("widgets.ipynb", height=5000)
    lab.page.wait_for_function("() => document.querySelectorAll('.jp-RenderedImage img').length === 10")
    assert "model not found" not in lab.page.text_content(".jp-Notebook")
