"""A sweep as a picture: a line for one hyperparameter, lines or a map for two."""

from typing import Annotated

import numpy as np
import plotly.graph_objects as go

from notebook_kit.figures.style import PALETTE, figure, heatmap
from notebook_kit.hyperparameters import Choice


def sweep_view(
    frame,
    *,
    x: Annotated[str, Choice("")] = "",
    by: Annotated[str, Choice("")] = "",
    measure: Annotated[str, Choice("score")] = "score",
    picture: Annotated[str, Choice("lines", "map")] = "lines",
) -> go.Figure:
    """Draw a sweep's tidy table.

    Args:
        frame: DataFrame of a SweepResult: a column for each hyperparameter, then score and tasks.
        x: the hyperparameter along the axis.
        by: a second one, as colour or as the map's rows; "" for none.
        measure: the column drawn; of runs that share x and by, the best is shown.
        picture: lines, or a map of x against by.

    Returns:
        go.Figure
    """
    best = frame.groupby([x, by] if by and by != x else [x], sort=True, dropna=False)[measure].max()
    title = f"{measure}, best over all else"
    if not by or by == x:
        return figure([_line(best.index, best.to_numpy(), measure, 0)], title=title, x=_words(x), y=measure)
    table = best.unstack(by)
    if picture == "map":
        z = table.to_numpy(dtype=np.float32).T
        span = (float(np.nanmin(z)), float(np.nanmax(z))) if np.isfinite(z).any() else None
        names = [[_name(value) for value in axis] for axis in (table.index, table.columns)]
        trace = heatmap(z, x=names[0], y=names[1], label=measure, limit=span)
        return figure([trace], title=title, x=_words(x), y=_words(by))
    lines = [
        _line(table.index, table[c].to_numpy(), f"{_words(by)} {_name(c)}", i) for i, c in enumerate(table.columns)
    ]
    return figure(lines, title=title, x=_words(x), y=measure)


def _line(index, values, name: str, i: int) -> dict:
    numeric = np.asarray(index).dtype.kind in "fiu"
    x = np.asarray(index) if numeric else [_name(value) for value in index]
    style = {"color": PALETTE[i % len(PALETTE)]}
    mode = "lines+markers" if numeric else "markers"
    return {"type": "scatter", "mode": mode, "x": x, "y": values, "name": name, "line": style, "marker": style}


def _name(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")
