"""Pictures of random routers: a schedule of k, one model at every k, and paths through experts without a gate."""

from collections.abc import Mapping
from typing import Annotated

import numpy as np
import plotly.graph_objects as go

from notebook_kit.diagnostics.random_routers import Paths
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routers import k_schedule


def schedule_view(
    *,
    k_min: Annotated[int, Range(1, 64)] = 8,
    k_max: Annotated[int, Range(1, 64)] = 16,
    schedule: Annotated[str, Choice("linear", "cosine", "exponential", "multi-step", "constant")] = "linear",
    direction: Annotated[str, Choice("up", "down")] = "up",
) -> go.Figure:
    """Draw how many experts a token uses in the course of training.

    Args:
        k_min: fewest.
        k_max: most; below k_min it counts as k_min.
        schedule: the shape.
        direction: up or down.

    Returns:
        go.Figure
    """
    steps, settings = 400, {"k_min": k_min, "k_max": max(k_min, k_max), "schedule": schedule, "direction": direction}
    x = np.arange(0, steps + 1, 2)
    ks = np.array([k_schedule(int(step), steps, **settings) for step in x])
    line = {"type": "scatter", "mode": "lines", "x": x / steps, "y": ks, "line": {"shape": "hv", "color": PALETTE[0]}}
    return figure(
        [line],
        title=f"{schedule}, {direction}: {ks.mean():.1f} experts a token over the whole training",
        x="share of training done",
        y="experts a token, k",
        height=300,
        yaxis={"range": [0, max(k_min, k_max) + 1]},
    )


def slim_view(
    curves: Mapping[str, Mapping[int, float]],
    schedules: Mapping[str, list[int]],
    *,
    k: Annotated[int, Range(1, 512)] = 2,
    y: str = "accuracy",
) -> go.Figure:
    """Draw what one set of weights does with any number of experts, next to the numbers it was trained with.

    Args:
        curves: way of training to {k: score}.
        schedules: way of training to k at evenly spaced steps of its training; a name may be missing.
        k: experts at inference, marked; the nearest that was scored.
        y: what is scored.

    Returns:
        go.Figure
    """
    data, told = [], []
    for i, (name, curve) in enumerate(curves.items()):
        colour = PALETTE[i % len(PALETTE)]
        ks = np.array(list(curve))
        at = int(ks[np.abs(ks - k).argmin()])
        told.append(curve[at])
        style = {"type": "scatter", "name": name, "line": {"color": colour}, "marker": {"color": colour}}
        if name in schedules:
            course = np.asarray(schedules[name])
            x = np.linspace(0, 1, len(course))
            data.append(style | {"mode": "lines", "x": x, "y": course, "showlegend": False})
        place = {"x": ks, "y": np.array(list(curve.values())), "xaxis": "x2", "yaxis": "y2"}
        data.append(style | {"mode": "lines+markers"} | place)
        big = {"size": 13, "color": colour, "line": {"color": NEUTRAL, "width": 2}}
        point = {"x": np.array([at]), "y": np.array([curve[at]]), "xaxis": "x2", "yaxis": "y2", "showlegend": False}
        data.append({"type": "scatter", "mode": "markers", "marker": big, "hoverinfo": "skip"} | point)
    top = max((max(curve) for curve in curves.values()), default=1)
    spread = f"{min(told):.3f} to {max(told):.3f}" if told else ""
    return figure(
        data,
        title=f"k = {k}: {y} {spread}",
        x="share of training done",
        y="experts a token in training",
        height=420,
        xaxis={"domain": [0, 0.38]},
        yaxis={"range": [0, top + 0.5]},
        xaxis2={"title": {"text": "experts a token at inference, k"}, "domain": [0.5, 1], "anchor": "y2"},
        yaxis2={"title": {"text": y}, "anchor": "x2"},
        legend={"orientation": "h", "y": -0.3, "yanchor": "top", "x": 0, "xanchor": "left"},
        margin={"l": 64, "r": 24, "t": 48, "b": 112},
    )


def disagreement_view(
    runs: Mapping[float, Paths],
    *,
    consistency_coef: Annotated[float, Range(0, 100)] = 0.0,
    y: str = "accuracy",
) -> go.Figure:
    """Draw how far paths through random experts disagree, and how good each of them is.

    Args:
        runs: coefficient of the consistency loss to what the trained model's paths say; colours are on one scale.
        consistency_coef: which run; the nearest that there is.
        y: what the paths' scores measure.

    Returns:
        go.Figure
    """
    nearest = min(runs, key=lambda value: abs(value - consistency_coef))
    run = runs[nearest]
    names = ["-".join(map(str, path)) for path in run.paths]
    limit = max(float(other.disagreement.max()) for other in runs.values()) or 1.0
    square = heatmap(run.disagreement, x=names, y=names, limit=limit, label="symmetric KL (nats)")
    data, low, high = [square | {"xaxis": "x2", "yaxis": "y2"}], 1.0, 0.0
    for value, other in runs.items():
        scores = np.array(list(other.scores.values()))
        low, high = min(low, scores.min(), other.ensemble), max(high, scores.max(), other.ensemble)
        colour = PALETTE[0] if value == nearest else NEUTRAL
        # Spread sideways, the same way every time, so that equal scores can be told apart.
        x = list(runs).index(value) + np.linspace(-0.25, 0.25, len(scores))
        dots = {"type": "scatter", "mode": "markers", "x": x, "y": scores}
        data.append(dots | {"marker": {"color": colour, "size": 7, "opacity": 0.8}, "showlegend": False})
        ends = list(runs).index(value) + np.array([-0.35, 0.35])
        bar = {"type": "scatter", "mode": "lines", "showlegend": False}
        data.append(bar | {"x": ends, "y": np.full(2, other.ensemble), "line": {"color": PALETTE[5], "width": 3}})
    pad = 0.1 * (high - low) or 0.01
    return figure(
        data,
        title=f"consistency_coef {nearest:g}: mean disagreement {run.mean_disagreement:.4f} nats, "
        f"same answer {run.mean_agreement:.1%}",
        x="consistency_coef",
        y=f"{y} (dot: a path, bar: all experts)",
        height=440,
        xaxis={
            "domain": [0, 0.34],
            "tickvals": list(range(len(runs))),
            "ticktext": [f"{value:g}" for value in runs],
        },
        yaxis={"range": [low - pad, high + pad]},
        xaxis2={
            "title": {"text": "path (expert of each layer)"},
            "domain": [0.5, 1],
            "anchor": "y2",
            "type": "category",
            "showgrid": False,
        },
        yaxis2={
            "title": {"text": "path"},
            "anchor": "x2",
            "autorange": "reversed",
            "type": "category",
            "showgrid": False,
        },
    )
