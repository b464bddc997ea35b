"""Pictures of merges of checkpoints and runs: weights over a loss trace, Model Stock's triangle, lengths on an arc."""

import numpy as np
import plotly.graph_objects as go
import torch

from notebook_kit.diagnostics.checkpoint_merges import LengthView, PenaltyView, StockView
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure
from notebook_kit.merging.model_stock import interpolation

BLUE, ORANGE, GREEN, PINK = PALETTE[:4]


def penalty_figure(view: PenaltyView, *, y: str = "test loss (nats)") -> go.Figure:
    """Draw checkpoints' weights above the loss they were trained at, and what the penalty does to the merged model.

    Args:
        view: from `penalty_view`.
        y: what was measured, with its unit.
    """
    bars = {"type": "bar", "x": view.steps, "y": view.weights, "marker": {"color": BLUE}, "yaxis": "y2"}
    trace = _line("training loss", view.steps, view.losses, NEUTRAL) | {"mode": "lines+markers"}
    used = view.weights > 0
    ring = {"symbol": "circle", "size": 7, "color": BLUE}
    picked = {"type": "scatter", "mode": "markers", "x": view.steps[used], "y": view.losses[used], "marker": ring}
    curve = _line("merged", view.penalties, view.curve, BLUE) | {"xaxis": "x3", "yaxis": "y3", "mode": "lines+markers"}
    here = {"symbol": "circle-open", "size": 15, "color": BLUE, "line": {"width": 2}}
    now = {"type": "scatter", "mode": "markers", "x": np.array([view.penalty]), "y": np.array([view.value])}
    traces = [bars, trace, picked, curve, now | {"marker": here, "xaxis": "x3", "yaxis": "y3"}]
    ends = view.penalties[[0, -1]]
    for (name, value), colour, dash in zip(view.references.items(), (ORANGE, GREEN), ("dash", "dot"), strict=True):
        level = _line(name, ends, np.array([value, value]), colour, dash) | {"xaxis": "x3", "yaxis": "y3"}
        traces.append(level)
    for trace in traces:
        trace["showlegend"] = trace.get("name") in ("merged", *view.references)
    layout = {
        "xaxis": {"domain": [0, 0.47], "anchor": "y"},
        "yaxis": {"domain": [0, 0.48]},
        "yaxis2": {"domain": [0.58, 1], "anchor": "x", "title": {"text": "weight"}, "rangemode": "tozero"},
        "xaxis3": {"domain": [0.6, 1], "anchor": "y3", "title": {"text": "penalty"}},
        "yaxis3": {"anchor": "x3", "title": {"text": y, "standoff": 10}},
        "bargap": 0.3,
    }
    title = f"merged: {view.value:.3f}; uniform: {view.references['uniform average']:.3f}"
    return figure(traces, title=title, x="training step", y="training loss (nats)", height=420, **layout)


