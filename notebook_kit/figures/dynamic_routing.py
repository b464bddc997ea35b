"""Pictures of compute that differs by token: where top-p cuts, what null experts take, who gets how many experts."""

from typing import Annotated

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.diagnostics.dynamic_routing import byte_classes, experts_by_group, experts_per_token
from notebook_kit.figures.routing import label_of_token
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routers import ExpertChoice, NullExperts, TopK, TopP, reroute
from notebook_kit.routing import Routing, RoutingTrace

SHOWN = 48  # tokens side by side


def cut_view(
    logits: Float[Tensor, "tokens experts"],
    curve: pd.DataFrame | None = None,
    *,
    threshold: Annotated[float, Range(0.0, 1.0, step=0.01)] = 0.8,
    temperature: Annotated[float, Range(0.25, 4, log=True)] = 1.0,
    y: str = "accuracy",
) -> go.Figure:
    """Draw where top-p cuts: tokens sorted by how many experts they take, each with its experts' probabilities.

    Args:
        logits: of the tokens.
        curve: from `threshold_curve`, drawn beside it with the threshold marked; None draws none.
        threshold: p.
        temperature: the logits are divided by it; the curve is at 1.
        y: what the curve's score measures.

    Returns:
        go.Figure
    """
    routing = TopP(1, logits.shape[1], threshold=threshold, temperature=temperature).eval().route(logits)
    counts = experts_per_token(routing)
    falling = routing.probs.sort(dim=1, descending=True).values
    order = (counts * 2 + 1 - falling[:, 0]).sort(stable=True).indices  # among equals the surest first
    n, n_experts = falling.shape
    mean = float(counts.float().mean()) if n else 0.0
    trace = heatmap(falling[order].T, limit=1.0, label="probability", y=range(1, n_experts + 1))
    if curve is not None:
        trace["colorbar"] = trace["colorbar"] | {"y": 0.77, "len": 0.5}
    cut = {"type": "scatter", "mode": "lines", "name": "cut", "x": np.arange(n), "y": counts[order].numpy() + 0.5}
    data = [trace, cut | {"line": {"color": "#FFFFFF", "width": 3, "shape": "hvh"}, "showlegend": False}]
    layout = {"yaxis": {"autorange": "reversed", "showgrid": False}, "xaxis": {"showgrid": False}}
    if curve is not None:
        layout |= {
            "yaxis": {"autorange": "reversed", "showgrid": False, "domain": [0.56, 1], "dtick": max(1, n_experts // 8)},
            "xaxis2": {"title": {"text": "threshold p"}, "domain": [0, 0.42], "anchor": "y2", "range": [0, 1.01]},
            "yaxis2": {"title": {"text": "experts, mean"}, "domain": [0, 0.36], "anchor": "x2", "rangemode": "tozero"},
            "xaxis3": {"title": {"text": "threshold p"}, "domain": [0.58, 1], "anchor": "y3", "range": [0, 1.01]},
            "yaxis3": {"title": {"text": y}, "domain": [0, 0.36], "anchor": "x3", "tickformat": ".3f", "nticks": 5},
        }
        data += _curve(curve, threshold)
    return figure(
        data,
        title=f"p = {threshold:.2f}: {mean:.2f} experts a token, from {_low(counts)} to {_high(counts)}",
        x="token, sorted",
        y="rank of the expert",
        height=380 if curve is None else 500,
        **layout,
    )


def _low(counts: Tensor) -> int:
    return int(counts.min()) if len(counts) else 0


def _high(counts: Tensor) -> int:
    return int(counts.max()) if len(counts) else 0


def _curve(curve: pd.DataFrame, threshold: float) -> list[dict]:
    data = []
    for end, column in (("2", "experts"), ("3", "score")):
        x, y = curve["threshold"].to_numpy(), curve[column].to_numpy()
        place = {"type": "scatter", "showlegend": False, "xaxis": f"x{end}", "yaxis": f"y{end}"}
        data.append(place | {"mode": "lines+markers", "x": x, "y": y, "line": {"color": PALETTE[int(end) - 2]}})
        low = 0.0 if column == "experts" else float(y.min())
        dash = {"mode": "lines", "line": {"color": NEUTRAL, "dash": "dash"}}
        data.append(place | dash | {"x": np.full(2, threshold), "y": np.array([low, float(y.max())])})
    return data


def null_view(
    logits: Float[Tensor, "tokens columns"],
    n_experts: int,
    *,
    k: Annotated[int, Range(1, 512)] = 4,
    n_null: Annotated[int, Range(0, 4096)] = 16,
) -> go.Figure:
    """Draw what null experts do: true experts a token as a histogram, and who gets the picks.

    Args:
        logits: of the n true experts, then of the nulls, as `NullExperts` records them.
        n_experts: n.
        k: picks a token.
        n_null: only the first so many nulls take part; more than there are counts as all.

    Returns:
        go.Figure
    """
    m = min(n_null, logits.shape[1] - n_experts)
    router = NullExperts(1, n_experts, n_null=m, k=min(k, n_experts + m)).eval()
    routing = router.route(logits[:, : n_experts + m])
    counts = experts_per_token(routing)
    mean = float(counts.float().mean()) if len(counts) else 0.0
    share = torch.bincount(counts, minlength=router.k + 1).float() / max(len(counts), 1)
    picks = torch.bincount(routing.experts.reshape(-1) + 1, minlength=n_experts + 1).float()
    picks = picks / picks.sum().clamp_min(1)
    bar = {"type": "bar", "showlegend": False}
    line = {"type": "scatter", "mode": "lines", "y": np.array([0.0, float(share.max())])}
    dash = {"line": {"color": NEUTRAL, "dash": "dash"}}
    name = f"even load: {router.expected_experts:.2f}"
    even = n_experts + m
    return figure(
        [
            bar | {"x": np.arange(router.k + 1), "y": share.numpy(), "marker": {"color": PALETTE[0]}},
            line | {"x": np.full(2, mean), "name": f"measured mean: {mean:.2f}", "line": {"color": PALETTE[5]}},
            line | {"x": np.full(2, router.expected_experts), "name": name} | dash,
            bar
            | {
                "x": [*(str(i) for i in range(n_experts)), "nulls"],
                "y": [*picks[1:].tolist(), float(picks[0])],
                "marker": {"color": [*[PALETTE[2]] * n_experts, NEUTRAL]},
                "xaxis": "x2",
                "yaxis": "y2",
            },
            {
                "type": "scatter",
                "mode": "markers",
                "name": "even share",
                "x": [*(str(i) for i in range(n_experts)), "nulls"],
                "y": [*[1 / even] * n_experts, m / even],
                "marker": {"symbol": "line-ew-open", "size": 22, "color": PALETTE[5], "line": {"width": 2}},
                "xaxis": "x2",
                "yaxis": "y2",
                "showlegend": False,
            },
        ],
        title=f"{n_experts} experts, {m} nulls, k = {router.k}",
        x="true experts of a token",
        y="share of tokens",
        height=360,
        xaxis={"domain": [0, 0.44], "dtick": 1},
        xaxis2={"title": {"text": "expert"}, "domain": [0.58, 1], "anchor": "y2", "type": "category", "tickangle": 0},
        yaxis2={"title": {"text": "share of picks (line: even)"}, "anchor": "x2", "rangemode": "tozero"},
    )


def compute_view(
    trace: RoutingTrace,
    *,
    router: Annotated[str, Choice("top-p", "null experts", "expert choice", "top-k")] = "top-p",
    threshold: Annotated[float, Range(0.0, 1.0, step=0.01)] = 0.6,
    k: Annotated[int, Range(1, 512)] = 2,
    n_null: Annotated[int, Range(0, 64)] = 16,
    start: Annotated[int, Range(0, 10_000_000)] = 0,
) -> go.Figure:
    """Route a byte model's trace again, and draw how many experts each token gets, in every layer.

    Args:
        trace: of a model that reads bytes.
        router: whose rules.
        threshold: of top-p.
        k: of the others: picks (null experts), in the mean (expert choice), always (top-k); at most all there are.
        n_null: nulls that shadow the trained experts; of null experts only.
        start: first token of the strip.

    Returns:
        go.Figure
    """
    routings = [_rerouted(trace, i, router, threshold, k, n_null) for i in range(len(trace.layers))]
    begin = min(start, max(len(trace) - SHOWN, 0))
    texts = [label_of_token(text) for text in trace.text(begin, begin + SHOWN)]
    counts = torch.stack([experts_per_token(routing) for routing in routings])
    table = experts_by_group(routings, byte_classes(trace)).sort_values("tokens", ascending=False)
    most = max(int(counts.max()), 1)
    strip = heatmap(counts[:, begin : begin + SHOWN], limit=float(most), label="experts", xaxis="x", yaxis="y")
    strip["colorbar"] = strip["colorbar"] | {"y": 0.87, "len": 0.36}
    bars = [
        {"type": "bar", "x": list(table.index), "y": table[name].to_numpy(), "name": name, "xaxis": "x2", "yaxis": "y2"}
        | {"marker": {"color": PALETTE[i % len(PALETTE)]}}
        for i, name in enumerate(table.columns.drop("tokens"))
    ]
    means = ", ".join(f"{float(row.float().mean()):.2f}" for row in counts)
    layers = list(range(len(routings)))
    ticks = {"tickvals": list(range(len(texts))), "ticktext": texts, "tickangle": 0, "tickfont": {"size": 11}}
    return figure(
        [strip, *bars],
        title=f"{router}: mean experts by layer {means}",
        x=f"tokens {begin} to {begin + len(texts) - 1}",
        y="layer",
        height=500,
        xaxis={**ticks, "showgrid": False, "anchor": "y"},
        yaxis={"autorange": "reversed", "domain": [0.74, 1], "tickvals": layers, "showgrid": False},
        xaxis2={"title": {"text": "class of the byte"}, "anchor": "y2", "type": "category"},
        yaxis2={"title": {"text": "experts a token"}, "domain": [0, 0.4], "anchor": "x2", "rangemode": "tozero"},
        barmode="group",
        legend={"orientation": "h", "y": 0.42, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        margin={"l": 64, "r": 24, "t": 48, "b": 52},
    )


def _rerouted(trace: RoutingTrace, layer: int, router: str, threshold: float, k: int, n_null: int) -> Routing:
    n = trace.layer_logits(layer).shape[1]
    if router == "top-p":
        return reroute(trace, TopP, layer=layer, threshold=threshold)
    if router == "null experts":
        return reroute(trace, NullExperts, layer=layer, n_null=n_null, k=min(k, n + n_null))
    if router == "expert choice":
        return reroute(trace, ExpertChoice, layer=layer, k=min(k, n))
    return reroute(trace, TopK, layer=layer, k=min(k, n), normalize=min(k, n) > 1)
