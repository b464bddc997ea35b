"""Pictures of expert merging: usage by group, similarity ordered by group, and loss against experts kept."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from notebook_kit.diagnostics.experts import ExpertMergeView
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
    return figure(traces, title=title, x="experts stored per layer", y=y, xaxis=ticks)


def expert_merge_figure(view: ExpertMergeView, score: float | None = None) -> go.Figure:
    """Draw one look at a merge of experts: usage by group, and similarity ordered by group.

    Args:
        view: from `expert_merge_view`.
        score: of the merged model; added to the title.
    """
    groups = [*view.groups, *((expert,) for expert in view.dropped)]
    trace, shapes, names = _similarity(view.similarity, groups, axes=("x2", "y2"))
    bars = _usage_bars(view.usage, view.groups, view.order)
    before, after = view.parameters
    title = f"{view.layer}: {len(view.usage)} experts become {len(view.groups)}; expert parameters {after / before:.0%}"
    if score is not None:
        title += f"; score {float(score):.3f}"
    layout = {
        "xaxis": {"domain": [0, 0.5], "type": "category"},
        "xaxis2": {"title": {"text": "expert"}, "domain": [0.62, 0.96], "anchor": "y2", **_ticks(names)},
        "yaxis2": {"title": {"text": "expert"}, "anchor": "x2", **_ticks(names, reverse=True)},
        "shapes": shapes,
    }
    return figure(
        [bars, trace], title=title, x="expert, group by group", y="share of routed slots", height=380, **layout
    )


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
