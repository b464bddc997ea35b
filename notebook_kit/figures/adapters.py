"""Figures of adapters: the spectrum of what they change, how much each layer changes, what folding costs."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float

from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap
from notebook_kit.figures.weights import BESIDE, short


def delta_spectra_figure(
    spectra: Mapping[str, Float[torch.Tensor, " k"]], *, rank: int | None = None, strength: float = 1.0, title: str = ""
) -> go.Figure:
    """Draw the singular values of each module's ΔW, a row a module; those beyond `rank` are left blank.

    Args:
        spectra: module name to singular values, from `diagnostics.adapters.delta_spectra`.
        rank: how many are kept; None keeps all.
        strength: what multiplies ΔW; the colour scale stays that of strength 1 up to strength 4.
        title: default: the share of the change's squared norm that the kept values hold.
    """
    width = max(len(values) for values in spectra.values())
    z = np.full((len(spectra), width), np.nan, dtype=np.float32)
    for row, values in enumerate(spectra.values()):
        z[row, : len(values)] = values.numpy()
    kept = z[:, : rank or width]
    share = np.nansum(kept**2) / max(np.nansum(z**2), 1e-30)
    limit = float(np.nanmax(z)) or 1.0
    shown = strength * z
    shown[:, rank or width :] = np.nan
    trace = heatmap(
        shown, x=range(1, width + 1), y=[short(name) for name in spectra], label="singular value of ΔW", limit=limit
    )
    text = f"{min(rank or width, width)} of {width} directions: {share:.0%} of ‖ΔW‖², strength {strength:g}"
    height = int(np.clip(18 * len(spectra) + 130, 320, 900))
    axes = {
        "yaxis": {"autorange": "reversed", "title": {"text": "module", "standoff": 10}},
        "xaxis": {"dtick": max(1, width // 16)},
    }
    return figure(
        [trace], title=title or text, x="singular direction, largest first", y="module", height=height, **axes
    )


def delta_figure(table: pd.DataFrame, *, value: str = "relative_norm", title: str = "") -> go.Figure:
    """Draw one column of `diagnostics.adapters.delta_table` as bars, a bar a module.

    Args:
        table: from `delta_table`.
        value: the column.
        title: of the figure.
    """
    axis = {"relative_norm": "‖ΔW‖ / ‖W‖", "norm": "‖ΔW‖", "spectral_norm": "largest singular value of ΔW"}.get(
        value, value.replace("_", " ")
    )
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": table[value].to_numpy(),
        "y": [short(name) for name in table["module"]],
    }
    height = int(np.clip(20 * len(table) + 120, 280, 900))
    axes = {
        "yaxis": {"autorange": "reversed", "title": {"text": "module", "standoff": 10}},
        "xaxis": {"rangemode": "tozero"},
    }
    return figure([bars | {"marker": {"color": PALETTE[0]}}], title=title, x=axis, y="module", height=height, **axes)


def fold_error_figure(errors: pd.DataFrame, *, title: str = "What folding changes in the outputs") -> go.Figure:
    """Draw the folding error of each number format beside the error of the format itself, on a log scale.

    Args:
        errors: from `diagnostics.adapters.fold_error`.
        title: of the figure.
    """
    columns = (
        ("folding: largest", "max_error", PALETTE[5]),
        ("folding: mean", "mean_error", PALETTE[1]),
        ("the format itself: mean", "format_error", NEUTRAL),
    )
    traces = [
        # Zero has no place on a log scale: float32 against itself is left out.
        {
            "type": "bar",
            "name": name,
            "x": errors["dtype"].tolist(),
            "y": np.where(errors[column] > 0, errors[column], np.nan),
            "marker": {"color": colour},
        }
        for name, column, colour in columns
    ]
    return figure(
        traces,
        title=title,
        x="number format",
        y="|difference of the outputs|",
        yaxis={"type": "log", "exponentformat": "power"},
        legend=BESIDE,
    )


def learning_figure(histories: Mapping[str, pd.DataFrame], *, value: str = "loss", smooth: int = 10) -> go.Figure:
    """Draw the loss of several training runs, a line a run, as a running mean.

    Args:
        histories: name to what `training.fit` returned.
        value: the column.
        smooth: steps of the running mean.
    """
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": history["step"].to_numpy(),
            "y": history[value].rolling(smooth, min_periods=1).mean().to_numpy(),
            "line": {"color": PALETTE[i % len(PALETTE)]},
        }
        for i, (name, history) in enumerate(histories.items())
    ]
    return figure(traces, x="step", y=f"{value} (nats per byte, mean of {smooth} steps)", legend=BESIDE)
