"""Pictures of curvature: fronts of two experts, who decides where, grafting curves, and curvatures compared."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from notebook_kit.diagnostics.curvature import SPAN, DecisionView, FrontView, GraftView
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap
from notebook_kit.figures.weights import short

COLOURS = (PALETTE[1], PALETTE[0], PALETTE[2], PALETTE[3])
LEFT = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}


def front_figure(view: FrontView, *, tasks: Sequence[str], unit: str = "accuracy") -> go.Figure:
    """Draw fronts in the plane of two tasks' scores, and one weight on each of them.

    Args:
        view: from `front_view`.
        tasks: names of the two tasks.
        unit: what is scored.
    """
    traces, names = [], list(dict.fromkeys(view.fronts["merge"]))
    for name, colour in zip(names, COLOURS, strict=False):
        rows = view.fronts[view.fronts["merge"] == name]
        dash = "dot" if name == names[-1] and len(names) > 2 else "solid"  # the last may lie on another
        line = {"x": rows["a"].to_numpy(), "y": rows["b"].to_numpy(), "line": {"color": colour, "dash": dash}}
        marker = {"size": 4, "color": colour}
        traces.append({"type": "scatter", "mode": "lines+markers", "name": name, "marker": marker} | line)
    for name, colour in zip(names, COLOURS, strict=False):
        here = view.here[view.here["merge"] == name]
        marker = {"symbol": "diamond", "size": 14, "color": colour, "line": {"width": 1.5, "color": NEUTRAL}}
        dot = {"type": "scatter", "mode": "markers", "marker": marker, "showlegend": False}
        traces.append(dot | {"x": here["a"].to_numpy(), "y": here["b"].to_numpy(), "name": f"{name}, here"})
    means = ", ".join(f"{row['merge']} {row['mean']:.3f}" for _, row in view.here.iterrows())
    title = f"λ = {view.weight:.2f} for {tasks[0]}; mean of both: {means}"
    x, y = (f"{unit} on {task}" for task in tasks)
    return figure(traces, title=title, x=x, y=y, height=420)


def decision_figure(view: DecisionView) -> go.Figure:
    """Draw two log-Fishers of one tensor on one scale, and which of the two decides.

    Args:
        view: from `decision_view`.
    """
    finite = np.concatenate([log[np.isfinite(log)] for log in view.logs])
    # The faintest hundredth would take half of the scale.
    low, high = (float(np.quantile(finite, q)) for q in (0.01, 1.0)) if len(finite) else (0.0, 1.0)
    domains = ([0, 0.26], [0.29, 0.55], [0.71, 0.97])
    bars = ({}, {"x": 0.56}, {"x": 0.98})
    traces, layout = [], {}
    for i, (log, domain) in enumerate(zip((*view.logs, view.ratio), domains, strict=True)):
        end = "" if i == 0 else str(i + 1)
        last = i == 2
        label = f"log₁₀ louder: {view.names[1]} (−), {view.names[0]} (+)" if last else "log₁₀ Fisher"
        scale = {"signed": True, "limit": SPAN} if last else {"limit": (low, high)}
        trace = heatmap(log, label=label, xaxis=f"x{end}", yaxis=f"y{end}", showscale=i > 0, **scale)
        trace["colorbar"] = trace["colorbar"] | bars[i]
        traces.append(trace)
        title = "who decides" if last else view.names[i]
        layout[f"xaxis{end}"] = {"domain": domain, "anchor": f"y{end}", "title": {"text": f"{title}<br>input"}}
        rows = {"autorange": "reversed", "anchor": f"x{end}", "showticklabels": i == 0}
        layout[f"yaxis{end}"] = rows | ({"title": {"text": "output"}} if i == 0 else {})
    title = f"{short(view.tensor)}: {view.names[0]} is the louder in {view.share:.0%} of the entries"
    return figure(traces, title=title, height=400, **layout)


def graft_figure(view: GraftView, *, unit: str = "accuracy") -> go.Figure:
    """Draw grafting curves with the present density on them, and the share that each tensor of each expert keeps.

    Args:
        view: from `graft_view`.
        unit: what is scored.
    """
    traces = []
    colours = {"graft: FFG": PALETTE[0], "graft: magnitude": PALETTE[1], "merge: OTA + FFG": PALETTE[2]}
    for name, rows in view.curves.groupby("curve", sort=False):
        line = {"color": colours[name], "dash": "dot" if name.startswith("merge") else "solid"}
        trace = {"type": "scatter", "mode": "lines", "name": name, "line": line}
        traces.append(trace | {"x": rows["density"].to_numpy(), "y": rows["score"].to_numpy()})
    for name, colour in (("grafts", PALETTE[0]), ("merge", PALETTE[2])):
        marker = {"symbol": "diamond", "size": 12, "color": colour, "line": {"width": 1.5, "color": NEUTRAL}}
        dot = {"type": "scatter", "mode": "markers", "marker": marker, "showlegend": False, "name": f"{name}, here"}
        traces.append(dot | {"x": np.array([view.density]), "y": np.array([view.scores[name]])})
    rows = [short(name) for name in view.kept.index]
    limit = max(float(view.kept.to_numpy().max()), 1e-3)
    place = {"xaxis": "x2", "yaxis": "y2"}
    traces.append(heatmap(view.kept.to_numpy(), x=list(view.kept), y=rows, label="share kept", limit=limit, **place))
    layout = {
        "xaxis": {"domain": [0, 0.42]},
        "xaxis2": {"domain": [0.62, 1], "anchor": "y2", "title": {"text": "expert"}, "type": "category"},
        "yaxis2": {"anchor": "x2", "autorange": "reversed", "automargin": True},
        "legend": LEFT,
    }
    title = f"density {view.density:.2f}: grafts {view.scores['grafts']:.3f} on their own tasks, "
    title += f"their merge {view.scores['merge']:.3f}"
    return figure(traces, title=title, x="density (share kept)", y=unit, height=420, **layout)


def pairs_figure(frame: pd.DataFrame, correlation: float, *, x: str, y: str, title: str = "") -> go.Figure:
    """Draw two curvatures of one model against each other, a colour for each tensor.

    Args:
        frame: from `log_pairs`.
        correlation: likewise.
        x: what the first is.
        y: what the second is.
        title: of the picture; the correlation is added.
    """
    traces = [
        {"type": "scatter", "mode": "markers", "name": short(name), "x": rows["one"].to_numpy()}
        | {"y": rows["other"].to_numpy(), "marker": {"size": 4, "opacity": 0.6, "color": PALETTE[i % len(PALETTE)]}}
        for i, (name, rows) in enumerate(frame.groupby("tensor", sort=True))
    ]
    title = f"{title}: correlation {correlation:.2f}" if title else f"correlation {correlation:.2f}"
    beside = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}
    return figure(traces, title=title, x=f"log₁₀ {x}", y=f"log₁₀ {y}", height=400, legend=beside)


def similarity_figure(
    cosine: Float[np.ndarray, "experts experts"], names: Sequence[str], *, title: str = "", label: str = "cosine of √v"
) -> go.Figure:
    """Draw how alike the experts' curvatures are.

    Args:
        cosine: from `curvature_cosine`.
        names: of the experts.
        title: of the picture.
        label: of the colour bar.
    """
    low = np.floor(10 * float(cosine.min())) / 10
    trace = heatmap(cosine, x=names, y=names, label=label, limit=(min(low, 0.9), 1.0))
    axes = {"yaxis": {"autorange": "reversed", "type": "category"}, "xaxis": {"type": "category"}}
    return figure([trace], title=title, x="expert", y="expert", height=440, **axes)
