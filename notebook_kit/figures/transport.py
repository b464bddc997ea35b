"""Pictures of transport plans and of PLeaS: who goes where, what it scores, and what is merged in each layer."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from notebook_kit.alignment import incoming
from notebook_kit.diagnostics.transport import FusionView, PleasView
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap

GROUPS = {"merged": NEUTRAL, "a": PALETTE[0], "b": PALETTE[1]}


def plan_figure(plan: Float[Tensor, "units_b units_a"], *, title: str = "") -> go.Figure:
    """Draw a transport plan: where each unit of b goes.

    Args:
        plan: from `transport_plan` or `ot_fusion(...).plans`. Rows are sorted by where most of them goes, so that a
            hard plan is a diagonal (a broken one where many units of b go to one of a).
        title: of the picture.
    """
    axes = {"xaxis": {"title": {"text": "unit of A"}}, "yaxis": {"autorange": "reversed"}}
    return figure([_plan_trace(plan)], title=title, y="unit of B, sorted", height=400, **axes)


def _plan_trace(plan: Tensor, **axes) -> dict:
    rows = incoming(plan).cpu().numpy()
    order = np.lexsort((-rows.max(1), rows.argmax(1)))
    return heatmap(rows[order], limit=(0.0, float(rows.max())), label="share of the unit sent", **axes)


def epsilon_figure(curve: pd.DataFrame, *, title: str = "", y: str = "score") -> go.Figure:
    """Draw what fused networks score against how soft their plans are.

    Args:
        curve: from `epsilon_curve`.
        title: of the picture.
        y: what the score measures, with its unit.
    """
    return figure(_epsilon_traces(curve), title=title, x="epsilon (share of the largest cost)", y=y, xaxis=_log())


def _log() -> dict:
    return {"type": "log", "dtick": 1}


def _epsilon_traces(curve: pd.DataFrame, mark: tuple[float, float] | None = None) -> list[dict]:
    soft, hard = (curve[curve["method"] == method] for method in ("sinkhorn", "exact"))
    x = soft["epsilon"].to_numpy()
    traces = [
        {"type": "scatter", "mode": "lines+markers", "x": x, "y": soft["score"].to_numpy(), "name": "soft plans"}
        | {"line": {"color": PALETTE[0]}}
    ]
    if len(hard):
        level = np.full(2, hard["score"].iloc[0])
        dotted = {"color": PALETTE[5], "dash": "dot"}
        ends = np.array([x.min(), x.max()])
        traces.append({"type": "scatter", "mode": "lines", "x": ends, "y": level, "name": "exact", "line": dotted})
    if mark is not None:
        traces.append(_mark(*mark))
    return traces


def _mark(x: float, y: float) -> dict:
    dot = {"color": PALETTE[2], "size": 12, "symbol": "diamond"}
    return {"type": "scatter", "mode": "markers", "x": [x], "y": [y], "name": "these settings", "marker": dot}


def fusion_figure(view: FusionView, *, y: str = "score") -> go.Figure:
    """Draw one look at a fusion: the score against epsilon, and one layer's plan.

    Args:
        view: from `fusion_view`.
        y: what the score measures, with its unit.
    """
    how = "exact" if view.method == "exact" else f"epsilon {view.epsilon:.3g}"
    title = f"{view.layer}: {how}" + ("" if view.score is None else f", {y} {view.score:.3f}")
    if view.curve is None or view.score is None:
        return plan_figure(view.plan, title=title)
    soft = view.curve.loc[view.curve["method"] == "sinkhorn", "epsilon"]
    place = view.epsilon if view.method == "sinkhorn" else float(soft.min())
    traces = _epsilon_traces(view.curve, mark=(place, view.score))
    traces.append(_plan_trace(view.plan, xaxis="x2", yaxis="y2"))
    layout = {
        "xaxis": {"domain": [0, 0.46], **_log()},
        "xaxis2": {"title": {"text": "unit of A"}, "domain": [0.58, 1], "anchor": "y2"},
        "yaxis2": {"title": {"text": "unit of B, sorted"}, "autorange": "reversed", "anchor": "x2"},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
    }
    return figure(traces, title=title, x="epsilon (share of the largest cost)", y=y, height=400, **layout)


def budget_figure(curve: pd.DataFrame, *, title: str = "", y: str = "score") -> go.Figure:
    """Draw what joined networks score against what they cost.

    Args:
        curve: from `budget_curve`.
        title: of the picture.
        y: what the score measures, with its unit.
    """
    return figure(_budget_traces(curve), title=title, x="multiply-adds (times one network)", y=y)


def _budget_traces(curve: pd.DataFrame, mark: tuple[float, float] | None = None) -> list[dict]:
    colours = (PALETTE[0], PALETTE[5], PALETTE[1], PALETTE[3], PALETTE[4])
    traces = [
        {"type": "scatter", "mode": "lines+markers", "x": rows["cost"].to_numpy(), "y": rows["score"].to_numpy()}
        | {"name": variant, "line": {"color": colours[number % len(colours)]}}
        for number, (variant, rows) in enumerate(curve.groupby("variant", sort=False))
    ]
    return traces if mark is None else [*traces, _mark(*mark)]


def pleas_figure(view: PleasView, *, y: str = "score") -> go.Figure:
    """Draw one look at a network that PLeaS made: score against cost, and what became of each layer's units.

    Args:
        view: from `pleas_view`.
        y: what the score measures, with its unit.
    """
    title = f"{view.cost:.2f} times one network" + ("" if view.score is None else f", {y} {view.score:.3f}")
    names = list(view.widths)
    both = view.curve is not None and view.score is not None
    place = {"xaxis": "x2", "yaxis": "y2"} if both else {}
    labels = {"merged": "merged", "a": "A's own", "b": "B's own"}
    bars = []
    for group, colour in GROUPS.items():
        sizes = [getattr(split, group) for split in view.widths.values()]
        written = {"text": [labels[group] if n else "" for n in sizes], "textposition": "inside", "textangle": 0}
        bar = {"type": "bar", "x": names, "y": np.array(sizes), "name": labels[group], "marker": {"color": colour}}
        bars.append(bar | written | {"showlegend": False} | place)
    if not both:
        return figure(bars, title=title, x="layer", y="units", barmode="stack")
    layout = {
        "xaxis": {"domain": [0, 0.5]},
        "xaxis2": {"title": {"text": "layer"}, "domain": [0.62, 1], "anchor": "y2"},
        "yaxis2": {"title": {"text": "units"}, "anchor": "x2"},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
    }
    traces = [*_budget_traces(view.curve, (view.cost, view.score)), *bars]
    return figure(
        traces, title=title, x="multiply-adds (times one network)", y=y, height=400, barmode="stack", **layout
    )
