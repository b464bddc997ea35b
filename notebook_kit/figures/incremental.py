"""Pictures of classes that arrive in tasks: accuracy along the stream, and who is taken for whom."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from notebook_kit.diagnostics.incremental import IncrementalView
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap

DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot")
AXES = {
    "classes": ("class given", "true class", "share of the class"),
    "adapters": ("adapter that answers", "task of the image", "share of the task"),
    "tasks": ("accuracy on task", "after task", "accuracy"),
}


def stream_figure(curves: Mapping[str, Sequence[float]], *, title: str = "") -> go.Figure:
    """Draw accuracy over all classes seen against the tasks seen, one line a method.

    Args:
        curves: name to Float[tasks].
        title: of the picture.
    """
    traces = [
        _line(name, curve, PALETTE[i % len(PALETTE)], ("solid", *DASHES)[i % (len(DASHES) + 1)])
        for i, (name, curve) in enumerate(curves.items())
    ]
    more = 24 * ((len(traces) - 1) // 3)  # room for a legend of several rows
    layout = {"margin": {"l": 64, "r": 24, "t": 74 + more, "b": 52}, "xaxis": {"dtick": 1}, "height": 360 + more}
    return figure(traces, title=title, x="tasks seen", y="accuracy, all classes seen", **layout)


def retrieval_figure(before, after, *, title: str = "") -> go.Figure:
    """Draw which adapter images ask, before refinement and after.

    Args:
        before: shares, Float[tasks, adapters], from `retrieval_matrix(record, rounds=1)`.
        after: likewise, with more rounds.
        title: of the picture.
    """
    traces = []
    for i, matrix in enumerate((before, after)):
        suffix = str(i + 1) if i else ""
        traces.append(_cells(np.asarray(matrix), "adapters", f"x{suffix}", f"y{suffix}", showscale=bool(i)))
    layout = {
        "xaxis": {"domain": [0, 0.42], "dtick": 1},
        "yaxis": {"autorange": "reversed", "dtick": 1},
        "xaxis2": {
            "title": {"text": "adapter that answers, refined"},
            "domain": [0.53, 0.95],
            "anchor": "y2",
            "dtick": 1,
        },
        "yaxis2": {"anchor": "x2", "autorange": "reversed", "dtick": 1},
    }
    return figure(traces, title=title, x="adapter the prototypes name", y="task of the image", height=340, **layout)


def incremental_figure(view: IncrementalView) -> go.Figure:
    """Draw one look at a stream: accuracy along it, and a matrix at one place of it.

    Args:
        view: from `incremental_view`.
    """
    traces = [
        _line(name, curve, (*PALETTE[1:4], NEUTRAL)[i % 4], DASHES[i % len(DASHES)])
        for i, (name, curve) in enumerate(view.references.items())
    ]
    traces.append(_line("these settings", view.curve, PALETTE[0], "solid"))
    here = {"x": np.array([view.after + 1]), "y": view.curve[[view.after]], "mode": "markers", "showlegend": False}
    ring = {"symbol": "circle-open", "size": 15, "color": PALETTE[0], "line": {"width": 2}}
    traces.append({"type": "scatter", "marker": ring, "hoverinfo": "skip", **here})
    x, y, _ = AXES[view.show]
    cells = _cells(view.matrix, view.show, "x2", "y2", x=list(view.names), y=list(view.names))
    layout = {
        "xaxis": {"domain": [0, 0.42], "dtick": 1, "range": [0.8, len(view.curve) + 0.2]},
        "yaxis": {"range": [0, 1.03]},
        "xaxis2": {"title": {"text": x}, "domain": [0.56, 0.94], "anchor": "y2", "type": "category"},
        "yaxis2": {"title": {"text": y}, "anchor": "x2", "type": "category", "autorange": "reversed"},
    }
    title = f"accuracy {view.curve[view.after]:.3f} over {view.after + 1} tasks"
    axes = {"x": "tasks seen", "y": "accuracy, all classes seen"}
    return figure([*traces, cells], title=title, height=400, **axes, **layout)


def _line(name: str, curve, colour: str, dash: str) -> dict:
    values = {"x": np.arange(1, len(curve) + 1), "y": np.asarray(curve, dtype=float)}
    line = {"color": colour, "dash": dash, "width": 2.5 if dash == "solid" else 1.8}
    return {"type": "scatter", "mode": "lines+markers", "name": name, "line": line, **values}


def _cells(matrix: np.ndarray, show: str, xaxis: str, yaxis: str, **more) -> dict:
    x, y, label = AXES[show]
    hover = f"{y} %{{y}}, {x} %{{x}}: %{{z:.0%}}<extra></extra>"
    return heatmap(matrix, limit=1.0, label=label, xaxis=xaxis, yaxis=yaxis, hovertemplate=hover, **more)
