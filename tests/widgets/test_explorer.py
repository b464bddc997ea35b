"""Explorer: settings in, value, picture and a true line of Python out; errors shown, nothing computed twice."""

from typing import Annotated

import numpy as np
import pytest
import torch

from notebook_kit import explore
from notebook_kit.figures.style import figure
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging import dare, ties
from notebook_kit.widgets import Explorer, explorer


def curve(
    x,
    shift=0.0,
    *,
    gain: Annotated[float, Range(0, 4)] = 1.0,
    power: Annotated[int, Range(1, 5)] = 2,
    cap: Annotated[float | None, Range(0, 9)] = None,
    shape: Annotated[str, Choice("up", "down")] = "up",
    log: bool = False,
):
    """Compute a curve.

    Args:
        gain: what multiplies it.
    """
    calls.append({"gain": gain, "power": power, "cap": cap, "shape": shape, "log": log})
    if gain == 3.5:
        raise RuntimeError("gain <b>3.5</b> breaks")
    if gain == 3.25:
        raise KeyboardInterrupt
    y = gain * np.asarray(x, dtype=float) ** power + shift
    y = y if cap is None else np.minimum(y, cap)
    return -y if shape == "down" else y


calls = []
X = [1.0, 2.0, 3.0]


def draw(value):
    return figure([{"type": "scatter", "y": value}])


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


@pytest.fixture
def widget():
    made = explore(curve, X, draw=draw)
    calls.clear()
    return made


@pytest.fixture
def lenient(monkeypatch):
    monkeypatch.delenv("NOTEBOOK_KIT_STRICT", raising=False)


# ---------------------------------------------------------------- controls
def test_controls_come_from_the_signature(widget):
    rows = {row["name"]: row for row in widget.controls}
    assert list(rows) == ["gain", "power", "cap", "shape", "log"]
    assert (rows["gain"]["low"], rows["gain"]["high"], rows["gain"]["help"]) == (0, 4, "what multiplies it.")
    assert [name for name, row in rows.items() if row["optional"]] == ["cap"]
    assert rows["shape"]["options"] == ["up", "down"]
    assert widget.settings == {"gain": 1.0, "power": 2, "cap": None, "shape": "up", "log": False}
    np.testing.assert_array_equal(widget.value, [1, 4, 9])


def test_a_function_without_hyperparameters_is_refused():
    def plain(x):
        return x

    with pytest.raises(ValueError, match="plain declares no hyperparameters: annotate"):
        explore(plain, 1)


def test_starting_values_and_limits():
    made = explore(curve, X, draw=draw, gain=2.0, limits={"power": Range(3, 4), "shape": Choice("down"), "log": None})
    assert made.settings == {"gain": 2.0, "power": 3, "cap": None, "shape": "down"}
    rows = {row["name"]: row for row in made.controls}
    assert (rows["power"]["low"], rows["power"]["high"]) == (3, 4)
    with pytest.raises(ValueError, match=r"power must be in \[3, 4\], got 2"):
        made.settings = {"power": 2}
    with pytest.raises(ValueError, match="curve has no hyperparameter 'depth' to limit, only gain"):
        explore(curve, X, draw=draw, limits={"depth": Range(0, 1)})
    with pytest.raises(ValueError, match=r"gain must be in \[0, 4\], got 9.0"):
        explore(curve, X, draw=draw, gain=9.0)
    with pytest.raises(ValueError, match=r"gain must be in \[0, 1\], got 2.0"):
        explore(curve, X, draw=draw, gain=2.0, limits={"gain": Range(0, 1)})


def test_something_must_be_drawn():
    with pytest.raises(TypeError, match="curve returns ndarray: give `draw`"):
        explore(curve, X)
    assert explore(curve, X, score=lambda value: float(value.sum())).score == 14


def test_draw_gets_what_it_asks_for():
    seen = {}

    def full(value, score, settings):
        seen.update(score=score, settings=settings)
        return draw(value)

    def with_settings(value, *, settings):
        seen.update(only=settings)
        return draw(value)

    explore(curve, X, draw=full, score=lambda value: 7.0)
    explore(curve, X, draw=with_settings)
    assert seen["score"] == 7
    assert seen["settings"]["power"] == seen["only"]["power"] == 2


def test_a_function_that_returns_a_figure_needs_no_draw():
    def view(x, *, gain: Annotated[float, Range(0, 2)] = 1.0):
        return draw(np.array(x) * gain)

    made = explore(view, X)
    made.settings = {"gain": 2.0}
    np.testing.assert_array_equal(made.figure.data[0].y, [2, 4, 6])


