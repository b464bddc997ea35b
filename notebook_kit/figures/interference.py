"""Pictures of interference: conflicts of sign, parameters that compete, masks and their claims."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Int

from notebook_kit.diagnostics.interference import MODEL, ConflictView, PatchView, PcbView, TallView
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap

BESIDE = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
GREY = {"color": NEUTRAL, "opacity": 0.35}
TASKS = (*PALETTE[:7], "#882255")  # grey is for what was dropped


def conflict_figure(view: ConflictView) -> go.Figure:
    """Draw where experts disagree, tensor by tensor, and how disagreement grows with their number.

    Args:
        view: from `conflict_view`.
    """
    frame = view.frame[view.frame["tensor"] != MODEL]
    bars = {"type": "bar", "x": frame["tensor"].tolist(), "y": frame["conflict"].to_numpy(), "showlegend": False}
    x = view.curve["experts"].to_numpy()
    line = {"type": "scatter", "mode": "lines+markers", "x": x, "xaxis": "x2", "yaxis": "y2"}
    traces = [
        bars | {"marker": {"color": PALETTE[0]}},
        line | {"y": view.curve["conflict"].to_numpy(), "name": "weights in conflict", "line": {"color": PALETTE[0]}},
        line | {"y": view.curve["lost"].to_numpy(), "name": "mass that cancels", "line": {"color": PALETTE[5]}},
    ]
    layout = {
        "xaxis": {"domain": [0, 0.46]},
        "yaxis": {"range": [0, 1]},
        "xaxis2": {"title": {"text": "experts"}, "domain": [0.58, 1], "anchor": "y2", "dtick": 1},
        "yaxis2": {"title": {"text": "share"}, "anchor": "x2", "range": [0, 1]},
        "legend": BESIDE,
    }
    title = f"{view.n_experts} experts, largest {100 * view.density:.0f} % of each task vector"
    return figure(traces, title=title, x="tensor", y="share of weights in conflict", height=400, **layout)


def patch_figure(view: PatchView) -> go.Figure:
    """Draw two task vectors, the elected sign and the merged task vector, on the same few weights.

    Args:
        view: from `patch_view`.
    """
    top = float(max(np.abs(view.first).max(), np.abs(view.second).max(), np.abs(view.merged).max(), 1e-12))
    panels = [(view.names[0], view.first), (view.names[1], view.second), ("elected sign", view.sign)]
    panels.append(("merged", view.merged))
    traces, layout, notes = [], {}, []
    for i, (name, z) in enumerate(panels):
        axis = "" if i == 0 else str(i + 1)
        # The sign has its own unit: its full colours are -1 and +1.
        scale = {"limit": 1.0 if name == "elected sign" else top, "showscale": i == 3}
        where = {"xaxis": f"x{axis}", "yaxis": f"y{axis}", "xgap": 1, "ygap": 1}
        traces.append(heatmap(z, signed=True, label="change of the weight", **scale, **where))
        left = i * 0.255
        layout[f"xaxis{axis}"] = {"domain": [left, left + 0.22], "anchor": f"y{axis}", "title": {"text": "input"}}
        layout[f"yaxis{axis}"] = {"anchor": f"x{axis}", "autorange": "reversed", "showticklabels": i == 0}
        note = {"text": name, "x": left + 0.11, "y": 1.0, "xref": "paper", "yref": "paper"}
        notes.append(note | {"xanchor": "center", "yanchor": "bottom", "showarrow": False})
    top_margin = {"l": 64, "r": 24, "t": 66, "b": 52}
    title = f"{view.tensor}: its first {view.first.shape[0]} outputs and {view.first.shape[1]} inputs"
    return figure(traces, title=title, y="output", height=310, annotations=notes, margin=top_margin, **layout)


def pcb_figure(view: PcbView, *, y: str = "score") -> go.Figure:
    """Draw who wins the competition of parameters: scores, what the merge does on each task, how many keep a weight.

    Args:
        view: from `pcb_view`.
        y: what the score measures, with its unit.
    """
    largest = float(np.abs(view.inter).max()) or 1.0
    # Agreement is a product of two small numbers: its square root is on the scale of one.
    height = np.sign(view.inter) * np.sqrt(np.abs(view.inter) / largest)
    dot = {"type": "scatter", "mode": "markers", "showlegend": False}
    dropped, colours = ~view.kept, [TASKS[i % len(TASKS)] for i in range(len(view.names))]
    traces = [dot | {"x": view.intra[dropped], "y": height[dropped], "name": "dropped", "marker": GREY | {"size": 4}}]
    for i, name in enumerate(view.names):
        mine = view.kept & (view.expert == i)
        traces.append(dot | {"x": view.intra[mine], "y": height[mine], "name": name, "marker": {"color": colours[i]}})
    # The bars of the tasks are the legend too.
    tasks = getattr(view.score, "tasks", dict.fromkeys(view.names, 1.0))
    bars = {"type": "bar", "x": list(tasks), "y": np.array(list(tasks.values())), "showlegend": False}
    traces.append(bars | {"marker": {"color": colours[: len(tasks)]}, "xaxis": "x2", "yaxis": "y2"})
    share = view.claims / max(1, view.claims.sum())
    counts = {"type": "bar", "x": np.arange(len(share)), "y": share, "showlegend": False}
    traces.append(counts | {"marker": {"color": NEUTRAL}, "xaxis": "x3", "yaxis": "y3"})
    score_axis = {"domain": [0.66, 1], "anchor": "x2", "range": [0, 1.02]}
    score_axis |= {"title": {"text": y}} if view.score is not None else {"title": {"text": ""}, "showticklabels": False}
    layout = {
        "xaxis": {"type": "log", "domain": [0, 0.54], "exponentformat": "power", "dtick": 1},
        "yaxis": {"range": [-1.05, 1.05]},
        "xaxis2": {"domain": [0.66, 1], "anchor": "y2", "tickfont": {"size": 11}, "tickangle": -40},
        "yaxis2": score_axis,
        "xaxis3": {"title": {"text": "tasks that keep a weight"}, "domain": [0.66, 1], "anchor": "y3", "dtick": 1},
        "yaxis3": {"title": {"text": "share of weights"}, "domain": [0, 0.32], "anchor": "x3", "rangemode": "tozero"},
    }
    mean = "" if view.score is None else f"; merged: mean {float(view.score):.3f}"
    title = f"Kept: {100 * view.kept.mean():.0f} % of the sample, coloured by task{mean}"
    axes = {"x": "intra: importance in its task", "y": "inter: agreement (signed root, 1 = best)"}
    return figure(traces, title=title, height=480, **axes, **layout)


def tall_figure(view: TallView, *, y: str = "accuracy") -> go.Figure:
    """Draw what masks rescue on each task, and how many tasks claim a weight, with what the consensus deletes.

    Args:
        view: from `tall_view`.
        y: what the score measures, with its unit.
    """
    points = {"type": "scatter", "mode": "markers", "x": view.names}
    ring = {"size": 10, "line": {"width": 1, "color": NEUTRAL}}
    traces = [
        {"type": "bar", "x": view.names, "y": view.masked, "name": "masked", "marker": {"color": PALETTE[0]}},
        points | {"y": view.own, "name": "its expert", "marker": ring | {"symbol": "diamond", "color": PALETTE[1]}},
        points
        | {"y": view.unmasked, "name": "no mask", "marker": ring | {"symbol": "x", "color": PALETTE[5], "size": 8}},
        points | {"y": view.consensus, "name": "consensus", "marker": ring | {"symbol": "circle", "color": PALETTE[2]}},
        *_claim_bars(view.claims, view.k, xaxis="x2", yaxis="y2"),
    ]
    note = {"y": 0, "xref": "x2", "yref": "y2", "textangle": -90, "yanchor": "bottom", "showarrow": False}
    notes = [note | {"x": x, "text": f" {word}"} for x, word in enumerate(("catastrophic", "selfish"))]
    layout = {
        "xaxis": {"domain": [0, 0.54]},
        "yaxis": {"range": [0, 1.02]},
        "xaxis2": {"title": {"text": "tasks that claim a weight"}, "domain": [0.67, 1], "anchor": "y2", "dtick": 1},
        "yaxis2": {"title": {"text": "share of weights"}, "anchor": "x2", "rangemode": "tozero"},
        "legend": BESIDE,
    }
    title = (
        f"masked {view.masked.mean():.3f}, experts {view.own.mean():.3f}, no mask {view.unmasked.mean():.3f}, "
        f"consensus {view.consensus.mean():.3f}"
    )
    return figure(traces, title=title, x="task", y=y, height=420, barmode="stack", annotations=notes, **layout)


def _claim_bars(claims: Int[np.ndarray, " counts"], k: int, **axes) -> list[dict]:
    n, share = np.arange(len(claims)), claims / max(1, claims.sum())
    colours = [PALETTE[5], PALETTE[1], *[PALETTE[4]] * (len(claims) - 2)][: len(claims)]
    bars = {"type": "bar", "x": n, "y": share, "showlegend": False}
    look = {"color": colours, "opacity": np.where(n >= k, 1.0, 0.3)}
    cut = {"type": "scatter", "mode": "lines", "x": np.full(2, k - 0.5), "y": np.array([0, share.max() * 1.05])}
    line = cut | {"showlegend": False, "line": {"color": NEUTRAL, "dash": "dot"}}
    return [bars | {"marker": look} | axes, line | axes]


def owners_figure(owner: Int[np.ndarray, "rows columns"], names: Sequence[str], *, title: str = "") -> go.Figure:
    """Draw whose each weight is.

    Args:
        owner: from `owners`: −1 nobody's, i expert i's alone, the number of names several experts'.
        names: of the experts.
        title: of the picture.
    """
    labels = ["nobody", *names, "several"]
    colours = ["#FFFFFF", *(TASKS[i % len(TASKS)] for i in range(len(names))), "#404040"]
    n = len(labels)
    scale = [[edge, colour] for i, colour in enumerate(colours) for edge in (i / n, (i + 1) / n)]
    bar = {"tickvals": list(range(-1, n - 1)), "ticktext": labels, "thickness": 14, "outlinewidth": 0}
    trace = heatmap(owner, limit=(-1.5, n - 1.5), xgap=1, ygap=1) | {"colorscale": scale, "colorbar": bar}
    return figure([trace], title=title, x="input", y="output", height=420, yaxis={"autorange": "reversed"})


def kept_figure(curves: Mapping[str, Mapping[float, float]], *, title: str = "", y: str = "accuracy") -> go.Figure:
    """Draw what is left of experts when part of their task vectors is dropped, a line for each way to drop.

    Args:
        curves: way to drop -> density -> score.
        title: of the picture.
        y: what the score measures, with its unit.
    """
    line = {"type": "scatter", "mode": "lines+markers"}
    traces = [
        line | {"name": name, "x": np.array(list(curve)), "y": np.array(list(curve.values()))}
        for name, curve in curves.items()
    ]
    ticks = sorted({density for curve in curves.values() for density in curve})
    axis = {"type": "log", "tickvals": ticks, "ticktext": [f"{density:g}" for density in ticks]}
    return figure(traces, title=title, x="density (share kept)", y=y, xaxis=axis)


def search_figure(histories: Mapping[str, Sequence[float]], *, title: str = "", y: str = "score") -> go.Figure:
    """Draw the best score so far against the number of evaluations.

    Args:
        histories: run -> best score after each evaluation, as `pcb_search` returns it.
        title: of the picture.
        y: what the score measures, with its unit.
    """
    line = {"type": "scatter", "mode": "lines"}
    traces = [
        line | {"name": name, "x": np.arange(1, len(history) + 1), "y": np.array(history), "line": {"shape": "hv"}}
        for name, history in histories.items()
    ]
    return figure(traces, title=title, x="merges scored", y=y)
