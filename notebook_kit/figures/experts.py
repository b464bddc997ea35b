"""Pictures of expert merging: usage by group, similarity ordered by group, and loss against experts kept."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from notebook_kit.diagnostics.expert_compression import CompressionView
from notebook_kit.diagnostics.experts import METHODS, ExpertMergeView
from notebook_kit.figures.style import GRID, NEUTRAL, PALETTE, figure, heatmap


def usage_figure(usage, groups: Sequence[Sequence[int]], *, title: str = "") -> go.Figure:
    """Draw how much each expert is used, in the colour of its group; experts in no group are grey.

    Args:
        usage: shares of the routed slots, Float[experts].
        groups: experts, group by group, the dominant one first.
        title: of the picture.
    """
    return figure([_usage_bars(np.asarray(usage), groups)], title=title, x="expert, group by group", y="share of slots")


def experts_similarity_figure(similarity, groups: Sequence[Sequence[int]], *, title: str = "") -> go.Figure:
    """Draw how alike experts are, ordered by group, with a frame around each group.

    Args:
        similarity: S in [0, 1], Float[experts, experts].
        groups: experts, group by group.
        title: of the picture.
    """
    trace, shapes, names = _similarity(np.asarray(similarity), groups)
    return figure(
        [trace], title=title, x="expert", y="expert", height=380, shapes=shapes, yaxis=_ticks(names, reverse=True),
        xaxis=_ticks(names),
    )  # fmt: skip


def experts_score_figure(
    frame: pd.DataFrame, *, title: str = "", y: str = "log-likelihood (nats per byte)"
) -> go.Figure:
    """Draw score against experts kept, one line a method.

    Args:
        frame: from `compare_expert_merges`; rows with the same method and n_experts (seeds) are averaged, and their
            spread is drawn.
        title: of the picture.
        y: what the score measures, with its unit.
    """
    traces = []
    for number, (method, rows) in enumerate(frame.groupby("method", sort=False)):
        table = rows.groupby("n_experts")["score"].agg(["mean", "min", "max"])
        line = {"color": PALETTE[number % len(PALETTE)], "dash": ("solid", "dash", "dot", "dashdot")[number % 4]}
        spread = {"type": "data", "symmetric": False, "array": (table["max"] - table["mean"]).to_numpy()}
        spread |= {"arrayminus": (table["mean"] - table["min"]).to_numpy(), "thickness": 1}
        values = {"x": table.index.to_numpy(), "y": table["mean"].to_numpy(), "name": str(method)}
        traces.append({"type": "scatter", "mode": "lines+markers", "line": line, "error_y": spread, **values})
    ticks = {"tickvals": sorted(frame["n_experts"].unique().tolist())}
    return figure(traces, title=title, x="experts stored per layer", y=y, xaxis=ticks, **_room_for(traces))


def experts_memory_figure(
    frame: pd.DataFrame, *, title: str = "", y: str = "log-likelihood (nats per byte)"
) -> go.Figure:
    """Draw score against what experts store, one line a method.

    Args:
        frame: columns method, memory (share of the original's), score; seeds are averaged, as in
            `experts_score_figure`.
        title: of the picture.
        y: what the score measures, with its unit.
    """
    traces = []
    for number, (method, rows) in enumerate(frame.groupby("method", sort=False)):
        table = rows.groupby(rows["memory"].round(4))["score"].mean()
        line = {"color": PALETTE[number % len(PALETTE)], "dash": ("solid", "dash", "dot", "dashdot")[number % 4]}
        values = {"x": table.index.to_numpy(), "y": table.to_numpy(), "name": str(method)}
        mode = "lines+markers" if len(table) > 1 else "markers"
        traces.append({"type": "scatter", "mode": mode, "line": line, "marker": {"size": 8}, **values})
    ticks = {"tickformat": ".0%", "rangemode": "tozero"}
    x = "stored by the experts, share of the original"
    return figure(traces, title=title, x=x, y=y, xaxis=ticks, **_room_for(traces))


def _room_for(traces: Sequence[dict]) -> dict:
    """A legend of many names takes several lines: the picture grows, so that it stays clear of the title."""
    more = 22 * ((len(traces) - 1) // 3)
    return {"height": 380 + more, "margin": {"l": 64, "r": 24, "t": 70 + more, "b": 52}}


def dendrogram_figure(joins, n_experts: int, *, title: str = "", y: str = "distance of mean outputs") -> go.Figure:
    """Draw how experts join bottom up, with the cut that leaves n_experts groups.

    Args:
        joins: scipy's linkage matrix, from `linkage_of`.
        n_experts: groups that are left; those above the cut are apart.
        title: of the picture.
        y: what the height measures, with its unit.
    """
    traces, order, cut = _dendrogram(np.asarray(joins), n_experts)
    ticks = {"tickvals": list(range(len(order))), "ticktext": [str(e) for e in order], "showgrid": False}
    shapes = [_cut_line(cut, "x", "y", len(order))] if cut is not None else []
    return figure(traces, title=title, x="expert", y=y, xaxis=ticks, yaxis={"rangemode": "tozero"}, shapes=shapes)


def subset_losses_figure(frame: pd.DataFrame, *, title: str = "", most: int = 70) -> go.Figure:
    """Draw the loss of every set of experts that could stay, best first.

    Args:
        frame: from `subset_losses_frame`.
        title: of the picture.
        most: bars drawn.
    """
    rows = frame.head(most)
    names = [" ".join(map(str, kept)) for kept in rows["kept"]]
    colours = [PALETTE[2], *[NEUTRAL] * (len(rows) - 1)]
    bars = {"type": "bar", "x": np.arange(1, len(rows) + 1), "y": rows["loss"].to_numpy(), "customdata": names}
    bars |= {"marker": {"color": colours}, "hovertemplate": "keep %{customdata}: %{y:.3f}<extra></extra>"}
    axes = {"x": "set of experts that stays, best first", "y": "error of the layer's output (norm)"}
    return figure([bars], title=title, **axes)


def expert_merge_figure(
    view: ExpertMergeView, score: float | None = None, *, seen: Sequence[tuple[int, str, bool, float]] = ()
) -> go.Figure:
    """Draw one look at a merge of experts: usage by group, similarity ordered by group (or how experts join).

    Args:
        view: from `expert_merge_view`.
        score: of the merged model; added to the title.
        seen: earlier merges as (parameters, method, aligned, score): drawn below, score against memory.
    """
    groups = [*view.groups, *((expert,) for expert in view.dropped)]
    bars = _usage_bars(view.usage, view.groups, view.order)
    before, after = view.parameters
    title = f"{view.layer}: {len(view.usage)} experts become {len(view.groups)}; expert parameters {after / before:.0%}"
    if score is not None:
        title += f"; score {float(score):.3f}"
    low = 0.56 if seen else 0.0  # where the upper row begins
    second = {"domain": [low, 1], "anchor": "x2"}
    if view.joins is None:
        trace, shapes, names = _similarity(view.similarity, groups, axes=("x2", "y2"))
        trace["colorbar"] |= {"len": 1 - low, "y": (1 + low) / 2}
        right = [trace]
        x2, y2 = _ticks(names), {"title": {"text": "expert"}, **_ticks(names, reverse=True)}
    else:
        right, order, cut = _dendrogram(view.joins, len(view.groups), axes=("x2", "y2"))
        shapes = [_cut_line(cut, "x2", "y2", len(order))] if cut is not None else []
        x2 = {"tickvals": list(range(len(order))), "ticktext": [str(e) for e in order], "showgrid": False}
        y2 = {"title": {"text": "distance of mean outputs"}, "rangemode": "tozero", "gridcolor": GRID}
    layout = {
        "xaxis": {"domain": [0, 0.5], "type": "category", "anchor": "y"},
        "yaxis": {"domain": [low, 1], "anchor": "x"},
        "xaxis2": {"title": {"text": "expert"}, "domain": [0.62, 0.96], "anchor": "y2", **x2},
        "yaxis2": second | y2,
        "shapes": shapes,
    }
    lower = []
    if seen:
        lower = _seen(seen, before)
        layout["xaxis3"] = {"title": {"text": "stored by the experts, share of the original"}, "tickformat": ".0%"}
        layout["xaxis3"] |= {"domain": [0, 0.96], "anchor": "y3", "range": [0, 1.05], "gridcolor": GRID}
        layout["yaxis3"] = {"title": {"text": "score"}, "domain": [0, 0.34], "anchor": "x3", "gridcolor": GRID}
    return figure(
        [bars, *right, *lower], title=title, x="expert, group by group", y="share of routed slots",
        height=600 if seen else 380, **layout,
    )  # fmt: skip


def compression_figure(view: CompressionView, score: float | None = None) -> go.Figure:
    """Draw one look at compressed experts: a spectrum with the rank's cut, and what is stored.

    Args:
        view: from `compression_view`.
        score: of the compressed model; added to the title.
    """
    place = np.arange(1, len(view.spectrum) + 1)
    kept = place <= view.rank
    spectrum = [
        {"x": place[part], "y": view.spectrum[part], "name": name, "marker": {"color": colour}}
        for part, name, colour in ((kept, "in L R", PALETTE[0]), (~kept, "left to S", NEUTRAL))
    ]
    bars = [{"type": "bar", "showlegend": False, **one} for one in spectrum]
    shares = {"before": 1.0, **{name: n / view.before for name, n in view.stored.items()}}
    bars.append(
        {
            "type": "bar",
            "x": list(shares),
            "y": np.array(list(shares.values())),
            "marker": {"color": [NEUTRAL, PALETTE[0], PALETTE[1]]},
            "text": [f"{share:.0%}" for share in shares.values()],
            "textposition": "outside",
            "cliponaxis": False,
            "showlegend": False,
            "xaxis": "x2",
            "yaxis": "y2",
        }
    )
    memory, flops = sum(view.stored.values()) / view.before, view.flops[1] / view.flops[0]
    title = f"experts store {memory:.0%} and compute {flops:.0%} of before"
    if score is not None:
        title += f"; score {float(score):.3f}"
    layout = {
        "xaxis": {"domain": [0, 0.52], "anchor": "y"},
        "xaxis2": {"title": {"text": "what is stored"}, "domain": [0.64, 1], "anchor": "y2", "type": "category"},
        "yaxis2": {"title": {"text": "share of the original"}, "anchor": "x2", "tickformat": ".0%", "range": [0, 1.15]},
        "barmode": "overlay",
    }
    return figure(bars, title=title, x=f"singular value of {view.name}", y="size", **layout)


def _seen(seen: Sequence[tuple[int, str, bool, float]], before: int) -> list[dict]:
    """Score against memory: a colour a method, a full dot where units were aligned; the newest is ringed."""
    traces = []
    for number, method in enumerate(METHODS):
        rows = [row for row in seen if row[1] == method]
        symbols = ["circle" if row[2] else "x" for row in rows]
        marker = {"color": PALETTE[number], "symbol": symbols, "size": [13 if row == seen[-1] else 8 for row in rows]}
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": np.array([row[0] / before for row in rows]),
                "y": np.array([row[3] for row in rows]),
                "marker": marker,
                "name": method,
                "showlegend": False,
                "text": ["aligned" if row[2] else "not aligned" for row in rows],
                "hovertemplate": method + ", %{text}: %{y:.3f} at %{x:.0%}<extra></extra>",
                "xaxis": "x3",
                "yaxis": "y3",
            }
        )
    return traces


def _dendrogram(joins: np.ndarray, n_experts: int, axes: tuple[str, str] = ("x", "y")):
    """Lines of a dendrogram, the order of its leaves, and the height of the cut (None where nothing joins)."""
    n = len(joins) + 1
    members = {i: [i] for i in range(n)}
    for step, (a, b, *_) in enumerate(joins):
        members[n + step] = members[int(a)] + members[int(b)]
    order = members[2 * n - 2]
    spot = {leaf: (float(place), 0.0) for place, leaf in enumerate(order)}
    below, above = ([], []), ([], [])
    for step, (a, b, height, _) in enumerate(joins):
        (xa, ya), (xb, yb) = spot[int(a)], spot[int(b)]
        xs, ys = below if step < n - n_experts else above
        xs += [xa, xa, xb, xb, None]
        ys += [ya, height, height, yb, None]
        spot[n + step] = ((xa + xb) / 2, float(height))
    traces = []
    for (xs, ys), colour, name in ((below, PALETTE[0], "joined"), (above, NEUTRAL, "kept apart")):
        lines = {"type": "scatter", "mode": "lines", "x": xs, "y": ys, "line": {"color": colour, "width": 2}}
        traces.append(lines | {"name": name, "hoverinfo": "y", "showlegend": False, "xaxis": axes[0], "yaxis": axes[1]})
    heights = [0.0, *joins[:, 2], float(joins[-1, 2]) * 1.08] if n > 1 else [0.0]
    cut = (heights[n - n_experts] + heights[n - n_experts + 1]) / 2 if n > 1 else None
    return traces, order, cut


def _cut_line(height: float, x: str, y: str, n: int) -> dict:
    line = {"color": PALETTE[5], "width": 2, "dash": "dash"}
    return {"type": "line", "x0": -0.5, "x1": n - 0.5, "y0": height, "y1": height, "xref": x, "yref": y, "line": line}


def _usage_bars(usage: np.ndarray, groups: Sequence[Sequence[int]], order: Sequence[int] | None = None) -> dict:
    order = list(range(len(usage))) if order is None else order
    place = {expert: number for number, group in enumerate(groups) for expert in group}
    leaders = {group[0] for group in groups}
    order = sorted(order, key=lambda expert: (place.get(expert, len(groups)), expert not in leaders, expert))
    colours = [PALETTE[place[e] % (len(PALETTE) - 1)] if e in place else NEUTRAL for e in order]
    labels = [f"group {place[e]}" + (", leads" if e in leaders else "") if e in place else "deleted" for e in order]
    marker = {"color": colours, "line": {"width": [2.5 if e in leaders else 0 for e in order], "color": "#8A8A8A"}}
    return {
        "type": "bar",
        "x": [str(e) for e in order],
        "y": usage[order],
        "marker": marker,
        "text": [str(place[e]) if e in place else "×" for e in order],
        "textposition": "outside",
        "cliponaxis": False,
        "customdata": labels,
        "hovertemplate": "expert %{x}: %{y:.1%}, %{customdata}<extra></extra>",
        "showlegend": False,
    }


def _similarity(s: np.ndarray, groups: Sequence[Sequence[int]], axes: tuple[str, str] = ("x", "y")):
    order = [expert for group in groups for expert in group]
    trace = heatmap(
        s[np.ix_(order, order)], limit=(float(s.min()), 1.0), label="similarity", xaxis=axes[0], yaxis=axes[1]
    )
    shapes, start = [], 0
    for group in groups:
        low, high = start - 0.5, start + len(group) - 0.5
        start += len(group)
        box = {"x0": low, "x1": high, "y0": low, "y1": high, "xref": axes[0], "yref": axes[1]}
        shapes.append({"type": "rect", "line": {"color": PALETTE[5], "width": 2}, **box})
    return trace, shapes, [str(expert) for expert in order]


def _ticks(names: Sequence[str], *, reverse: bool = False) -> dict:
    ticks = {"tickvals": list(range(len(names))), "ticktext": list(names), "gridcolor": GRID}
    return ticks | ({"autorange": "reversed"} if reverse else {})