def stock_figure(view: StockView) -> go.Figure:
    """Draw experts around the line from base to mean, and the share of the mean that each tensor gets.

    Args:
        view: from `stock_view`.
    """
    x, y = view.experts.T
    nothing = np.array([np.nan])
    spokes_x, spokes_y = (np.concatenate([np.array([0.0, v, np.nan]) for v in axis]) for axis in (x, y))
    rays = {"type": "scatter", "mode": "lines", "x": spokes_x, "y": spokes_y, "line": {"color": NEUTRAL, "width": 1}}
    line = _line("", np.array([0.0, 1.0]), np.zeros(2), NEUTRAL, "dot")
    traces = [
        rays | {"showlegend": False, "hoverinfo": "skip"},
        line | {"showlegend": False, "hoverinfo": "skip"},
        _marks("base", np.zeros(1), np.zeros(1), NEUTRAL, "square"),
        _marks("experts", x, y, BLUE, "circle"),
        _marks("their mean", np.ones(1), np.zeros(1), ORANGE, "diamond"),
        _marks("Model Stock", np.array([view.t]), np.zeros(1), GREEN, "star"),
    ]
    far = view.centre if view.centre is not None else np.concatenate([nothing, nothing])
    traces.append(_marks("mean of the others", far[:1], far[1:], PINK, "x"))
    k, cosines = len(x), np.linspace(-1 / max(2, len(x)), 1, 60)
    share = _line("", cosines, interpolation(torch.from_numpy(cosines), k).numpy(), NEUTRAL)
    second = {"xaxis": "x2", "yaxis": "y2", "showlegend": False}
    hover = {"text": list(view.tensors), "hovertemplate": "%{text}: cos %{x:.2f}, t %{y:.2f}<extra></extra>"}
    traces += [
        share | second,
        _marks("", view.cosines, view.shares, BLUE, "circle") | second | hover,
    ]
    here = view.tensors.index(view.tensor)
    ring = {"symbol": "circle-open", "size": 16, "color": GREEN, "line": {"width": 2}}
    traces.append(_marks("", view.cosines[[here]], view.shares[[here]], GREEN, "circle") | second | {"marker": ring})
    reach = max(1.15, float(np.abs(view.experts).max()) * 1.1)
    layout = {
        "xaxis": {"domain": [0, 0.55], "range": [-0.1, max(1.3, float(x.max()) * 1.1)]},
        "yaxis": {"range": [-reach, reach]},
        "xaxis2": {"domain": [0.68, 1], "anchor": "y2", "title": {"text": "cos θ"}},
        "yaxis2": {"anchor": "x2", "title": {"text": "t, share of the mean", "standoff": 8}, "range": [-0.05, 1.05]},
        "margin": {"l": 64, "r": 24, "t": 92, "b": 52},
    }
    title = f"{view.tensor}: cos θ {view.cosines[here]:.2f}, t {view.t:.2f}"
    axes = {"x": "along base → mean (its length is 1)", "y": "away from that line"}
    return figure(traces, title=title, height=420, **axes, **layout)


def length_figure(view: LengthView) -> go.Figure:
    """Draw how long a merged tensor is on the way between two experts, and how long all experts' merge is by tensor.

    Args:
        view: from `length_view`.
    """
    styles = zip(view.lengths.items(), (ORANGE, BLUE, GREEN), ("solid", "dash", "dot"), strict=True)
    traces = [_line(name, view.t, values, colour, dash) for (name, values), colour, dash in styles]
    i = int(np.abs(view.t - view.at).argmin())
    for trace in list(traces):
        mark = _marks("", view.t[[i]], trace["y"][[i]], trace["line"]["color"], "circle-open")
        traces.append(mark | {"showlegend": False})
    for name, column, colour in (("average, all", "average", ORANGE), ("Karcher, all", "karcher", GREEN)):
        bar = {"type": "bar", "x": list(view.table["tensor"]), "y": view.table[column].to_numpy(), "name": name}
        traces.append(bar | {"marker": {"color": colour}, "xaxis": "x2", "yaxis": "y2"})
    low = min(0.6, min(float(values.min()) for values in view.lengths.values()) - 0.05)
    layout = {
        "xaxis": {"domain": [0, 0.45]},
        "yaxis": {"range": [low, 1.35]},
        "xaxis2": {"domain": [0.58, 1], "anchor": "y2", "title": {"text": "tensor"}},
        "yaxis2": {"anchor": "x2", "title": {"text": "length, all merged", "standoff": 8}, "rangemode": "tozero"},
        "barmode": "group",
        "margin": {"l": 64, "r": 24, "t": 92, "b": 52},
    }
    axes = {"x": "t, from the first to the second", "y": "length (mean of the two: 1)"}
    return figure(traces, title=view.tensor, height=400, **axes, **layout)


def _line(name: str, x: np.ndarray, y: np.ndarray, colour: str, dash: str = "solid") -> dict:
    line = {"color": colour, "dash": dash, "width": 2}
    return {"type": "scatter", "mode": "lines", "name": name, "x": np.asarray(x), "y": np.asarray(y), "line": line}


def _marks(name: str, x: np.ndarray, y: np.ndarray, colour: str, symbol: str) -> dict:
    marker = {"color": colour, "symbol": symbol, "size": 11}
    return {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "marker": marker}
