"""Pictures of features: CKA of layers, correlations of units, and what ZipIt joined."""

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from notebook_kit.diagnostics.features import ZipView
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap

KINDS = {"alone": NEUTRAL, "across": PALETTE[0], "within": PALETTE[1], "both": PALETTE[2]}


def cka_figure(frames: dict[str, pd.DataFrame], *, title: str = "") -> go.Figure:
    """Draw CKA matrices side by side on one scale, whose lower end is below the smallest.

    Args:
        frames: name to `layer_cka`, one to four.
        title: of the picture.
    """
    names = list(next(iter(frames.values())).columns)
    low = math.floor(10 * min(float(frame.to_numpy().min()) for frame in frames.values()) - 1e-9) / 10
    traces, layout, width = [], {}, 1 / len(frames)
    for number, (name, frame) in enumerate(frames.items()):
        end = "" if number == 0 else str(number + 1)
        place = {"xaxis": f"x{end}", "yaxis": f"y{end}", "showscale": number == len(frames) - 1}
        traces.append(
            heatmap(frame.to_numpy(), x=names, y=names, label="linear CKA", limit=(max(low, 0.0), 1.0), **place)
        )
        domain = [number * width + (0.04 if number else 0), (number + 1) * width - 0.02]
        layout[f"xaxis{end}"] = {"title": {"text": name}, "domain": domain, "anchor": f"y{end}", "automargin": True}
        rows = {"autorange": "reversed", "anchor": f"x{end}", "automargin": True}
        layout[f"yaxis{end}"] = rows | ({"showticklabels": False} if number else {"title": {"text": "layer of A"}})
    return figure(traces, title=title, height=340, **layout)


def correlation_figure(before, after, *, title: str = "") -> go.Figure:
    """Draw the correlation of unit with unit, before matching and after.

    Args:
        before: from `unit_correlation`.
        after: the same with b in a's order.
        title: of the picture.
    """
    traces = [heatmap(before, limit=1.0, signed=True, label="correlation", showscale=False)]
    traces.append(heatmap(after, limit=1.0, signed=True, label="correlation", xaxis="x2", yaxis="y2"))
    layout = {
        "xaxis": {"domain": [0, 0.46]},
        "yaxis": {"autorange": "reversed", "anchor": "x"},
        "xaxis2": {"title": {"text": "unit of B in A's order"}, "domain": [0.54, 1], "anchor": "y2"},
        "yaxis2": {"autorange": "reversed", "anchor": "x2"},
    }
    return figure(traces, title=title, x="unit of B, as it is", y="unit of A", height=380, **layout)


def zip_figure(view: ZipView, *, y: str = "score") -> go.Figure:
    """Draw zipped networks: scores, kinds of groups in one layer, and the correlations of its units group by group.

    Args:
        view: from `zip_view`.
        y: what the scores measure, with its unit.
    """
    tasks = [str(task) for task in view.scores.index]
    bars = [
        {"type": "bar", "x": tasks, "y": view.scores[name].to_numpy(), "name": name, "marker": {"color": colour}}
        for name, colour in (("own", NEUTRAL), ("zipped", PALETTE[0]))
    ]
    low = min(0.0, float(view.scores.to_numpy().min()))
    layout = {
        "xaxis": {"domain": [0, 0.27]},
        "yaxis": {"range": [low, max(1.0, float(view.scores.to_numpy().max())) if low == 0 else 0]},
        "xaxis2": {"title": {"text": "members"}, "domain": [0.41, 0.62], "anchor": "y2"},
        "yaxis2": {"title": {"text": "groups"}, "anchor": "x2", "automargin": True},
        "xaxis3": {"title": {"text": "unit, by group"}, "domain": [0.76, 1], "anchor": "y3"},
        "yaxis3": {"autorange": "reversed", "anchor": "x3", "title": {"text": "unit"}, "automargin": True},
    }
    kinds = list(view.kinds)
    counts = {"type": "bar", "x": kinds, "y": np.array([view.kinds[kind] for kind in kinds]), "showlegend": False}
    bars.append(counts | {"marker": {"color": [KINDS[kind] for kind in kinds]}, "xaxis": "x2", "yaxis": "y2"})
    bars.append(heatmap(view.correlation, limit=1.0, signed=True, label="correlation", xaxis="x3", yaxis="y3"))
    title = f"{view.zipped.parameters:,} numbers stored"
    if view.perm is not None:
        groups = int(view.zipped.groups[view.perm].max()) + 1
        title = f"{view.perm}: {view.zipped.groups[view.perm].numel()} units in {groups} groups; {title}"
    return figure(bars, title=title, x="task", y=y, barmode="group", height=400, **layout)
