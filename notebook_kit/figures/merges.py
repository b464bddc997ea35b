"""Figures of merges: conflicts of signs, what each method keeps of whom, spectra, the plane of three models."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from notebook_kit.adapters import merge_adapters
from notebook_kit.adapters.read import Source
from notebook_kit.diagnostics.merges import Surface, change_spectra, factorwise_error, kept_shares, sign_conflicts
from notebook_kit.diagnostics.weights import task_vectors
from notebook_kit.figures.style import PALETTE, figure, heatmap
from notebook_kit.figures.weights import BESIDE, short, spectra_figure
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.weights import Weights

PICTURES = ("sign conflicts", "kept changes", "spectrum")
ALL = "all methods"
VOTES = {"conflict": PALETTE[5], "agree": PALETTE[2], "alone": PALETTE[4], "nobody": "#D5D5D5"}
WORDS = {"conflict": "both signs", "agree": "all agree", "alone": "one expert only", "nobody": "nobody"}


def merge_view(
    base: Weights,
    experts: Sequence[Weights],
    merges: Mapping[str, Weights],
    *,
    picture: Annotated[str, Choice(*PICTURES)] = "kept changes",
    density: Annotated[float, Range(0.01, 1)] = 0.2,
    method: Annotated[str, Choice(ALL)] = ALL,
    tensor: Annotated[str, Choice("")] = "",
    names: Sequence[str] | None = None,
) -> go.Figure:
    """Look into merges: where experts disagree, what each method kept of whom, singular values before and after.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i.
        merges: name of a method to the state dict that it made.
        picture: what is drawn.
        density: share of each expert's changes that is looked at, the largest of each tensor.
        method: whose experts are drawn ("kept changes"), or "all methods" beside each other.
        tensor: the matrix of the spectrum; "" is the first.
        names: of the experts.

    Raises:
        IncompatibleWeights: the weights do not fit the base.
        ValueError: no such picture, method or matrix.
    """
    vectors = task_vectors(base, experts)
    names = list(names) if names is not None else vectors.names
    if picture == "sign conflicts":
        return conflicts_figure(sign_conflicts(base, experts, density=density), density=density)
    if picture == "kept changes":
        tables = {name: kept_shares(base, experts, merged, density=density) for name, merged in merges.items()}
        return kept_figure(tables, vectors.tensors, names, method=method, density=density)
    if picture != "spectrum":
        raise ValueError(f"picture must be one of {', '.join(PICTURES)}, got {picture!r}")
    key = tensor or vectors.matrices[0]
    mean = dict(zip(names, vectors.singular_values(key), strict=True))
    spectra = {"experts, mean": np.mean(list(mean.values()), axis=0)} | change_spectra(base, merges, key)
    return spectra_figure(spectra, title=f"Singular values of what changed in {short(key)}", label="singular value")


def conflicts_figure(table: pd.DataFrame, *, density: float = 1.0, title: str = "") -> go.Figure:
    """Draw `sign_conflicts` as stacked bars, a bar a tensor.

    Args:
        table: from `sign_conflicts`.
        density: of the table, for the title.
        title: of the picture.
    """
    names = [short(name) for name in table["tensor"]]
    bars = [
        {"type": "bar", "orientation": "h", "y": names, "x": table[vote].to_numpy(), "name": WORDS[vote]}
        | {"marker": {"color": colour}}
        for vote, colour in VOTES.items()
    ]
    text = title or ("All entries" if density == 1 else f"Each expert's largest {density:.0%}")
    return figure(
        bars,
        title=text,
        x="share of the tensor's entries",
        y="tensor",
        height=int(np.clip(24 * len(names) + 130, 300, 900)),
        barmode="stack",
        yaxis={"autorange": "reversed", "title": {"text": "tensor", "standoff": 10}},
        xaxis={"range": [0, 1]},
    )


def kept_figure(
    tables: Mapping[str, Float[np.ndarray, "tensors experts"]],
    tensors: Sequence[str],
    names: Sequence[str],
    *,
    method: str = ALL,
    density: float = 0.2,
) -> go.Figure:
    """Draw `kept_shares`: tensors from top to bottom, and the methods beside each other, or one method's experts.

    Args:
        tables: name of a method to its table.
        tensors: names of the rows.
        names: of the experts.
        method: "all methods" draws a column for each, the mean over its experts; a name draws that one's experts.
        density: of the tables, for the title.

    Raises:
        ValueError: no such method.
    """
    if method == ALL:
        z, columns, what = np.stack([np.nanmean(table, axis=1) for table in tables.values()], axis=1), tables, "mean"
    elif method in tables:
        z, columns, what = tables[method], names, method
    else:
        raise ValueError(f"method must be {ALL!r} or one of {', '.join(tables)}, got {method!r}")
    trace = heatmap(
        z, x=list(columns), y=[short(name) for name in tensors], label="share moved the same way", limit=(0.0, 1.0)
    )
    return figure(
        [trace],
        title=f"Each expert's largest {density:.0%} in the merge: {what} {np.nanmean(z):.2f}, by chance 0.5",
        x="method, mean over the experts" if method == ALL else "expert",
        y="tensor",
        height=int(np.clip(24 * len(tensors) + 160, 340, 900)),
        yaxis={"autorange": "reversed", "title": {"text": "tensor", "standoff": 10}},
        xaxis={"type": "category"},
    )


# ------------------------------------------------------------------ the plane of three models
def surface_view(
    surface: Surface,
    points: pd.DataFrame,
    *,
    task: Annotated[str, Choice("mean")] = "mean",
    shade: Annotated[str, Choice("contour", "map")] = "contour",
    farthest: Annotated[float, Range(0, 1)] = 1.0,
) -> go.Figure:
    """Draw the scores over the plane of three models, with other models' shadows on it.

    Args:
        surface: from `score_surface`.
        points: from `surface.place`: model, x, y, distance.
        task: whose score.
        shade: lines of equal score, or the grid itself.
        farthest: models farther from the plane than this share of the farthest one are left out.

    Returns:
        go.Figure. A ring's place is exact, its colour on the map is not the model's score: it lies beside the plane.
    """
    if task not in surface.scores:
        raise ValueError(f"task must be one of {', '.join(surface.scores)}, got {task!r}")
    z = surface.scores[task]
    low, high = float(np.nanmin(z)), float(np.nanmax(z))
    span = (low, high if high > low else low + 1)
    ground = heatmap(z, x=surface.x.tolist(), y=surface.y.tolist(), label=surface.unit, limit=span, name="")
    if shade == "contour" and high > low:
        ground |= {"type": "contour", "ncontours": 18, "contours": {"coloring": "heatmap"}, "line": {"width": 0.5}}
    corners = surface.plane.corners
    models = {"type": "scatter", "mode": "markers+text", "name": "in the plane", "text": list(corners)}
    models |= {"x": np.array([x for x, _ in corners.values()]), "y": np.array([y for _, y in corners.values()])}
    models |= {"textposition": "top center", "marker": {"symbol": "square", "size": 10, "color": PALETTE[5]}}
    models |= {"textfont": {"color": _ink(surface, z, models["x"], models["y"])}}
    shown = points[points["distance"] <= farthest * points["distance"].max() + 1e-12]
    others = {"type": "scatter", "mode": "markers+text", "name": "shadow of a merge", "text": list(shown["model"])}
    others |= {"x": shown["x"].to_numpy(), "y": shown["y"].to_numpy()}
    # Neighbours in height get their names on two sides.
    heights = shown["y"].rank(method="first").to_numpy(dtype=int)
    others |= {"textposition": ["top center" if height % 2 else "bottom center" for height in heights]}
    others |= {"textfont": {"color": _ink(surface, z, others["x"], others["y"])}}
    ring = {"size": 10, "color": "#FFFFFF", "line": {"width": 2, "color": PALETTE[0]}}
    hover = [f"{name}: {distance:.2g} beside the plane" for name, distance in shown[["model", "distance"]].to_numpy()]
    traces = [ground, models, others | {"marker": ring, "hovertext": hover, "hoverinfo": "text"}]
    first, second, _ = corners
    return figure(
        traces,
        title=f"{task}: {surface.unit} in the plane of {', '.join(corners)}",
        x=f"distance from {first} towards {second} (norm of the weights)",
        y="distance across",
        height=500,
    )


def _ink(surface: Surface, z: Float[np.ndarray, "ny nx"], x: np.ndarray, y: np.ndarray) -> list[str]:
    """White where the ground is dark, black where it is light."""
    columns = [int(np.abs(surface.x - place).argmin()) for place in x]
    rows = [int(np.abs(surface.y - place).argmin()) for place in y]
    middle = (np.nanmin(z) + np.nanmax(z)) / 2
    return ["#FFFFFF" if z[row, column] < middle else "#111111" for row, column in zip(rows, columns, strict=True)]


# ------------------------------------------------------------------ adapters
def adapter_sum_view(
    adapters: Sequence[Source],
    *,
    weight: Annotated[float, Range(0, 1)] = 0.5,
    rank: Annotated[int, Range(1, 64)] = 8,
) -> go.Figure:
    """Draw what two ways of adding two adapters get wrong: factor by factor, and the true sum cut to a rank.

    Args:
        adapters: two, of one rank.
        weight: of the first; the second has 1 − weight.
        rank: of the cut.

    Raises:
        ValueError: not two adapters, or their ranks differ.
    """
    if len(adapters) != 2:
        raise ValueError(f"adapter_sum_view compares two adapters, got {len(adapters)}")
    weights = [weight, 1 - weight]
    trap = factorwise_error(adapters, weights).set_index("module")["error"]
    cut = merge_adapters(adapters, weights, rank=rank)
    modules = [row["module"] for row in cut.rows]
    bars = {
        "added factor by factor": (np.array([trap[name] for name in modules]), PALETTE[5]),
        f"true sum, cut to rank {rank}": (np.array([row["error"] for row in cut.rows]), PALETTE[0]),
    }
    traces = [
        {"type": "bar", "orientation": "h", "name": name, "x": values, "y": [short(name) for name in modules]}
        | {"marker": {"color": colour}}
        for name, (values, colour) in bars.items()
    ]
    return figure(
        traces,
        title=f"weights {weight:.2f} and {1 - weight:.2f}",
        x="‖what came out − Σ w ΔW‖ / ‖Σ w ΔW‖",
        y="module",
        barmode="group",
        height=int(np.clip(44 * len(modules) + 130, 300, 900)),
        yaxis={"autorange": "reversed", "title": {"text": "module", "standoff": 10}},
        xaxis={"rangemode": "tozero"},
        legend=BESIDE,
    )
