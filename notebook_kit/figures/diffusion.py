"""Pictures of a diffusion mixture: samples, the way there, and maps of which expert works where."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Annotated

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.diagnostics.diffusion import Denoising, expert_shares, silenced
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.models import DiffusionTransformer, sample_path

INK = [[0.0, "#FFFFFF"], [1.0, "#1A1A1A"]]
BARE = {"showgrid": False, "zeroline": False, "ticks": ""}


def tiled(images: Float[Tensor, "rows columns height width"], gap: int = 1) -> Float[Tensor, "_h _w"]:
    """Lay images out in a grid, with NaN between them.

    Args:
        images: pixels.
        gap: pixels between neighbours.
    """
    padded = torch.nn.functional.pad(images, (0, gap, 0, gap), value=torch.nan)
    grid = padded.transpose(1, 2).flatten(2).flatten(0, 1)
    return grid[: grid.shape[0] - gap, : grid.shape[1] - gap]


def image_grid_figure(
    images: Float[Tensor, "rows columns height width"],
    *,
    columns: list[str],
    rows: list[str],
    title: str = "",
    x: str = "",
    y: str = "",
    height: int = 0,
) -> go.Figure:
    """Draw images in rows and columns.

    Args:
        images: pixels from -1 (white) to 1 (black).
        columns: names of the columns; empty names none.
        rows: names of the rows.
        title: of the figure.
        x: what columns are.
        y: what rows are.
        height: pixels; 0 fits the rows.
    """
    side = images.shape[2] + 1
    middle = (side - 2) / 2
    ticks = [
        {"tickvals": [middle + side * i for i in range(len(names))], "ticktext": list(names)}
        for names in (columns, rows)
    ]
    z = tiled(images.clamp(-1, 1)).numpy()
    return figure(
        [heatmap(z, limit=(-1.0, 1.0), label="ink", colorscale=INK, showscale=False, hoverinfo="skip")],
        title=title,
        x=x,
        y=y,
        height=height or 130 + 86 * len(images),
        xaxis={**ticks[0], **BARE, "constrain": "domain"},
        yaxis={**ticks[1], **BARE, "autorange": "reversed", "scaleanchor": "x", "constrain": "domain"},
    )


def sample_view(
    model: DiffusionTransformer,
    *,
    picture: Annotated[str, Choice("samples", "path")] = "samples",
    digit: Annotated[str, Choice("all", *map(str, range(10)))] = "all",
    guidance: Annotated[float, Range(0, 6, step=0.25)] = 2.0,
    steps: Annotated[int, Range(1, 10)] = 6,
    silence: Annotated[str, Choice("nothing", "shared", "routed")] = "nothing",
    seed: Annotated[int, Range(0, 50)] = 0,
) -> go.Figure:
    """Make digits and draw them.

    Args:
        model: a class-conditional flow on digits.
        picture: "samples" are the images; "path" is what stands there on the way from noise.
        digit: one class, or all ten.
        guidance: how far to walk away from "any digit"; 1 is no guidance, 0 ignores the class.
        steps: Euler steps from noise to image.
        silence: the part of every `DiTMoE` that answers 0.
        seed: of the noise.
    """
    y = torch.arange(20) % 10 if picture == "samples" else torch.tensor([0, 3, 6, 9])
    y = y if digit == "all" else torch.full_like(y, int(digit))
    with silenced(model, silence) if silence != "nothing" else nullcontext():
        path = sample_path(model, y, steps=steps, guidance=guidance, seed=seed)[:, :, 0]
    what = f"guidance {guidance:g}, {steps} step{'s' * (steps > 1)}"
    what += f", {silence} part silenced" if silence != "nothing" else ""
    if picture == "samples":
        names = [str(i) for i in y[:10].tolist()]
        return image_grid_figure(
            path[-1].unflatten(0, (2, 10)),
            columns=names,
            rows=["1", "2"],
            title=f"Samples: {what}",
            x="asked for digit",
            y="noise",
            height=250,
        )
    places = torch.linspace(0, steps, min(steps, 10) + 1).round().long()
    return image_grid_figure(
        path[places].transpose(0, 1),
        columns=[f"{1 - int(i) / steps:.2g}" for i in places],
        rows=[str(int(c)) for c in y],
        title=f"From noise to digit: {what}",
        x="noise level t",
        y="digit",
    )


def expert_map_view(
    record: Denoising,
    *,
    by: Annotated[str, Choice("position", "time", "class")] = "position",
    layer: Annotated[int, Range(0, 255)] = 0,
) -> go.Figure:
    """Draw which expert is the first choice where, when, or for what.

    Args:
        record: from `record_denoising`.
        by: over places in the image (a small map for each expert), noise levels, or classes.
        layer: from 0.
    """
    shares = expert_shares(record, by=by, layer=layer)
    if by == "position":
        return position_figure(shares, title=f"Layer {layer}: where each expert is first choice")
    names = {"time": "noise level t (1 is noise)", "class": "digit"}
    return figure(
        [heatmap(shares.to_numpy().T, x=list(shares.index), y=range(shares.shape[1]), label="share of tokens")],
        title=f"Layer {layer}: first choice by {by}",
        x=names[by],
        y="expert",
        height=400,
        xaxis={"type": "category"},
        yaxis={"autorange": "reversed", "dtick": 1},
    )


def position_figure(shares: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw for each expert a map of the image: how often it is the first choice of the patch there.

    Args:
        shares: positions x experts, from `expert_shares`; the positions form a square.
        title: of the figure.
    """
    side, n_experts = round(len(shares) ** 0.5), shares.shape[1]
    columns = -(-n_experts // 2)
    maps = torch.tensor(shares.to_numpy().T.copy()).reshape(n_experts, side, side)
    filled = torch.cat([maps, maps.new_full((2 * columns - n_experts, side, side), torch.nan)])
    z = tiled(filled.unflatten(0, (2, columns)))
    step = side + 1
    notes = [
        {
            "text": f"expert {i}",
            "x": (i % columns) * step + (side - 1) / 2,
            "y": (i // columns) * step - 0.5,
            "yanchor": "bottom",
            "showarrow": False,
            "font": {"size": 12},
        }
        for i in range(n_experts)
    ]
    bare = {**BARE, "showticklabels": False, "constrain": "domain"}
    return figure(
        [heatmap(z, label="share of tokens", hovertemplate="%{z:.2f}<extra></extra>")],
        title=title,
        x=f"{side} x {side} patches of the image, one map for each expert",
        height=400,
        annotations=notes,
        xaxis=bare,
        yaxis={**bare, "range": [z.shape[0] - 0.5, -1.6], "scaleanchor": "x"},
    )


def dependence_figure(table: pd.DataFrame, *, title: str = "What the first expert tells about a patch") -> go.Figure:
    """Draw bits about position, time and class for each layer; columns with chance are left out.

    Args:
        table: from `dependence`.
        title: of the figure.
    """
    names = [name for name in table.columns if not name.endswith("(chance)")]
    layers = [str(i) for i in table.index]
    bars = [
        {"type": "bar", "name": name, "x": layers, "y": table[name].to_numpy(), "marker": {"color": colour}}
        for name, colour in zip(names, PALETTE, strict=False)
    ]
    axes = {"x": "layer", "y": "mutual information (bits)", "xaxis": {"type": "category"}}
    return figure(bars, title=title, barmode="group", height=340, **axes)


def evenness_figure(table: pd.DataFrame, *, title: str = "How evenly the experts are used") -> go.Figure:
    """Draw the evenness of the load against the noise level, a line for each layer.

    Args:
        table: from `evenness`.
        title: of the figure.
    """
    lines = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": f"layer {layer}",
            "x": np.asarray(table.index, dtype=float),
            "y": table[layer].to_numpy(),
        }
        for layer in table.columns
    ]
    low = float(table.to_numpy().min())
    return figure(
        lines,
        title=title,
        x="noise level t (sampling begins at 1 and ends at 0)",
        y="entropy of the load / its largest",
        height=340,
        xaxis={"range": [1.02, -0.02]},
        yaxis={"range": [min(0.5, low - 0.05), 1.02]},
    )


