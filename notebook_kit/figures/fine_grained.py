"""Pictures of thin experts: who uses which, what an ablation costs, and which patches a union of experts computes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.diagnostics.fine_grained import set_union
from notebook_kit.figures.style import GRID, NEUTRAL, PALETTE, figure, heatmap
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures import SelectiveAttention, UnionOfExperts

SHOWN = 50  # tokens side by side
BRIGHT = 0.5  # the weight that gets the brightest colour: routed ones are small beside a shared one's 1


@dataclass(frozen=True, eq=False)
class FineRun:
    """What is shown of one trained layer: its weights by token and routed expert, what changes cost, and its sizes."""

    weights: Float[Tensor, "tokens experts"]
    scores: Mapping[str, float]
    n_shared: int
    picks: int
    width: int
    combinations: int


def fine_view(
    runs: Mapping[tuple[int, int], FineRun],
    names: Sequence[str],
    *,
    granularity: Annotated[int, Choice(1, 2, 4, 8)] = 1,
    n_shared: Annotated[int, Range(0, 8)] = 0,
    start: Annotated[int, Range(0, 1_000_000)] = 0,
    y: str = "test loss (nats)",
) -> go.Figure:
    """Draw which experts each token uses, shared ones on top, and what three changes cost.

    Args:
        runs: stored runs by (granularity, n_shared), of one budget.
        names: of the tokens, in the order of the runs' weights.
        granularity: m; the nearest below that is stored.
        n_shared: K_s; the nearest below that is stored with this granularity.
        start: first token shown.
        y: what the scores measure.

    Returns:
        go.Figure
    """
    m = max((g for g, _ in runs if g <= granularity), default=min(g for g, _ in runs))
    stored = [s for g, s in runs if g == m]
    run = runs[m, max((s for s in stored if s <= n_shared), default=min(stored))]
    begin = min(start, max(len(run.weights) - SHOWN, 0))
    shown = run.weights[begin : begin + SHOWN]
    rows = torch.cat([torch.ones(run.n_shared, len(shown)), shown.T])
    top = max(float(max(r.scores.values())) for r in runs.values())
    grid = heatmap(rows, limit=BRIGHT, label=f"weight ({BRIGHT} and more)")
    grid["colorbar"] = grid["colorbar"] | {"y": 0.72, "len": 0.6}
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": list(run.scores),
        "x": np.array(list(run.scores.values())),
        "text": [f"{value:.2f}" for value in run.scores.values()],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": [PALETTE[0]] + [PALETTE[1]] * (len(run.scores) - 1)},
        "showlegend": False,
        "xaxis": "x2",
        "yaxis": "y2",
    }
    step = max(1, len(rows) // 8)
    routed = list(range(0 if run.n_shared == 0 else step, shown.shape[1], step))
    band = [(run.n_shared - 1) / 2] if run.n_shared else []
    ends = [0, *(i for i in range(1, len(shown)) if names[begin + i] != names[begin + i - 1])]
    line = {"type": "line", "xref": "x", "yref": "y", "x0": -0.5, "x1": len(shown) - 0.5}
    line |= {"y0": run.n_shared - 0.5, "y1": run.n_shared - 0.5, "line": {"color": PALETTE[5], "width": 2}}
    return figure(
        [grid, bars],
        title=f"m = {m}, width {run.width}: {run.n_shared} shared, {run.picks} of {shown.shape[1]} routed, "
        f"{run.combinations:,} combinations",
        x="token, by label",
        y="expert",
        height=560,
        shapes=[line] if run.n_shared else [],
        xaxis={"tickvals": ends, "ticktext": [names[begin + i] for i in ends], "tickangle": 0, "showgrid": False},
        yaxis={
            "domain": [0.44, 1],
            "autorange": "reversed",
            "tickvals": band + [run.n_shared + i for i in routed],
            "ticktext": ["shared"] * len(band) + [str(i) for i in routed],
            "showgrid": False,
        },
        xaxis2={"title": {"text": y}, "anchor": "y2", "range": [0, top * 1.1]},
        yaxis2={"domain": [0, 0.26], "anchor": "x2", "autorange": "reversed", "type": "category"},
    )


def masking_figure(frame: pd.DataFrame, *, name: str = "score", y: str = "test loss (nats)") -> go.Figure:
    """Draw what it costs to forbid every token its best experts, one line a layer.

    Args:
        frame: layer, masked (share of the routed experts), and the score.
        name: of the score's column.
        y: what it measures.

    Returns:
        go.Figure
    """
    data = []
    for number, (layer, rows) in enumerate(frame.groupby("layer", sort=False)):
        colour = PALETTE[number % len(PALETTE)]
        trace = {"type": "scatter", "mode": "lines+markers", "name": str(layer), "line": {"color": colour}}
        symbol = ("circle", "square", "diamond", "cross", "x")[number % 5]
        trace |= {"marker": {"symbol": symbol, "size": 9}}
        data.append(trace | {"x": 100 * rows["masked"].to_numpy(), "y": rows[name].to_numpy()})
    x = "each token's best routed experts masked (% of all routed)"
    return figure(data, title="How replaceable are the experts?", x=x, y=y, yaxis={"rangemode": "tozero"})


def union_view(
    model: nn.Module,
    layers: Mapping[str, UnionOfExperts | SelectiveAttention],
    images: Float[Tensor, "images pixels"],
    curve: pd.DataFrame,
    *,
    layer: Annotated[str, Choice("feed-forward", "attention")] = "feed-forward",
    k: Annotated[int, Range(1, 512)] = 2,
    capacity_factor: Annotated[float, Range(0.25, 4, step=0.25)] = 2.0,
    image: Annotated[int, Range(0, 1_000_000)] = 0,
    y: str = "accuracy",
) -> go.Figure:
    """Draw which patches of a square image each expert computes, and what the choice of k costs on the whole.

    Args:
        model: takes rows of pixels; its patches run over the image row by row.
        layers: by name, those of the choice `layer`; all take part in k and capacity.
        images: square, pixels row by row, in [0, 1].
        curve: k, capacity_factor, share, score, from `union_curve`; rows without a limit are drawn.
        layer: whose choice is drawn.
        k: experts a patch; more than there are is all.
        capacity_factor: an expert's patches relative to an even share.
        image: which; more than there are is the last.
        y: what the curve's score measures.

    Returns:
        go.Figure
    """
    index = min(image, len(images) - 1)
    shown = layers[layer]
    with torch.no_grad(), set_union(layers.values(), k=k, capacity_factor=capacity_factor):
        model(images[index : index + 1])
        taken, k = shown.gate.taken[0], shown.gate.k  # [m, n]
    side, across = round(images.shape[1] ** 0.5), round(len(taken) ** 0.5)
    patch = side // across
    pixels = images[index].reshape(side, side)
    panels, ticks = [], []
    for expert in range(taken.shape[1]):
        seen = taken[:, expert].reshape(across, across).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        panels += [pixels.where(seen, torch.nan), torch.full((side, 1), torch.nan)]
        ticks.append(expert * (side + 1) + (side - 1) / 2)
    counts = taken.sum(0).tolist()
    word = "head" if isinstance(shown, SelectiveAttention) else "expert"
    labels = [f"{word} {i}<br>{count} of {len(taken)}" for i, count in enumerate(counts)]
    free = curve[curve["capacity_factor"].isna()]
    here = free[free["k"] == k]
    line = {"type": "scatter", "showlegend": False, "xaxis": "x2", "yaxis": "y2"}
    data = [
        heatmap(torch.cat(panels[:-1], 1), limit=1.0, showscale=False, hoverinfo="skip"),
        line
        | {"mode": "lines+markers", "x": 100 * free["share"].to_numpy(), "y": free["score"].to_numpy()}
        | {"line": {"color": NEUTRAL}, "text": [f"k = {v}" for v in free["k"]]},
        line
        | {"mode": "markers", "x": 100 * here["share"].to_numpy(), "y": here["score"].to_numpy()}
        | {"marker": {"size": 15, "color": PALETTE[5], "symbol": "circle-open", "line": {"width": 3}}},
    ]
    width = len(ticks) * (side + 1) - 1
    grid = [x + 0.5 for x in range(-1, width) if (x + 1) % (side + 1) % patch == 0 or (x + 1) % (side + 1) == side]
    lines = [_rule("x", v) for v in grid] + [_rule("y", i * patch - 0.5, width) for i in range(across + 1)]
    for rule in lines:
        if rule["x0"] == rule["x1"]:
            rule["y0"], rule["y1"] = -0.5, side - 0.5
    unserved = int((~taken.any(1)).sum())
    return figure(
        data,
        title=f"image {index}, k = {k}: " + (f"{unserved} patches left to the residual" if unserved else "all served"),
        x=f"what each {word} computes, in patches",
        height=430,
        shapes=lines,
        xaxis={"tickvals": ticks, "ticktext": labels, "showgrid": False, "zeroline": False},
        yaxis={
            "domain": [0.56, 1],
            "autorange": "reversed",
            "visible": False,
            "scaleanchor": "x",
            "constrain": "domain",
        },
        xaxis2={"title": {"text": "work (% of the dense layers)"}, "domain": [0.12, 0.95], "anchor": "y2"},
        yaxis2={"title": {"text": y}, "domain": [0, 0.26], "anchor": "x2", "rangemode": "tozero", "nticks": 4},
        margin={"l": 24, "r": 24, "t": 48, "b": 52},
    )


def _rule(axis: str, at: float, width: int = 0) -> dict:
    rule = {"type": "line", "xref": "x", "yref": "y", "line": {"color": GRID, "width": 1}}
    if axis == "x":
        return rule | {"x0": at, "x1": at}
    return rule | {"x0": -0.5, "x1": width - 0.5, "y0": at, "y1": at}
