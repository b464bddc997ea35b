"""Prompts as points in a plane, coloured by one label or another: does the label keep together, or does it jump?"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from notebook_kit.figures.style import PALETTE, figure
from notebook_kit.hyperparameters import Choice


def prompt_view(
    points: Float[np.ndarray, "prompts 2"],
    labels: Mapping[str, Sequence[str]],
    agreement: Mapping[str, float],
    *,
    label: Annotated[str, Choice("category", "best expert")] = "category",
) -> go.Figure:
    """Draw prompts in a plane, coloured by a label.

    Args:
        points: of the prompts, such as the two directions of largest variance.
        labels: name of a label to its value for each prompt.
        agreement: name of a label to how often near neighbours share it, in [0, 1].
        label: which one.

    Returns:
        go.Figure
    """
    values = np.asarray(labels[label])
    data = []
    for i, value in enumerate(dict.fromkeys(sorted(values))):
        chosen = points[values == value]
        mark = {"color": PALETTE[i % len(PALETTE)], "size": 5, "opacity": 0.75}
        dots = {"type": "scatter", "mode": "markers", "x": chosen[:, 0], "y": chosen[:, 1], "name": str(value)}
        data.append(dots | {"marker": mark, "hoverinfo": "name"})
    return figure(
        data,
        title=f"by {label}: near neighbours share it in {agreement[label]:.0%} of cases",
        x="first direction of largest variance",
        y="second direction",
        height=420,
        legend={"itemsizing": "constant"},
    )