# ---------------------------------------------------------------- settings
def test_settings_may_be_given_in_part(widget):
    widget.settings = {"gain": 2.0}
    assert widget.settings == {"gain": 2.0, "power": 2, "cap": None, "shape": "up", "log": False}
    widget.settings = {"power": 1, "cap": 5}
    assert widget.settings["gain"] == 2
    np.testing.assert_array_equal(widget.value, [2, 4, 5])
    assert len(calls) == 2
    assert calls[-1] == {"gain": 2.0, "power": 1, "cap": 5.0, "shape": "up", "log": False}


def test_json_numbers_become_what_the_signature_says(widget, front_end):
    front_end.move(widget, settings={"power": 3.0, "gain": 2})
    assert type(widget.settings["power"]) is int
    assert type(widget.settings["gain"]) is float


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"gain": 5.0}, r"gain must be in \[0, 4\], got 5.0 \(curve\)"),
        ({"power": 2.5}, "power must be an integer"),
        ({"power": 1, "gain": "x"}, "gain must be a number"),
        ({"gian": 1.0}, "did you mean 'gain'"),
        ({"shape": "left"}, "shape must be one of 'up', 'down'"),
        ({"gain": None}, "gain must be a number"),
    ],
)
def test_bad_settings_change_nothing(widget, bad, text):
    settings, frame, code, value = dict(widget.settings), widget.frame, widget.code, widget.value
    with pytest.raises(ValueError, match=text):
        widget.settings = bad
    assert widget.settings == settings
    assert (widget.frame, widget.code) == (frame, code)
    assert widget.value is value
    assert not calls


def test_equal_settings_compute_nothing(widget):
    widget.settings = dict(widget.settings)
    widget.settings = {"gain": 1.0}
    assert not calls


# ---------------------------------------------------------------- the line of Python
@pytest.mark.parametrize(
    "settings",
    [{}, {"gain": 0.3}, {"power": 3, "shape": "down"}, {"cap": 2.5, "log": True}, {"gain": 1e-7, "cap": 0.1 + 0.2}],
)
def test_the_line_of_python_gives_the_same_value(settings):
    made = explore(curve, X, draw=draw, shift=0.5)
    made.settings = settings
    np.testing.assert_array_equal(eval(made.code, {"curve": curve, "x": X}), made.value)


def test_the_line_shows_only_what_differs_from_the_signature(widget):
    assert widget.code == "curve(x)"
    widget.settings = {"power": 3}
    assert widget.code == "curve(x, power=3)"
    assert explore(curve, X, draw=draw, gain=2.0).code == "curve(x, gain=2.0)"
    assert explore(curve, X, draw=draw, shift=1.0).code == "curve(x, shift=1.0)"


def test_the_line_of_a_merge_is_true():
    base = {"w": torch.zeros(30)}
    experts = [{"w": torch.randn(30)} for _ in range(3)]
    for merge in (ties, dare):
        made = explore(merge, base, experts, score=lambda weights: float(weights["w"].sum()))
        made.settings = {"density": 0.4, "scale": 0.7}
        names = {merge.__name__: merge, "base": base, "experts": experts}
        assert torch.equal(eval(made.code, names)["w"], made.value["w"])


# ---------------------------------------------------------------- pins
def test_pins_through_the_message_handler(front_end):
    widget = explore(curve, X, draw=draw, score=lambda value: float(value.sum()))
    front_end.press(widget, kind="pin")
    widget.settings = {"gain": 2.0, "shape": "down"}
    front_end.press(widget, kind="pin")
    assert [pin["label"] for pin in widget.pins] == ["defaults: 14", "gain=2, shape=down: -28"]
    assert widget.pins[1]["settings"] == widget.settings
    assert widget.pins[1]["frame"] == widget.frame
    front_end.press(widget, kind="unpin", index=0)
    assert [pin["label"] for pin in widget.pins] == ["gain=2, shape=down: -28"]
    front_end.press(widget, kind="unpin", index=7)
    front_end.press(widget, kind="unpin")
    assert len(widget.pins) == 1
    front_end.press(widget, kind="reset")
    assert widget.settings["gain"] == 1
    assert len(widget.pins) == 1
    front_end.press(widget, kind="nonsense")


# ---------------------------------------------------------------- the wire
def test_a_move_is_answered_by_one_message(front_end):
    widget = explore(curve, X, draw=draw)
    front_end.clear()
    front_end.move(widget, settings={**widget.settings, "gain": 2.0})
    assert len(front_end.updates("frame")) == 1
    (state,) = front_end.updates()
    assert {"frame", "code", "note"} >= set(state) >= {"frame", "code"}
    assert front_end.bytes() == 4 * 3
    front_end.clear()
    front_end.move(widget, settings={**widget.settings, "gain": 2.0})
    assert not front_end.updates("frame")


def test_only_numbers_change_so_the_skeleton_is_kept(front_end):
    widget = explore(curve, X, draw=draw)
    before = widget.frame["id"]
    front_end.move(widget, settings={**widget.settings, "gain": 2.0})
    assert widget.frame["id"] == before


