"""Pictures of merges by search: coefficients that learn, vertices that are picked, niches that fill."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from notebook_kit.diagnostics.merge_search import CoefficientView, FrankWolfeView, NicheView
from notebook_kit.figures.style import GRID, NEUTRAL, PALETTE, figure, heatmap

DASHES = ("solid", "dash", "dot", "dashdot")


def adamerging_figure(view: CoefficientView, *, y: str = "accuracy") -> go.Figure:
    """Draw one step of learned coefficients: loss and score over the steps, and the coefficients now.

    Args:
        view: from `adamerging_view`.
        y: what the score measures, with its unit.
    """
    record, path = view.record, view.record.path
    loss = path.losses.mean(1).numpy()
    now = float(np.interp(view.step, record.steps, record.scores))
    traces = [
        _line(np.arange(len(loss)), loss, PALETTE[5], name=record.loss),
        _ring(view.step, loss[view.step], PALETTE[5]),
        _line(record.steps, record.scores, PALETTE[0], name=y, yaxis="y2"),
        _ring(view.step, now, PALETTE[0], yaxis="y2"),
    ]
    limit = float(path.coefficients.abs().max())  # one scale for all steps
    x = [layer.replace("layers.", "") for layer in path.layers]
    cells = path.coefficients[view.step].numpy()
    hover = "expert %{y}<br>%{x}<br>coefficient %{z:.3f}<extra></extra>"
    place = {"xaxis": "x3", "yaxis": "y3", "hovertemplate": hover}
    cells = heatmap(cells, x=x, y=list(record.names), signed=True, limit=limit, label="λ", **place)
    cells["colorbar"]["title"] = {"text": "λ", "side": "top"}
    traces.append(cells)
    domain = [0, 0.36]
    layout = {
        "xaxis": {"domain": domain, "anchor": "y2"},
        "yaxis": {"domain": [0.56, 1], "title": {"text": record.loss, "standoff": 10}},
        "yaxis2": {"domain": [0, 0.44], "title": {"text": y, "standoff": 10}},
        "xaxis3": {"domain": [0.6, 1], "anchor": "y3", "title": {"text": "tensor"}, "type": "category"},
        "yaxis3": {"anchor": "x3", "title": {"text": "expert"}, "type": "category", "autorange": "reversed"},
        "showlegend": False,
    }
    title = f"{view.run}: step {view.step}, {record.loss.split(' (')[0]} {loss[view.step]:.2f}, {y} {now:.3f}"
    return figure(traces, title=title, x="step of Adam", height=420, **layout)


def frank_wolfe_figure(view: FrankWolfeView, *, y: str = "accuracy") -> go.Figure:
    """Draw one run of Frank-Wolfe: pools of all sizes, gap and loss, and where every step went.

    Args:
        view: from `frank_wolfe_view`.
        y: what the score measures, with its unit.
    """
    path = view.path
    traces = []
    for i, (method, rows) in enumerate(view.curve.groupby("method", sort=False)):
        colour, dash = (NEUTRAL, PALETTE[1], PALETTE[0], PALETTE[3])[i % 4], ("dot", "dash", "solid", "dashdot")[i % 4]
        traces.append(_line(rows["pool"].to_numpy(), rows["score"].to_numpy(), colour, dash, name=method, listed=True))
    diamond = {"color": PALETTE[2], "size": 12, "symbol": "diamond"}
    here = {"type": "scatter", "mode": "markers", "marker": diamond, "name": "these settings"}
    traces.append(here | {"x": np.array([view.pool]), "y": np.array([view.score])})
    loss = path.losses.mean(1).numpy()
    low = {"xaxis": "x2", "yaxis": "y2", "legend": "legend2"}
    traces.append(_line(np.arange(len(loss)), loss, PALETTE[5], name="loss (nats)", listed=True, **low))
    traces.append(
        _line(np.arange(len(path.gaps)), path.gaps.numpy(), PALETTE[4], "dash", name="gap", listed=True, **low)
    )
    traces += _walk(view, "x3", "y3")
    layout = {
        "xaxis": {
            "domain": [0, 0.42],
            "dtick": 1,
            "anchor": "y",
            "title": {"text": "models in the pool", "standoff": 4},
        },
        "yaxis": {"domain": [0.64, 1]},
        "xaxis2": {"domain": [0, 0.42], "anchor": "y2", "title": {"text": "step"}},
        "yaxis2": {"domain": [0, 0.34], "anchor": "x2", "title": {"text": "loss, gap"}, "rangemode": "tozero"},
        "xaxis3": {"domain": [0.58, 1], "anchor": "y3", "title": {"text": "model of the pool"}} | _names(view.names),
        "yaxis3": {"anchor": "x3", "title": {"text": "after step"}, "autorange": "reversed"},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        "legend2": {"orientation": "h", "x": 0, "xanchor": "left", "y": 0.345, "yanchor": "bottom"},
        "margin": {"l": 64, "r": 24, "t": 100, "b": 60},
    }
    title = f"pool of {view.pool}: {y} {view.score:.3f} after {len(path.gaps)} steps"
    return figure(traces, title=title, y=y, height=500, **layout)


def _names(names: Sequence[str]) -> dict:
    return {"tickvals": np.arange(len(names)), "ticktext": list(names), "showgrid": False}


def _walk(view: FrankWolfeView, xaxis: str, yaxis: str) -> list[dict]:
    """Coefficients after each step, and a dot (as large as the share of layers) at what was picked."""
    path = view.path
    coefficients = path.coefficients.mean(1).numpy()
    hover = "model %{x}, after step %{y}: %{z:.0%}<extra></extra>"
    axes = {"xaxis": xaxis, "yaxis": yaxis}
    cells = heatmap(coefficients, limit=(0.0, 1.0), label="share of the model", **axes)
    cells["hovertemplate"] = hover
    n = len(view.names) - 1
    x, y, size = [], [], []
    for step, picks in enumerate(path.picks.flatten(1).numpy()):
        vertices, counts = np.unique(picks, return_counts=True)
        x += [v + 1 if v < n else 0 for v in vertices]
        y += [step + 1] * len(vertices)
        size += (4 + 8 * counts / counts.sum()).tolist()
    marker = {"color": "#FFFFFF", "size": np.array(size), "line": {"color": "#000000", "width": 1}}
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": np.array(x),
        "y": np.array(y),
        "marker": marker,
        "name": "picked",
    }
    return [cells, dots | axes | {"hovertemplate": "step %{y} goes to model %{x}<extra></extra>", "showlegend": False}]


def triangle_figure(
    shares, losses, path, *, names: Sequence[str], title: str = "", label: str = "loss (nats)"
) -> go.Figure:
    """Draw a walk over the triangle between three models, on top of the losses there.

    Args:
        shares: Float[points, 3], from `loss_triangle`.
        losses: Float[points].
        path: shares of the corners after each step, Float[steps + 1, 3].
        names: of the corners.
        title: of the picture.
        label: what the losses are, with their unit.
    """
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
    ground, walk = np.asarray(shares) @ corners, np.asarray(path) @ corners
    bar = {"title": {"text": label, "side": "right"}, "thickness": 12, "outlinewidth": 0}
    dots = {"color": np.asarray(losses), "colorscale": "Cividis", "size": 17, "symbol": "hexagon", "colorbar": bar}
    hover = {"customdata": np.asarray(shares), "hovertemplate": _shares_text(names)}
    field = {"type": "scatter", "mode": "markers", "x": ground[:, 0], "y": ground[:, 1], "marker": dots, **hover}
    steps = {"type": "scatter", "mode": "lines+markers", "x": walk[:, 0], "y": walk[:, 1], "name": "path"}
    marks = {"color": np.full(len(walk), "#FFFFFF"), "size": 9, "line": {"color": "#000000", "width": 1.5}}
    steps |= {"line": {"color": PALETTE[5], "width": 2.5}, "marker": marks, "customdata": np.asarray(path)}
    steps |= {"hovertemplate": "step %{pointNumber}<br>" + _shares_text(names)}
    end = {"type": "scatter", "mode": "markers", "x": walk[-1:, 0], "y": walk[-1:, 1], "hoverinfo": "skip"}
    end |= {"marker": {"color": PALETTE[5], "size": 16, "symbol": "star", "line": {"color": "#FFFFFF", "width": 1}}}
    places = zip(names, corners, ("top", "top", "bottom"), strict=True)
    words = [
        {"text": name, "x": x, "y": y, "showarrow": False, "yanchor": anchor, "yshift": -14 if anchor == "top" else 14}
        for name, (x, y), anchor in places
    ]
    bare = {"showgrid": False, "zeroline": False, "showticklabels": False}
    layout = {
        "xaxis": bare | {"range": [-0.15, 1.15]},
        "yaxis": bare | {"range": [-0.13, 1.0], "scaleanchor": "x"},
        "annotations": words,
        "showlegend": False,
    }
    return figure([field, steps, end], title=title, height=430, **layout)


def _shares_text(names: Sequence[str]) -> str:
    return "<br>".join(f"{name} %{{customdata[{i}]:.0%}}" for i, name in enumerate(names)) + "<extra></extra>"


def niche_figure(view: NicheView) -> go.Figure:
    """Draw one moment of an archive: who solves what, who is fit, how the last child was mixed, and all curves.

    Args:
        view: from `niche_view`.
    """
    record, snapshot, birth = view.record, view.snapshot, view.snapshot.birth
    members = np.arange(len(snapshot.fitness))
    classes, first = np.unique(record.labels, return_index=True)
    middle = (first + np.append(first[1:], len(record.labels))) / 2
    hover = "member %{y}, point %{x}: %{z}<extra></extra>"
    cells = heatmap(snapshot.scores, limit=(0.0, 1.0), showscale=False, hovertemplate=hover)
    colours = np.full(len(members), NEUTRAL, dtype=object)
    if birth is not None:
        colours[list(birth.parents)] = PALETTE[0]
        if birth.replaced is not None:
            colours[birth.replaced] = PALETTE[5]
    bars = {"type": "bar", "orientation": "h", "x": snapshot.fitness, "y": members, "marker": {"color": list(colours)}}
    bars |= {"xaxis": "x2", "yaxis": "y2", "hovertemplate": "member %{y}: %{x:.1f} points<extra></extra>"}
    traces = [cells, bars | {"showlegend": False}]
    traces += _curves(view, "coverage", "x3", "y3", listed=True)
    column, measured = ("test", "test accuracy") if "test" in record.curves else ("best", "best score")
    traces += _curves(view, column, "x4", "y4")
    traces += _mixture(view, "x5", "y5")
    top, bottom = [0.5, 1], [0, 0.3]
    rows = {"autorange": "reversed", "domain": top, "dtick": 5}
    layout = {
        "xaxis": {
            "domain": [0, 0.74],
            "tickvals": middle,
            "ticktext": [str(c) for c in classes],
            "showgrid": False,
        },
        "yaxis": rows,
        "xaxis2": {"domain": [0.8, 1], "anchor": "y2", "title": {"text": "fitness (points)"}},
        "yaxis2": rows | {"anchor": "x2", "showticklabels": False},
        "xaxis3": {"domain": [0, 0.25], "anchor": "y3", "title": {"text": "evaluations"}},
        "yaxis3": {"domain": bottom, "anchor": "x3", "title": {"text": "coverage"}},
        "xaxis4": {"domain": [0.36, 0.61], "anchor": "y4", "title": {"text": "evaluations"}},
        "yaxis4": {"domain": bottom, "anchor": "x4", "title": {"text": measured}},
        "xaxis5": {
            "domain": [0.72, 1],
            "anchor": "y5",
            "title": {"text": "parameter"},
            "range": [0, record.d],
            "nticks": 4,
        },
        "yaxis5": {"domain": bottom, "anchor": "x5", "title": {"text": "t of the child"}, "range": [-0.05, 1.05]},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 0.31, "yanchor": "bottom"},
        "shapes": _borders(record, first[1:] - 0.5),
        "margin": {"l": 64, "r": 24, "t": 44, "b": 52},
    }
    return figure(
        traces, title=_title(view), x="points, by their digit (bright: solved)", y="member", height=620, **layout
    )


def _title(view: NicheView) -> str:
    snapshot, birth = view.snapshot, view.snapshot.birth
    title = f"{view.variant}, {snapshot.evaluations} evaluations"
    if birth is None:
        return title + ": only the experts"
    a, b = birth.parents
    fate = "is discarded" if birth.replaced is None else f"takes row {birth.replaced} (red)"
    pair = f"{a} mates itself" if a == b else f"{a} and {b} mate (blue)"
    return f"{title}: {pair}, the child {fate}"


def _curves(view: NicheView, column: str, xaxis: str, yaxis: str, listed: bool = False) -> list[dict]:
    traces = []
    for i, (name, curves) in enumerate(view.curves.items()):
        x, y = curves["evaluations"].to_numpy(), curves[column].to_numpy()
        colour = (PALETTE[2], PALETTE[1], PALETTE[3], NEUTRAL)[i % 4]
        traces.append(_line(x, y, colour, DASHES[i % 4], name=name, listed=listed, xaxis=xaxis, yaxis=yaxis))
        if name == view.variant:
            at = int(np.searchsorted(x, view.snapshot.evaluations))
            ring = _ring(x[at], y[at], colour, xaxis=xaxis, yaxis=yaxis)
    return [*traces, ring]


def _mixture(view: NicheView, xaxis: str, yaxis: str) -> list[dict]:
    birth, d = view.snapshot.birth, view.record.d
    x = np.array([0, d]) if birth is None else np.array([0, birth.split, birth.split, d])
    y = np.full(2, np.nan) if birth is None else np.array([birth.w, birth.w, 1 - birth.w, 1 - birth.w])
    return [_line(x, y, PALETTE[5], name="t", xaxis=xaxis, yaxis=yaxis)]


def _borders(record, points) -> list[dict]:
    line = {"color": "rgba(255,255,255,0.55)", "width": 1}
    digits = [{"type": "line", "x0": x, "x1": x, "y0": 0.5, "y1": 1, "yref": "paper", "line": line} for x in points]
    place = {"xref": "x5", "yref": "y5", "y0": -0.05, "y1": 1.05, "line": {"color": GRID, "width": 1, "dash": "dot"}}
    return digits + [{"type": "line", "x0": x, "x1": x, **place} for x in record.layers.values() if x]


def search_figure(curves: Mapping[str, Sequence[float]], *, title: str = "", y: str = "best score so far") -> go.Figure:
    """Draw the best score so far of several searches against evaluations.

    Args:
        curves: name to Float[evaluations].
        title: of the picture.
        y: what the score measures, with its unit.
    """
    traces = []
    for i, (name, curve) in enumerate(curves.items()):
        values = np.asarray(curve, dtype=float)
        x, colour = np.arange(1, len(values) + 1), PALETTE[i % len(PALETTE)]
        traces.append(_line(x, values, colour, DASHES[i % 4], name=name, listed=True))
    return figure(traces, title=title, x="evaluations", y=y, height=340)


def _line(x, y, colour: str, dash: str = "solid", *, name: str = "", listed: bool = False, **axes) -> dict:
    line = {"color": colour, "dash": dash, "width": 2}
    return {"type": "scatter", "mode": "lines", "x": np.asarray(x), "y": np.asarray(y), "line": line} | {
        "name": name,
        "showlegend": listed,
        **axes,
    }


def _ring(x, y, colour: str, **axes) -> dict:
    marker = {"symbol": "circle-open", "size": 13, "color": colour, "line": {"width": 2.5}}
    point = {"type": "scatter", "mode": "markers", "x": np.array([x]), "y": np.array([y]), "marker": marker}
    return point | {"showlegend": False, "hoverinfo": "skip", **axes}
