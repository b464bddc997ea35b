"""Pictures of mixtures of LoRA experts: experts for each layer, two groups, ranks in use, adapters along a text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import plotly.graph_objects as go
import torch

from notebook_kit.diagnostics.lora_mixtures import RankUse
from notebook_kit.figures.routing import label_of_token
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures import share_out
from notebook_kit.routing import RoutingTrace

WINDOW = 48


@dataclass(frozen=True)
class AllocationRun:
    """A trained allocation: the scores of its seeds, and how far the experts of each layer are apart."""

    scores: Sequence[float]
    distance: Sequence[float]


def allocation_view(
    runs: Mapping[tuple[int, ...], AllocationRun],
    costs: Sequence[int],
    *,
    bottom: Annotated[int, Range(1, 10)] = 5,
    middle: Annotated[int, Range(1, 10)] = 5,
    top: Annotated[int, Range(1, 10)] = 5,
    y: str = "accuracy",
) -> go.Figure:
    """Deal a locked number of experts to three layers, beside what the allocations that were trained reached.

    Args:
        runs: allocation to what came of it, all with the same total.
        costs: trainable parameters of one expert in each layer.
        bottom: weight of the first layer; only the proportions of the three count.
        middle: weight of the second layer.
        top: weight of the last layer.
        y: what is scored.

    Returns:
        go.Figure
    """
    total = sum(next(iter(runs)))
    chosen = share_out([bottom, middle, top], total)
    nearest = min(runs, key=lambda run: sum(abs(a - b) for a, b in zip(run, chosen, strict=True)))
    layers = ["bottom", "middle", "top"]
    bars = {"type": "bar", "orientation": "h", "y": layers, "showlegend": False}
    data = [{**bars, "x": np.array(chosen), "marker": {"color": PALETTE[0]}, "text": list(map(str, chosen))}]
    apart = np.array(runs[nearest].distance, dtype=float)
    data.append({**bars, "x": apart, "xaxis": "x2", "yaxis": "y2", "marker": {"color": PALETTE[2]}})
    names = ["-".join(map(str, run)) for run in runs]
    for name, (key, run) in zip(names, runs.items(), strict=True):
        colour = PALETTE[5] if key == nearest else NEUTRAL
        dots = {"type": "scatter", "mode": "markers", "xaxis": "x3", "yaxis": "y3", "showlegend": False}
        scores = np.array(run.scores)
        size = 12 if key == nearest else 9
        data.append(dots | {"x": scores, "y": [name] * len(scores), "marker": {"color": colour, "size": size}})
    cost = sum(n * c for n, c in zip(chosen, costs, strict=True))
    near = "-".join(map(str, nearest))
    return figure(
        data,
        title=f"{'-'.join(map(str, chosen))}: {total} experts, {cost:,} parameters; nearest trained: {near}, "
        f"{y} {np.mean(runs[nearest].scores):.3f}",
        x="experts",
        y="layer",
        height=340,
        xaxis={"domain": [0, 0.27], "range": [0, total - 1.5]},
        xaxis2={"title": {"text": "mean ‖ΔWᵢ − ΔWⱼ‖"}, "domain": [0.35, 0.56], "anchor": "y2", "rangemode": "tozero"},
        xaxis3={"title": {"text": f"{y} (dot: a seed)"}, "domain": [0.74, 1], "anchor": "y3"},
        yaxis2={"anchor": "x2", "showticklabels": False},
        yaxis3={"anchor": "x3", "type": "category", "title": {"text": "trained allocation", "standoff": 6}},
    )


@dataclass(frozen=True)
class GroupRun:
    """A trained LoRAMoE: shares of group 1 by layer for samples of type 1 and 0, and the score of either kind."""

    shares: tuple[Sequence[float], Sequence[float]]
    old: float
    new: float
    optimum: tuple[float, float] | None = None  # where the loss is 0, for type 1 and 0


def group_view(runs: Mapping[str, GroupRun], *, loss: Annotated[str, Choice("off")] = "off") -> go.Figure:
    """Draw how two kinds of samples share two groups of experts, and what each kind's score is.

    Args:
        runs: name of the loss to what came of it; a run without shares is a point only.
        loss: which run.

    Returns:
        go.Figure
    """
    run, data = runs[loss], []
    layers = [f"layer {i}" for i in range(len(run.shares[0]))]
    for i, name in enumerate(("knowledge (type 1)", "new tasks (type 0)")):
        values = np.array(run.shares[i], dtype=float)
        data.append({"type": "bar", "x": layers, "y": values, "name": name, "marker": {"color": PALETTE[i]}})
        if run.optimum is not None:
            line = {"color": PALETTE[i], "dash": "dash", "width": 2}
            level = {"type": "scatter", "mode": "lines", "x": layers, "y": np.full(len(layers), run.optimum[i])}
            data.append(level | {"line": line, "showlegend": False, "hoverinfo": "skip"})
    by_old = sorted(runs, key=lambda name: runs[name].old)  # neighbours get their names above and below
    for name, other in runs.items():
        mark = {"color": PALETTE[5] if name == loss else NEUTRAL, "size": 13 if name == loss else 9}
        point = {"type": "scatter", "mode": "markers+text", "x": np.array([other.old]), "y": np.array([other.new])}
        place = "bottom center" if by_old.index(name) % 2 else "top center"
        axes = {"xaxis": "x2", "yaxis": "y2", "showlegend": False, "text": [name], "textposition": place}
        data.append(point | axes | {"marker": mark})
    olds, news = ([getattr(other, side) for other in runs.values()] for side in ("old", "new"))
    return figure(
        data,
        title=f"loss {loss}: knowledge {run.old:.3f}, new tasks {run.new:.3f}",
        x="",
        y="share of the first group of experts",
        height=400,
        xaxis={"domain": [0, 0.48]},
        yaxis={"range": [0, 1]},
        xaxis2={
            "title": {"text": "accuracy on old knowledge"},
            "domain": [0.6, 1],
            "anchor": "y2",
            "range": _room(olds),
        },
        yaxis2={"title": {"text": "accuracy on new tasks"}, "anchor": "x2", "range": _room(news)},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )


def _room(values: Sequence[float]) -> list[float]:
    pad = 0.25 * (max(values) - min(values)) or 0.01
    return [min(values) - pad, max(values) + pad]


def rank_view(
    use: RankUse,
    *,
    k: Annotated[int, Range(1, 1024)] = 8,
    layer: Annotated[int, Range(0, 255)] = 0,
    rows: Annotated[str, Choice("tasks", "tokens")] = "tasks",
) -> go.Figure:
    """Draw which ranks the tokens switch on, and what the model is worth with k of them.

    Args:
        use: from `rank_use`.
        k: active ranks a token.
        layer: from 0.
        rows: one row a task, the share of its tokens that use a rank; or single tokens, twelve of each task.

    Returns:
        go.Figure
    """
    scores = use.scores[layer]
    n_ranks, n_labels = scores.shape[1], len(use.names)
    k = min(k, n_ranks)
    picks = torch.from_numpy(scores).topk(k, dim=1).indices
    active = torch.zeros(scores.shape).scatter_(1, picks, 1.0).numpy()
    shares = np.stack([active[use.labels == label].mean(0) for label in range(n_labels)])
    # Ranks in the order of the task that uses them most, so that what belongs to a task stands together.
    order = np.lexsort((-shares.max(0), shares.argmax(0)))
    names, z = list(use.names), shares[:, order]
    if rows == "tokens":
        few = np.concatenate([np.flatnonzero(use.labels == label)[:12] for label in range(n_labels)])
        z = active[few][:, order]
    cells = heatmap(z, x=range(n_ranks), label="share of tokens that use it", limit=1.0)
    ticks = np.arange(n_labels) * (12 if rows == "tokens" else 1) + (5.5 if rows == "tokens" else 0)
    ks = np.array(list(use.curve))
    at = int(ks[np.abs(ks - k).argmin()])
    line = {"type": "scatter", "xaxis": "x2", "yaxis": "y2", "showlegend": False}
    curve = line | {"mode": "lines+markers", "x": ks, "y": np.array(list(use.curve.values()))}
    mark = {"size": 13, "color": PALETTE[5]}
    point = line | {"mode": "markers", "x": np.array([at]), "y": np.array([use.curve[at]]), "marker": mark}
    return figure(
        [cells, curve | {"line": {"color": PALETTE[0]}, "marker": {"color": PALETTE[0]}}, point],
        title=f"layer {layer}, {k} of {n_ranks} ranks active: accuracy {use.curve[at]:.3f} (trained with {use.k})",
        x="rank, sorted by the task that uses it most",
        y="task" if rows == "tasks" else "token, by task",
        height=420,
        xaxis={"domain": [0.46, 1], "showgrid": False},
        yaxis={"autorange": "reversed", "showgrid": False, "tickvals": ticks, "ticktext": names},
        xaxis2={"title": {"text": "active ranks, k"}, "domain": [0, 0.16], "anchor": "y2"},
        yaxis2={"title": {"text": "accuracy"}, "anchor": "x2"},
    )


def gate_view(
    trace: RoutingTrace,
    names: Sequence[str],
    labels: Sequence[str],
    *,
    k: Annotated[int, Range(1, 512)] = 2,
    temperature: Annotated[float, Range(0.1, 50, log=True)] = 1.0,
    layer: Annotated[int, Range(0, 255)] = 0,
    start: Annotated[int, Range(0, 10_000_000)] = 0,
) -> go.Figure:
    """Draw how much each embedded adapter answers along a text; a line where the text changes its label.

    Args:
        trace: of a model with `MeteoRA` layers.
        names: of the adapters in the bank.
        labels: for each token the adapter that is meant; a text that is no name means none.
        k: adapters a token.
        temperature: of the softmax over the picked.
        layer: of the trace, from 0.
        start: first token drawn; 48 are.

    Returns:
        go.Figure
    """
    z = trace.layer_logits(layer)
    n_tokens, n = z.shape
    k, start = min(k, n), max(0, min(start, n_tokens - WINDOW))
    best = z.topk(k, dim=1)
    weights = torch.zeros(z.shape).scatter_(1, best.indices, (best.values / temperature).softmax(1))
    stop = min(start + WINDOW, n_tokens)
    texts = [label_of_token(text) for text in trace.text(start, stop)]
    data = [heatmap(weights[start:stop].T.numpy(), x=range(stop - start), y=range(n), label="weight", limit=1.0)]
    cuts = [i - start for i in range(start + 1, stop) if labels[i] != labels[i - 1]]
    for cut in cuts:
        line = {"type": "scatter", "mode": "lines", "x": np.full(2, cut - 0.5), "y": np.array([-0.5, n - 0.5])}
        data.append(line | {"line": {"color": "#FFFFFF", "width": 3}, "showlegend": False, "hoverinfo": "skip"})
    known = torch.tensor([names.index(label) if label in names else -1 for label in labels])
    right = (best.indices[:, 0] == known)[known >= 0].float().mean().nan_to_num().item()
    shown = list(dict.fromkeys(labels[start:stop]))
    return figure(
        data,
        title=f"{trace.layers[layer].removeprefix('model.')}: {' → '.join(shown)}; right adapter first: {right:.0%}",
        x="byte of the text",
        y="adapter",
        height=int(np.clip(190 + 26 * n, 260, 700)),
        xaxis={"tickvals": list(range(stop - start)), "ticktext": texts, "tickangle": 0, "showgrid": False},
        yaxis={"range": [n - 0.5, -0.5], "showgrid": False, "tickvals": list(range(n)), "ticktext": list(names)},
    )
