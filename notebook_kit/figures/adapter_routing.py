"""Pictures of routing between adapters: skills by task, a vote over a bank of experts, experts and data by K shots."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from notebook_kit.diagnostics.adapter_routing import pair_table, plane, routing_matrix, skill_similarity
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures import Glider, diverse_group, nearest_data, shortlist

Weights = Mapping[str, Float[Tensor, "tasks heads skills"]]
CLOUD = 800  # open samples that are drawn
LOG_TICKS = {"tickvals": [0.01, 1, 100, 10_000], "ticktext": ["0.01", "1", "100", "10⁴"], "tickangle": 0}


def _bar(x: float, label: str) -> dict:
    """A colour bar between two pictures, its title on top where it meets nothing."""
    return {"title": {"text": label, "side": "top"}, "thickness": 12, "outlinewidth": 0, "x": x, "nticks": 4}


def skills_view(
    runs: Mapping[int, Weights],
    overlap: Float[Tensor, "tasks tasks"],
    names: Sequence[str],
    *,
    n_splits: Annotated[int, Choice(1, 2, 4, 8, 16, 32)] = 1,
    layer: Annotated[int, Range(0, 256)] = 0,
    head: Annotated[int, Range(0, 255)] = 0,
) -> go.Figure:
    """Draw what each task takes of each skill, and whether tasks that are alike take the same.

    Args:
        runs: n_splits to what `mixtures.task_weights` gave after that training.
        overlap: how much two tasks are alike.
        names: of the tasks.
        n_splits: heads of the run that is shown.
        layer: of the model; the last one if there are fewer.
        head: of the heatmap; the last one if there are fewer. The right picture is over all heads.

    Returns:
        go.Figure
    """
    weights = runs[n_splits]
    name = list(weights)[min(layer, len(weights) - 1)]
    w = weights[name]
    head = min(head, w.shape[1] - 1)
    pairs = pair_table(skill_similarity(w), overlap, names)
    r = float(np.corrcoef(pairs.overlap, pairs.similarity)[0, 1])
    skills = [str(i) for i in range(w.shape[2])]
    left = heatmap(w[:, head], x=skills, y=list(names), limit=max(0.5, float(w.max())))
    left["colorbar"] = _bar(0.43, "w")
    dots = {
        "type": "scatter",
        "mode": "markers",
        "x": pairs.overlap.to_numpy(),
        "y": pairs.similarity.to_numpy(),
        "text": list(pairs.pair),
        "marker": {"color": PALETTE[0], "size": 7, "opacity": 0.7},
        "xaxis": "x2",
        "yaxis": "y2",
        "showlegend": False,
    }
    many = "s" * (w.shape[1] > 1)
    return figure(
        [left, dots],
        title=f"{name}: head {head} of {w.shape[1]}; skills and tasks alike (all head{many}): r = {r:.2f}",
        x="skill",
        y="task",
        height=440,
        xaxis={"domain": [0, 0.42], "type": "category", "showgrid": False},
        yaxis={"autorange": "reversed", "showgrid": False, "dtick": 1},
        xaxis2={"title": {"text": "share of equal answers"}, "domain": [0.66, 1], "anchor": "y2"},
        yaxis2={"title": {"text": "cosine of the tasks' w"}, "anchor": "x2", "range": [-1.05, 1.05]},
    )


def adaptation_figure(table: pd.DataFrame, *, chance: float = 0.5, title: str = "", y: str = "accuracy") -> go.Figure:
    """Draw how well a new task is learned, by what is allowed to train.

    Args:
        table: a row for each way, a column for each number of examples.
        chance: a dashed line.
        title: of the figure.
        y: what the table holds.
    """
    ways = [str(way) for way in table.index]
    bars = [
        {"type": "bar", "x": ways, "y": table[c].to_numpy(), "name": f"{c} examples", "marker": {"color": PALETTE[i]}}
        | {"text": [f"{v:.2f}" for v in table[c]], "textposition": "outside", "cliponaxis": False}
        for i, c in enumerate(table.columns)
    ]
    line = {"type": "scatter", "mode": "lines", "x": ways, "y": np.full(len(ways), chance), "name": "chance"}
    data = [*bars, line | {"line": {"color": NEUTRAL, "dash": "dash"}}]
    return figure(data, title=title, x="what trains", y=y, height=360, yaxis={"range": [0, 1.08]}, barmode="group")


def vote_view(
    glider: Glider,
    inputs: Mapping[str, tuple[Tensor, Tensor | str]],
    names: Sequence[str],
    curve: pd.DataFrame,
    *,
    weight: Annotated[float, Range(0.01, 10_000, log=True)] = 3.0,
    layer: Annotated[int, Range(0, 256)] = 0,
) -> go.Figure:
    """Draw which expert each domain's tokens go to when the global vote weighs a, and what that does to the score.

    Args:
        glider: keeps its own weight.
        inputs: domain to (input of the model, query).
        names: of the experts.
        curve: from `weight_curve`.
        weight: a.
        layer: of the bank; the last one if there are fewer.

    Returns:
        go.Figure
    """
    layer = min(layer, len(glider.layers) - 1)
    before, glider.weight = glider.weight, weight
    try:
        matrix = routing_matrix(glider, inputs, layer=layer)
    finally:
        glider.weight = before
    left = heatmap(matrix.to_numpy(), x=list(names), y=list(matrix.index), limit=1.0)
    left["colorbar"] = _bar(0.4, "w")
    known = curve[curve.weight.notna() & (curve.weight > 0)]
    at = {"type": "scatter", "xaxis": "x2", "yaxis": "y2"}
    data = [left]
    for i, group in enumerate(curve.columns.drop("weight")):
        line = {"mode": "lines+markers", "name": group, "line": {"color": PALETTE[i]}}
        data.append(at | line | {"x": known.weight.to_numpy(float), "y": known[group].to_numpy()})
    mark = {"mode": "lines", "x": np.full(2, weight), "y": np.array([0.0, 1.0]), "name": "a", "showlegend": False}
    data.append(at | mark | {"line": {"color": NEUTRAL, "dash": "dash"}})
    return figure(
        data,
        title=f"layer {layer}: mean weight w of each expert at a = {weight:.3g}",
        x="expert",
        y="domain",
        height=440,
        xaxis={"domain": [0, 0.39], "tickangle": -40, "showgrid": False},
        yaxis={"autorange": "reversed", "showgrid": False},
        xaxis2={"title": {"text": "weight a (log)"}, "domain": [0.68, 1], "anchor": "y2", "type": "log"} | LOG_TICKS,
        yaxis2={"title": {"text": "accuracy"}, "anchor": "x2", "range": [0, 1]},
    )


def group_view(
    accuracy: Mapping[int, Float[Tensor, " experts"]],
    perplexity: Mapping[int, Float[Tensor, " experts"]],
    similarity: Float[Tensor, "experts experts"],
    names: Sequence[str],
    *,
    n_shots: Annotated[int, Choice(1, 2, 5, 10, 15, 20, 50)] = 5,
    size: Annotated[int, Range(1, 64)] = 6,
    n_experts: Annotated[int, Range(1, 16)] = 3,
    weight: Annotated[float, Range(0, 1, step=0.05)] = 0.5,
    diversity: Annotated[str, Choice("most", "none", "least")] = "most",
) -> go.Figure:
    """Draw the bank as K shots see it, and the group that is chosen.

    Args:
        accuracy: number of shots to the experts' accuracies on them.
        perplexity: the same for perplexity.
        similarity: from `adapter_similarity`.
        names: of the experts.
        n_shots: K.
        size: of the shortlist.
        n_experts: of the group.
        weight: of accuracy's rank against perplexity's.
        diversity: how the group is chosen from the shortlist.

    Returns:
        go.Figure
    """
    a, p = accuracy[n_shots], perplexity[n_shots]
    listed = shortlist(a, p, size=size, weight=weight)
    group = diverse_group(similarity, listed, n_experts=n_experts, diversity=diversity)
    parts = similarity / similarity.diagonal().clamp_min(1)[:, None]
    kinds = {"chosen": (group, PALETTE[5], "star", 15), "shortlist": ([i for i in listed if i not in group],)}
    kinds["shortlist"] += (PALETTE[0], "circle", 10)
    kinds["others"] = ([i for i in range(len(names)) if i not in listed], NEUTRAL, "circle-open", 10)
    y = p.nan_to_num(posinf=1e9).clamp(max=1e9).numpy()
    data = []
    for kind, (members, colour, symbol, dot) in kinds.items():
        marker = {"color": colour, "symbol": symbol, "size": dot}
        text = [names[i] for i in members]
        points = {"x": a[members].numpy(), "y": y[members], "text": text, "name": kind, "marker": marker}
        data.append({"type": "scatter", "mode": "markers", "hoverinfo": "text+x+y"} | points)
    right = heatmap(parts, label="mean |cos|", limit=1.0, xaxis="x2", yaxis="y2")
    ticks = {"tickvals": list(range(len(names))), "ticktext": list(names), "showgrid": False}
    cells = [(i, j) for i in group for j in group]
    frame = {"symbol": "square-open", "size": 17, "color": PALETTE[5], "line": {"width": 2}}
    outline = {"type": "scatter", "mode": "markers", "marker": frame, "showlegend": False, "hoverinfo": "skip"}
    outline |= {"x": [x for x, _ in cells], "y": [row for _, row in cells], "xaxis": "x2", "yaxis": "y2"}
    return figure(
        [*data, right, outline],
        title="chosen: " + " · ".join(names[i] for i in group),
        x=f"accuracy on {n_shots} shots",
        y="perplexity (log, cut at 10⁹)",
        height=470,
        xaxis={"domain": [0, 0.36], "range": [-0.05, 1.05]},
        yaxis={"type": "log", "range": [0, 9.3], "dtick": 1, "exponentformat": "power"},
        xaxis2={"title": {"text": "expert"}, "domain": [0.6, 1], "anchor": "y2", "tickangle": -45} | ticks,
        yaxis2={"title": {"text": ""}, "anchor": "x2", "autorange": "reversed"} | ticks,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )


def data_view(
    data: Float[Tensor, "samples d"],
    shots: Float[Tensor, "shots d"],
    *,
    n_shots: Annotated[int, Range(1, 1000)] = 5,
    n_data: Annotated[int, Range(0, 2000)] = 300,
    dedup_distance: Annotated[float, Range(0, 1, step=0.02)] = 0.1,
) -> go.Figure:
    """Draw the open data on the plane of its two main directions: what the shots fetch, and what stays of it.

    Args:
        data: embeddings of the open data.
        shots: embeddings of the shots, of which the first n_shots are used.
        n_shots: K; at most all.
        n_data: size of the training set.
        dedup_distance: cosine distance below which the farther of two samples goes.

    Returns:
        go.Figure
    """
    used = shots[: min(n_shots, len(shots))]
    fetched = nearest_data(data, used, n_data=n_data, dedup_distance=0.0)
    kept = nearest_data(data, used, n_data=n_data, dedup_distance=dedup_distance)
    cloud = data[:: max(len(data) // CLOUD, 1)]
    every, near, stay, stars = plane(cloud, data[fetched], data[kept], used)
    layers = {
        "open data (a sample)": (every, NEUTRAL, "circle", 4, 0.35),
        f"fetched: {len(fetched)}": (near, PALETTE[4], "circle", 6, 0.7),
        f"kept: {len(kept)}": (stay, PALETTE[0], "circle", 7, 0.9),
        f"shots: {len(used)}": (stars, PALETTE[5], "star", 13, 1.0),
    }
    traces = [
        {"type": "scatter", "mode": "markers", "x": xy[:, 0].numpy(), "y": xy[:, 1].numpy(), "name": name}
        | {"marker": {"color": colour, "symbol": symbol, "size": size, "opacity": opacity}}
        for name, (xy, colour, symbol, size, opacity) in layers.items()
    ]
    title = f"{len(fetched) - len(kept)} near-duplicates dropped"
    return figure(traces, title=title, x="first main direction", y="second main direction", height=440)


def shots_figure(table: pd.DataFrame, *, title: str = "", y: str = "accuracy") -> go.Figure:
    """Draw scores against the number of shots, one line for each way to choose.

    Args:
        table: a row for each number of shots, a column for each way.
        title: of the figure.
        y: what the table holds.
    """
    x = table.index.to_numpy()
    dashes = ("solid", "dash", "dot", "dashdot", "longdash", "solid")
    traces = [
        {"type": "scatter", "mode": "lines+markers", "x": x, "y": table[way].to_numpy(), "name": way}
        | {"line": {"color": PALETTE[i % len(PALETTE)], "dash": dashes[i % len(dashes)]}}
        for i, way in enumerate(table.columns)
    ]
    axis = {"type": "log", "tickvals": x, "ticktext": [str(v) for v in x]}
    return figure(traces, title=title, x="shots K (log)", y=y, xaxis=axis, yaxis={"range": [0, 1]}, height=360)
