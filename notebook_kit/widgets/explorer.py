"""Explorer: a function's hyperparameters as controls, beside the live picture of what it returns."""

import inspect
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import plotly.graph_objects as go
import traitlets

from notebook_kit.figures.scores import score_figure
from notebook_kit.hyperparameters import Choice, Hyperparameter, Range, Schema, hyperparameters, validate
from notebook_kit.widgets.live_figure import LiveFigure
from notebook_kit.widgets.wire import encode

SLOW_MS = 250


class Explorer(LiveFigure):
    """Controls from a signature, a live picture, pinned runs, and the line of Python that reproduces what you see.

    Args:
        fn: a function with annotated hyperparameters; called as `fn(*args, **fixed, **settings)`.
        args: what it works on.
        score: optional; of fn's result, higher is better. A `Score` with `.tasks` is drawn as bars.
        draw: optional; makes the plotly figure: `draw(value)` or `draw(value, score)`, with `settings=` if it asks
            for it. Not needed where fn returns a figure, or where there is a score to draw.
        limits: narrows the controls to the data at hand, such as `{"layer": Range(0, 3)}`; a name mapped to None
            gets no control.
        title: of the default picture.
        preview: arguments that make fn cheaper, used while a slider is dragged, such as `{"n_points": 5}`.
        fixed: more arguments of fn; a hyperparameter given here starts at that value.

    Raises:
        ValueError: fn has no hyperparameters, or a starting value is out of range.
    """

    def __init__(
        self,
        fn: Callable,
        *args,
        score: Callable | None = None,
        draw: Callable | None = None,
        limits: Mapping[str, Range | Choice | None] | None = None,
        title: str = "",
        preview: Mapping[str, object] | None = None,
        **fixed,
    ):
        schema = hyperparameters(fn)
        if not schema:
            raise ValueError(
                f"{schema.owner} declares no hyperparameters: annotate its keyword arguments with Range or Choice"
            )
        self._fn, self._args, self._score, self._draw = fn, args, score, draw
        self._title, self._preview = title, dict(preview or {})
        start = {name: fixed.pop(name) for name in [*fixed] if name in schema}
        self._fixed = fixed
        self._schema = _narrowed(schema, limits or {}, start)
        self._defaults = {name: row.default for name, row in self._schema.items()}
        self._signature_defaults = {name: row.default for name, row in schema.items()}
        self._moved: str | None = None
        self._milliseconds = 0.0  # the faster of the last two runs: a cold start or one hiccup makes nothing slow
        self._latest = 0.0
        self._first_score = None
        self.value = None
        self.score = None
        validate(self._schema, self._defaults)

        figure, traits = self._run(self._defaults)
        super().__init__(
            figure,
            controls=[_control(row) for row in self._schema.values()],
            settings=dict(self._defaults),
            can_pin=True,
            **traits,
        )

    # ------------------------------------------------------------ what moves it
    @traitlets.validate("settings")
    def _complete(self, proposal) -> dict:
        """Settings may be given in part; what is left out stays. A bad one changes nothing."""
        settings = {name: _tidy(self._schema, name, value) for name, value in proposal["value"].items()}
        validate(self._schema, settings)
        return {**self._defaults, **self.settings, **settings}

    @traitlets.observe("settings")
    def _on_settings(self, change) -> None:
        old, new = change["old"] or {}, change["new"]
        moved = [name for name in new if old.get(name) != new[name]]
        if not old or not moved:
            return
        self._moved = moved[-1]
        self._refresh()

    @traitlets.observe("dragging")
    def _on_release(self, change) -> None:
        if not change["new"] and self._owed:
            self._refresh()

    _owed = False

    def _refresh(self) -> None:
        """Recompute and redraw; an error is shown in the widget, and raised where nobody would see it."""
        skip = self.dragging and not self._preview and self._milliseconds > SLOW_MS
        self._owed = bool(self.dragging and (skip or self._preview))
        if skip:
            self.note = f"{self._milliseconds:.0f} ms: updates on release"
            return
        try:
            figure, traits = self._run(self.settings, preview=self.dragging)
        except (Exception, KeyboardInterrupt) as error:
            message = f"{type(error).__name__}: {error}".removesuffix(": ")
            self.error = {"message": message, "traceback": traceback.format_exc(limit=-6)}
            if os.environ.get("NOTEBOOK_KIT_STRICT"):
                raise
            return
        frame = encode(figure)
        with self.hold_sync():
            self.figure, self.frame, self.error = figure, frame, {}
            for name, value in traits.items():
                setattr(self, name, value)

    def _run(self, settings: Mapping[str, object], *, preview: bool = False) -> tuple[go.Figure, dict]:
        started = time.perf_counter()
        cheaper = self._preview if preview else {}
        value = self._fn(*self._args, **{**self._fixed, **settings, **cheaper})
        score = self._score(value) if self._score is not None else None
        if self._first_score is None:
            self._first_score = score
        figure = self._picture(value, score, settings)
        self.value, self.score = value, score
        milliseconds = (time.perf_counter() - started) * 1000
        if not preview:
            self._milliseconds, self._latest = min(self._latest, milliseconds), milliseconds
        parts = [f"score {float(score):.4g}"] if score is not None else []
        parts.append(f"{milliseconds:.0f} ms" + (" (preview)" if preview and cheaper else ""))
        return figure, {"note": ", ".join(parts), "code": self._line(settings)}

    def _picture(self, value, score, settings) -> go.Figure:
        if self._draw is None:
            if isinstance(value, go.Figure):
                return value
            if score is None:
                raise TypeError(
                    f"{self._schema.owner} returns {type(value).__name__}: give `draw` (a figure of it) or `score`"
                )
            return score_figure(score, self._first_score, title=self._title or self._schema.owner)
        return _call_draw(self._draw, value, score, settings)

    def _line(self, settings: Mapping[str, object]) -> str:
        names = [
            name
            for name, parameter in inspect.signature(self._fn).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        parts = [*names[: len(self._args)], *(f"args[{i}]" for i in range(len(names), len(self._args)))]
        parts += [f"{name}={value!r}" if _literal(value) else f"{name}={name}" for name, value in self._fixed.items()]
        parts += [f"{name}={value!r}" for name, value in settings.items() if value != self._signature_defaults[name]]
        return f"{self._schema.owner}({', '.join(parts)})"

    # ------------------------------------------------------------ what it offers
    def pin(self) -> None:
        """Keep the present picture and its settings below the live one."""
        changed = {name: value for name, value in self.settings.items() if value != self._defaults[name]}
        label = ", ".join(f"{name}={_brief(value)}" for name, value in changed.items()) or "defaults"
        if self.score is not None:
            label += f": {float(self.score):.4g}"
        self.pins = [*self.pins, {"label": label, "settings": dict(self.settings), "frame": self.frame}]

    def unpin(self, index: int) -> None:
        """Drop a pinned picture."""
        self.pins = [pin for i, pin in enumerate(self.pins) if i != index]

    def reset(self) -> None:
        """Go back to the settings it started with."""
        self.settings = dict(self._defaults)

    def to_html(
        self, path: str | Path, *, vary: list[str] | None = None, n_points: int = 15, max_mb: float = 25.0
    ) -> Path:
        """Write a stand-alone page whose controls work with no kernel, from a grid computed now.

        Args:
            path: the .html file.
            vary: the hyperparameters that stay movable; default: the one moved last, or the first.
            n_points: positions of each slider; a choice keeps all its options.
            max_mb: refuse to write more than this many megabytes.

        Returns:
            The path. The page's size is printed before it is written.

        Raises:
            ValueError: an unknown name in `vary`, or a page over `max_mb`.
        """
        from notebook_kit.widgets.standalone import write_page

        vary = vary or [self._moved or next(iter(self._schema))]
        validate(self._schema, {name: self.settings.get(name) for name in vary})
        return write_page(self, Path(path), vary, n_points, max_mb)

    def _answer(self, widget, message: dict, buffers) -> None:
        super()._answer(widget, message, buffers)
        kind = message.get("kind")
        if kind == "pin":
            self.pin()
        elif kind == "unpin":
            self.unpin(int(message.get("index", -1)))
        elif kind == "reset":
            self.reset()


def explore(fn: Callable, *args, **options) -> Explorer:
    """Explore a function's hyperparameters live.

    Args:
        fn: a function with annotated hyperparameters, such as `merging.ties`.
        args: what it works on, such as `base, experts`.
        options: `score`, `draw`, `limits`, `preview`, `title` and fn's own arguments, as `Explorer` takes them.

    Returns:
        Explorer: shows itself; `.settings`, `.value`, `.code`, `.pin()`, `.to_html(path)`.
    """
    return Explorer(fn, *args, **options)


def _narrowed(schema: Schema, limits: Mapping, start: Mapping) -> Schema:
    narrowed = Schema()
    narrowed.owner = schema.owner
    unknown = [name for name in limits if name not in schema]
    if unknown:
        raise ValueError(f"{schema.owner} has no hyperparameter {unknown[0]!r} to limit, only {', '.join(schema)}")
    for name, row in schema.items():
        limit = limits.get(name, row)
        if limit is None:
            continue
        default = start.get(name, row.default)
        fields = {**vars(row), "default": default}
        if isinstance(limit, Range):
            fields |= {"low": limit.low, "high": limit.high, "log": limit.log, "step": limit.step or row.step}
            if default is not None and name not in start:
                fields["default"] = min(max(default, limit.low), limit.high)
        elif isinstance(limit, Choice):
            fields["options"] = limit.options
            if name not in start and default not in limit.options:
                fields["default"] = limit.options[0]
        narrowed[name] = Hyperparameter(**fields)
    return narrowed


def _control(row: Hyperparameter) -> dict:
    optional = row.default is None and row.kind in ("int", "float")
    return {**vars(row), "options": list(row.options), "label": row.name.replace("_", " "), "optional": optional}


def _tidy(schema: Schema, name: str, value):
    """JSON has one kind of number."""
    row = schema.get(name)
    if row is not None and row.kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    if row is not None and row.kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _call_draw(draw: Callable, value, score, settings) -> go.Figure:
    parameters = inspect.signature(draw).parameters
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    positional = [p for p in positional if p.name != "settings"]
    wants_score = len([p for p in positional if p.default is p.empty]) > 1 or "score" in parameters
    extra = {"settings": dict(settings)} if "settings" in parameters else {}
    return draw(value, score, **extra) if wants_score else draw(value, **extra)


def _literal(value) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _brief(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
