"""Pictures of merges in subspaces: scores as experts arrive, what a projection removes, what DOGE's Δ learns."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from notebook_kit.diagnostics.merge_arrivals import ArrivalView, ProjectionView, seen_mean
from notebook_kit.diagnostics.merge_subspaces import DogeView, energy_table
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap
from notebook_kit.figures.weights import short


def arrival_figure(view: ArrivalView, *, y: str = "accuracy") -> go.Figure:
    """Draw each task's score after each arrival, and λ_t beside √t.

    Args:
        view: from `arrival_view`.
        y: what the score measures, with its unit.
    """
    table, steps = view.table, np.arange(1, len(view.lambdas) + 1)
    low = float(np.floor(10 * table.to_numpy().min()) / 10)
    bar = {"title": {"text": y, "side": "top"}, "thickness": 12, "outlinewidth": 0, "x": 0.58, "xpad": 4}
    heat = heatmap(table.to_numpy(), x=steps.tolist(), y=list(table.index), limit=(min(low, 0.9), 1.0), colorbar=bar)
    # Tasks below the line have not arrived yet.
    edge = {"type": "scatter", "mode": "lines", "x": np.repeat(steps, 2) + np.tile([-0.5, 0.5], len(steps))}
    edge |= {"y": np.repeat(steps, 2) - 0.5, "line": {"color": PALETTE[5], "width": 2}, "showlegend": False}
    edge |= {"hoverinfo": "skip"}
    place = {"xaxis": "x2", "yaxis": "y2"}
    ours = {"type": "scatter", "mode": "lines+markers", "x": steps, "y": view.lambdas, "name": "λ_t"}
    root = {"type": "scatter", "mode": "lines", "x": steps, "y": np.sqrt(steps), "name": "√t"}
    ours |= {"line": {"color": PALETTE[0]}} | place
    root |= {"line": {"color": NEUTRAL, "dash": "dash"}} | place
    layout = {
        "xaxis": {"domain": [0, 0.57], "dtick": 1, "showgrid": False},
        "yaxis": {"autorange": "reversed", "title": {"text": ""}, "showgrid": False},
        "xaxis2": {"title": {"text": "t"}, "domain": [0.77, 1], "anchor": "y2", "dtick": 1},
        "yaxis2": {"title": {"text": "scale λ", "standoff": 4}, "anchor": "x2", "rangemode": "tozero"},
    }
    end = seen_mean(table)[-1]
    title = f"after all {len(steps)}: {y} {end:.3f}; under the line: not yet arrived"
    return figure([heat, edge, ours, root], title=title, x="experts merged, t", height=380, **layout)


def projection_figure(view: ProjectionView) -> go.Figure:
    """Draw |P|, an arriving update in the merge's own directions, with what is removed outlined.

    Args:
        view: from `projection_view`.
    """
    k = len(view.magnitudes)
    place = list(range(1, k + 1))
    top = float(np.quantile(view.magnitudes, 0.995)) or 1.0
    heat = heatmap(view.magnitudes, x=place, y=place, label="|P|, magnitude", limit=(0.0, top))
    line = {"color": PALETTE[5], "width": 3}
    lines = {"type": "scatter", "mode": "lines", "line": line, "showlegend": False, "hoverinfo": "skip"}
    ends = np.array([0.5, k + 0.5])
    outlines = [{**lines, "x": ends, "y": ends}]
    r = view.rank + 0.5
    if view.rank and view.block == "corner":
        outlines.append({**lines, "x": np.array([0.5, r, r]), "y": np.array([r, r, 0.5])})
    elif view.rank:
        outlines += [{**lines, "x": ends, "y": np.full(2, r)}, {**lines, "x": np.full(2, r), "y": ends}]
    title = f"{view.title}: rank {view.rank} protected, {view.removed:.0%} of the update removed"
    square = {"autorange": "reversed", "scaleanchor": "x", "constrain": "domain", "showgrid": False}
    axes = {"yaxis": square, "xaxis": {"constrain": "domain", "showgrid": False}}
    names = {"x": "input direction of the merge, strongest first", "y": "output direction of the merge"}
    return figure([heat, *outlines], title=title, height=480, **names, **axes)


def order_figure(study: pd.DataFrame, *, y: str = "accuracy") -> go.Figure:
    """Draw every order's result, a row of points for each variant, with its mean.

    Args:
        study: from `order_study`.
        y: what the score measures, with its unit.
    """
    groups = list(study.groupby("variant", sort=False))
    points = {"type": "scatter", "mode": "markers", "name": "one order", "marker": {"color": PALETTE[0], "size": 8}}
    points |= {"x": study["mean"].to_numpy(), "y": list(study["variant"])}
    mean = {"type": "scatter", "mode": "markers", "name": "mean", "y": [name for name, _ in groups]}
    mean |= {"x": np.array([rows["mean"].mean() for _, rows in groups])}
    mean |= {"marker": {"symbol": "line-ns", "size": 20, "line": {"width": 3, "color": PALETTE[5]}}}
    rows = {"autorange": "reversed", "title": {"text": ""}, "type": "category"}
    label = f"mean {y} over the tasks, after the last arrival"
    return figure(
        [points, mean], title=f"{study['order'].nunique()} orders of arrival", x=label, yaxis=rows, height=320
    )


def bars_figure(values: Mapping[str, float], *, title: str = "", y: str = "accuracy", start: float | None = None):
    """Draw one bar a variant, in the given order, with its figure, and a dashed line where they started.

    Args:
        values: label to number.
        title: of the picture.
        y: what is measured, with its unit.
        start: height of the line.
    """
    heights = np.array(list(values.values()), dtype=float)
    bars = {"type": "bar", "x": list(values), "y": heights, "marker": {"color": PALETTE[0]}, "showlegend": False}
    bars |= {"text": [f"{height:.3f}" for height in heights], "textposition": "outside", "cliponaxis": False}
    traces = [bars]
    if start is not None:
        level = {"type": "scatter", "mode": "lines", "name": "base", "x": [*values][:: max(len(values) - 1, 1)]}
        traces.append(level | {"y": np.full(2, start), "line": {"color": NEUTRAL, "dash": "dash"}})
    return figure(traces, title=title, y=y, xaxis={"type": "category"}, yaxis={"rangemode": "tozero"})


def doge_figure(view: DogeView) -> go.Figure:
    """Draw one moment of DOGE: the loss of every layer and where Δ lies, or one layer's matrices.

    Args:
        view: from `doge_view`.
    """
    return _doge_matrices(view) if view.show == "matrices" else _doge_losses(view)


def _doge_losses(view: DogeView) -> go.Figure:
    path, steps = view.path, view.path.steps[view.index]
    whole, now = path.details[-1], energy_table(path.details[view.index])
    traces = []
    for i, (name, one) in enumerate(whole.items()):
        losses = one.losses.numpy()
        colour = PALETTE[i % len(PALETTE)]
        line = {"type": "scatter", "mode": "lines", "name": short(name), "x": np.arange(len(losses)), "y": losses}
        traces.append(line | {"line": {"color": colour}})
        here = {"type": "scatter", "mode": "markers", "x": [steps], "y": [float(losses[min(steps, len(losses) - 1)])]}
        traces.append(here | {"marker": {"color": colour, "size": 11, "symbol": "diamond"}, "showlegend": False})
    place = {"xaxis": "x2", "yaxis": "y2"}
    names = [short(name) for name in now["tensor"]]
    inside = {"type": "bar", "showlegend": False, "x": names, "y": now["inside"].to_numpy()}
    chance = {
        "type": "scatter",
        "mode": "markers",
        "name": "by chance in Q",
        "x": names,
        "y": now["by_chance"].to_numpy(),
    }
    traces.append(inside | {"marker": {"color": PALETTE[4]}} | place)
    traces.append(
        chance | {"marker": {"symbol": "line-ew", "size": 34, "line": {"width": 3, "color": NEUTRAL}}} | place
    )
    layout = {
        "xaxis": {"domain": [0, 0.5]},
        "yaxis": {"type": "log", "dtick": 1},
        "xaxis2": {"domain": [0.64, 1], "anchor": "y2", "type": "category", "title": {"text": "layer"}},
        "yaxis2": {"title": {"text": "share of ‖Δ‖² in Q", "standoff": 6}, "anchor": "x2", "rangemode": "tozero"},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
    }
    title = f"{steps} steps: score {float(path.scores[view.index]):.3f}"
    return figure(traces, title=title, x="step", y="loss of the layer", height=400, **layout)


def _doge_matrices(view: DogeView, panels: Sequence[str] = ("x", "x2", "x3", "x4")) -> go.Figure:
    one, taus = view.path.details[view.index][view.tensor], view.path.taus[view.tensor]
    delta = one.delta.mean(0)
    star = ((taus + one.delta) * one.lambdas[:, None, None]).sum(0)
    scaled = taus * one.lambdas[:, None, None]
    shown = {"λ₁ τ₁": scaled[0], "λ₂ τ₂": scaled[min(1, len(taus) - 1)]}
    shown |= {"Σλ Δ": one.lambdas.sum() * delta, "Σ λ (τ + Δ)": star}
    limit = max(float(np.quantile(np.abs(z.numpy()), 0.99)) for z in shown.values()) or 1.0
    traces, layout = [], {}
    for i, (panel, (label, z)) in enumerate(zip(panels, shown.items(), strict=True)):
        axis, number = panel, panel[1:]
        trace = heatmap(z.numpy(), label="weight", signed=True, limit=limit, showscale=i == 3)
        traces.append(trace | {"xaxis": axis, "yaxis": f"y{number}"})
        layout[f"xaxis{number}"] = {"domain": [0.25 * i, 0.25 * i + 0.21], "title": {"text": f"{label}, input"}}
        layout[f"yaxis{number}"] = {"autorange": "reversed", "anchor": axis, "showticklabels": i == 0}
    layout["yaxis"] |= {"title": {"text": "output", "standoff": 6}}
    title = f"{short(view.tensor)} after {view.path.steps[view.index]} steps"
    return figure(traces, title=title, height=360, **layout)