def balance_view(
    loads: Mapping[float, Sequence[Float[Tensor, " experts"]]],
    *,
    balance_coef: Annotated[float, Choice(0.0, 0.001, 0.01, 0.1)] = 0.01,
    layer: Annotated[int, Range(0, 255)] = 0,
) -> go.Figure:
    """Draw the load of models that were trained with different weights of the balance loss.

    Args:
        loads: weight of the loss to each layer's load (shares).
        balance_coef: which of them.
        layer: from 0.

    Raises:
        ValueError: nothing was trained with this weight, or there is no such layer.
    """
    if balance_coef not in loads:
        raise ValueError(f"balance_coef must be one of {', '.join(map(str, loads))}, got {balance_coef} (balance_view)")
    if layer >= len(loads[balance_coef]):
        raise ValueError(f"layer must be in [0, {len(loads[balance_coef]) - 1}], got {layer} (balance_view)")
    load = loads[balance_coef][layer]
    top = max(float(one.max()) for layers in loads.values() for one in layers)
    names = [str(i) for i in range(len(load))]
    even = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1 / len(load), "y1": 1 / len(load)}
    return figure(
        [{"type": "bar", "x": names, "y": load.numpy(), "marker": {"color": PALETTE[0]}, "showlegend": False}],
        title=f"Balance loss times {balance_coef:g}, layer {layer}: the busiest expert has {load.max():.0%}",
        x="expert (the line is an even share)",
        y="share of the claims",
        height=320,
        xaxis={"type": "category"},
        yaxis={"range": [0, top * 1.05]},
        shapes=[{**even, "line": {"color": NEUTRAL, "dash": "dash", "width": 2}}],
    )
