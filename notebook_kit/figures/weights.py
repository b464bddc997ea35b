"""Figures of weights: what experts changed, layer by layer and pair by pair."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from notebook_kit.diagnostics.weights import METRICS, task_vectors
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.weights import Weights

WHOLE = "whole model"
# What the colour means: label, signed, (lower, upper) or None.
SCALES = {
    "norm": ("‖τ‖ / ‖θ₀‖", False, None),
    "cosine": ("cosine", True, 1.0),
    "sign agreement": ("share of equal signs", False, (0.4, 1.0)),
    "spectrum": ("stable rank", False, None),
    "subspace overlap": ("overlap", False, (0.0, 1.0)),
}


def weight_view(
    base: Weights,
    experts: Sequence[Weights],
    *,
    metric: Annotated[str, Choice(*METRICS)] = "norm",
    tensor: Annotated[str, Choice(WHOLE)] = WHOLE,
    density: Annotated[float, Range(0.01, 1)] = 1.0,
    rank: Annotated[int, Range(1, 64)] = 4,
    names: Sequence[str] | None = None,
) -> go.Figure:
    """Draw what experts changed: every layer and expert of the whole model, or one tensor pair by pair.

    Args:
        base: state dict θ₀.
        experts: state dicts θ of the same keys and shapes; τ = θ − θ₀.
        metric: what is measured. Pairwise ones show, for the whole model, the mean over the other experts.
        tensor: a tensor's name for its details, or "whole model" for the layers.
        density: share of each task vector kept, the largest entries by magnitude (sign agreement).
        rank: number of leading directions compared (subspace overlap).
        names: of the experts.

    Returns:
        go.Figure. The task vectors are kept until other weights are drawn, so that a redraw is fast.

    Raises:
        IncompatibleWeights: the experts do not fit the base.
        ValueError: no such tensor or metric, or a vector is asked for its spectrum.
    """
    vectors = task_vectors(base, experts, names)
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if tensor == WHOLE:
        keys, table = vectors.per_tensor(metric, density=density, rank=rank)
        return layers_figure(table, keys, vectors.names, metric)
    if metric == "norm":
        row = vectors.norms()[vectors.tensors.index(vectors.known(tensor))]
        return norms_figure(row, vectors.names, short(tensor))
    if metric == "spectrum":
        return spectra_figure(
            dict(zip(vectors.names, vectors.singular_values(tensor), strict=True)), title=short(tensor)
        )
    if metric == "cosine":
        pairs = vectors.cosine(tensor)
    elif metric == "sign agreement":
        pairs = vectors.sign_agreement(tensor, density)
    else:
        pairs = vectors.subspace_overlap(tensor, rank)
    return pairs_figure(pairs, vectors.names, metric, title=short(tensor))


# Beside the axes: names are long, and a title in one line with the legend would run into it.
BESIDE = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}


def short(tensor: str) -> str:
    """A tensor's name without what all have in common."""
    return tensor.removeprefix("model.").removesuffix(".weight")


def layers_figure(
    table: Float[np.ndarray, "tensors experts"], tensors: Sequence[str], names: Sequence[str], metric: str
) -> go.Figure:
    """Draw one number a tensor and expert, tensors from top to bottom."""
    label, signed, limit = SCALES[metric]
    title = {"norm": "How far each tensor moved", "spectrum": "How many directions each change has"}.get(
        metric, f"Mean {metric} with the other experts"
    )
    trace = heatmap(table, x=names, y=[short(name) for name in tensors], label=label, signed=signed, limit=limit)
    height = int(np.clip(18 * len(tensors) + 130, 320, 900))
    return figure(
        [trace],
        title=title,
        x="expert",
        y="tensor",
        height=height,
        yaxis={"autorange": "reversed", "title": {"text": "tensor", "standoff": 10}},
        xaxis={"type": "category"},
    )


def pairs_figure(
    pairs: Float[np.ndarray, "experts experts"], names: Sequence[str], metric: str, *, title: str = ""
) -> go.Figure:
    """Draw a number for each pair of experts."""
    label, signed, limit = SCALES[metric]
    trace = heatmap(pairs, x=names, y=names, label=label, signed=signed, limit=limit)
    axes = {"yaxis": {"autorange": "reversed", "type": "category"}, "xaxis": {"type": "category"}}
    return figure([trace], title=f"{metric}: {title}".removesuffix(": "), x="expert", y="expert", height=420, **axes)


def norms_figure(norms: Float[np.ndarray, " experts"], names: Sequence[str], title: str = "") -> go.Figure:
    """Draw how far one tensor moved in each expert, as bars."""
    trace = {"type": "bar", "x": list(names), "y": norms, "marker": {"color": PALETTE[0]}}
    axes = {"yaxis": {"rangemode": "tozero"}, "xaxis": {"type": "category"}}
    return figure([trace], title=title, x="expert", y="‖τ‖ / ‖θ₀‖", **axes)


def spectra_figure(
    spectra: Mapping[str, Float[np.ndarray, " k"]],
    *,
    title: str = "",
    label: str = "singular value of τ",
    rank: int | None = None,
) -> go.Figure:
    """Draw singular values in falling order, a line for each name; a dashed line stands behind the first `rank`."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": np.arange(1, len(values) + 1),
            "y": np.asarray(values),
            "line": {"color": PALETTE[i % len(PALETTE)], "dash": ("solid", "dot", "dash")[i // len(PALETTE) % 3]},
        }
        for i, (name, values) in enumerate(spectra.items())
    ]
    if rank is not None:
        top = max(float(np.max(values)) for values in spectra.values())
        line = {"dash": "dash", "width": 2, "color": NEUTRAL}
        end = {"type": "scatter", "mode": "lines", "name": f"rank {rank}", "line": line}
        traces.append(end | {"x": np.full(2, rank + 0.5), "y": np.array([0.0, top])})
    axes = {"yaxis": {"rangemode": "tozero"}, "legend": BESIDE}
    return figure(traces, title=title, x="singular direction, largest first", y=label, **axes)