# ---------------------------------------------------------------- dragging
def test_a_preview_while_dragging_and_the_whole_on_release(front_end):
    seen = []

    def slow(x, *, gain: Annotated[float, Range(0, 4)] = 1.0, n_points=100):
        seen.append(n_points)
        return np.full(n_points, gain)

    widget = explore(slow, X, draw=draw, preview={"n_points": 5})
    assert seen == [100]
    front_end.move(widget, settings={"gain": 2.0}, dragging=True)
    front_end.move(widget, settings={"gain": 3.0}, dragging=True)
    assert seen == [100, 5, 5]
    assert "(preview)" in widget.note
    front_end.move(widget, settings={"gain": 3.0}, dragging=False)
    assert seen == [100, 5, 5, 100]
    assert "(preview)" not in widget.note
    assert len(widget.value) == 100
    front_end.move(widget, dragging=False)
    assert len(seen) == 4


def test_release_on_another_value_computes_once(front_end):
    widget = explore(curve, X, draw=draw, preview={"shift": 1.0})
    front_end.move(widget, settings={**widget.settings, "gain": 2.0}, dragging=True)
    calls.clear()
    front_end.move(widget, settings={**widget.settings, "gain": 3.0}, dragging=False)
    assert [call["gain"] for call in calls] == [3]


def test_a_slow_function_waits_for_the_release(front_end):
    widget = explore(curve, X, draw=draw)
    widget._milliseconds = explorer.SLOW_MS + 1
    calls.clear()
    for gain in (1.5, 2.0, 2.5):
        front_end.move(widget, settings={**widget.settings, "gain": gain}, dragging=True)
    assert not calls
    assert widget.note.endswith("updates on release")
    front_end.move(widget, settings=widget.settings, dragging=False)
    assert [call["gain"] for call in calls] == [2.5]
    np.testing.assert_array_equal(widget.value, [2.5, 10, 22.5])


def test_a_quick_function_follows_the_drag_and_owes_nothing(front_end):
    widget = explore(curve, X, draw=draw)
    widget._milliseconds = 1
    calls.clear()
    front_end.move(widget, settings={**widget.settings, "gain": 2.0}, dragging=True)
    front_end.move(widget, dragging=False)
    assert len(calls) == 1


# ---------------------------------------------------------------- errors
def test_an_error_is_raised_in_tests_and_shown(widget):
    with pytest.raises(RuntimeError, match="breaks"):
        widget.settings = {"gain": 3.5}
    assert widget.error["message"] == "RuntimeError: gain <b>3.5</b> breaks"


def test_an_error_is_shown_with_its_traceback_and_goes_away(widget, lenient):
    frame, value = widget.frame, widget.value
    widget.settings = {"gain": 3.5}
    assert widget.error["message"] == "RuntimeError: gain <b>3.5</b> breaks"
    assert "in curve" in widget.error["traceback"]
    assert widget.frame == frame
    assert widget.value is value
    widget.settings = {"gain": 2.0}
    assert widget.error == {}
    np.testing.assert_array_equal(widget.value, [2, 8, 18])


def test_an_interrupt_is_shown_and_the_widget_lives_on(widget, lenient):
    widget.settings = {"gain": 3.25}
    assert widget.error["message"] == "KeyboardInterrupt"
    widget.settings = {"gain": 2.0}
    assert widget.error == {}


def test_an_error_of_the_first_run_is_raised(lenient):
    with pytest.raises(RuntimeError, match="breaks"):
        explore(curve, X, draw=draw, gain=3.5)


def test_a_bad_picture_is_an_error_too(lenient):
    widget = explore(curve, X, draw=lambda value: draw(value) if value[0] < 2 else draw(value).data)
    frame = widget.frame
    widget.settings = {"gain": 3.0}
    assert widget.frame == frame
    assert widget.error["message"]


# ---------------------------------------------------------------- what stands in a notebook
def test_repr_and_still(widget):
    assert repr(widget) == "Explorer(scatter 3 in [1, 9], sum 14)"
    data, _ = widget._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"} <= set(data)
    assert isinstance(widget, Explorer)


def test_nan_is_drawn_as_a_gap():
    widget = explore(curve, [1.0, float("nan"), 3.0], draw=draw)
    assert np.isnan(np.frombuffer(widget.frame["buffers"][0], dtype=np.float32)[1])
    assert "scatter 3 in [1, 9]" in repr(widget)


def test_the_score_is_drawn_task_by_task():
    class Score(float):
        tasks = {"<b>a</b>": 0.25, "b": 0.75}  # noqa: RUF012

    widget = explore(curve, X, score=lambda value: Score(0.5))
    bars = widget.figure.data[0]
    assert list(bars.x) == ["<b>a</b>", "b"]
    assert list(bars.y) == [0.25, 0.75]
    assert widget.score == 0.5
    assert widget.note.startswith("score 0.5")
