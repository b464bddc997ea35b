"""Pictures of keeping the load even: a bias at work, remedies side by side over training, ids and their experts."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from notebook_kit.diagnostics.balance import BiasStream
from notebook_kit.diagnostics.routing import max_violation
from notebook_kit.figures.routing import label_of_token
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap

DASHES = ("solid", "dash", "dot")


def bias_figure(stream: BiasStream) -> go.Figure:
    """Draw a bias at work: above MaxVio of every batch, below the bias of every expert.

    Args:
        stream: from `bias_stream`.
    """
    steps = np.arange(len(stream.bias))
    line = {"type": "scatter", "mode": "lines", "x": steps}
    data = [{**line, "y": stream.max_violation, "line": {"color": PALETTE[0]}, "showlegend": False}]
    even = {"color": NEUTRAL, "dash": "dash", "width": 1}
    data.append({**line, "x": steps[[0, -1]], "y": np.zeros(2), "line": even, "showlegend": False})
    for expert, bias in enumerate(stream.bias.T):
        style = {"color": PALETTE[expert % len(PALETTE)], "dash": DASHES[expert // len(PALETTE) % len(DASHES)]}
        data.append({**line, "y": bias, "yaxis": "y2", "name": str(expert), "line": style, "showlegend": False})
    late = stream.max_violation[len(steps) // 2 :].mean()
    whole = max_violation(stream.routing.load)
    return figure(
        data,
        title=f"bias rate {stream.bias_rate:.2g}: MaxVio {late:.2f} in the later half, {whole:.2f} of the whole trace",
        x="batches seen",
        y="MaxVio of the batch",
        height=460,
        yaxis={"domain": [0.56, 1], "rangemode": "tozero"},
        yaxis2={"domain": [0, 0.44], "anchor": "x", "title": {"text": "bias of each expert", "standoff": 10}},
        xaxis={"anchor": "y2"},
    )


def history_figure(history: pd.DataFrame, *, y: str, title: str = "", smooth: int = 1) -> go.Figure:
    """Draw a number over training, one line a router.

    Args:
        history: columns router, step, value; several rows of one router and step (seeds) are averaged.
        y: what the value is, with its unit.
        title: of the picture.
        smooth: steps in the running mean.
    """
    mean = history.groupby(["router", "step"], sort=False)["value"].mean().reset_index()
    data = []
    for place, (name, rows) in enumerate(mean.groupby("router", sort=False)):
        value = rows["value"].rolling(smooth, min_periods=1).mean().to_numpy()
        style = {"color": PALETTE[place % len(PALETTE)], "dash": DASHES[place // len(PALETTE) % len(DASHES)]}
        line = {"type": "scatter", "mode": "lines", "x": rows["step"].to_numpy(), "y": value, "line": style}
        data.append({**line, "name": str(name)})
    return figure(data, title=title, x="training step", y=y, height=400, yaxis={"rangemode": "tozero"})


def id_figure(tables: Mapping[str, pd.DataFrame], *, title: str = "") -> go.Figure:
    """Draw where the same token ids go by several routers, side by side.

    Args:
        tables: router to the table from `id_table`, of the same ids.
        title: of the picture.
    """
    names = [label_of_token(text) for text in next(iter(tables.values())).index]
    width, data, axes, notes = 1 / len(tables), [], {}, []
    for place, (name, table) in enumerate(tables.items()):
        axis = "x" if place == 0 else f"x{place + 1}"
        bar = {"showscale": place == len(tables) - 1, "xaxis": axis}
        data.append(heatmap(table.to_numpy(), x=range(table.shape[1]), label="share", limit=1.0, **bar))
        domain = [place * width, (place + 0.94) * width]
        axes[f"xaxis{axis[1:]}"] = {"domain": domain, "title": {"text": "expert"}, "showgrid": False, "dtick": 1}
        note = {
            "text": name,
            "x": sum(domain) / 2,
            "y": 1,
            "xref": "paper",
            "yref": "paper",
            "yanchor": "bottom",
            "xanchor": "center",
        }
        notes.append({**note, "showarrow": False})
    return figure(
        data,
        title=title,
        y="token",
        height=int(np.clip(170 + 18 * len(names), 280, 760)),
        yaxis={"autorange": "reversed", "showgrid": False, "tickvals": list(range(len(names))), "ticktext": names},
        annotations=notes,
        **axes,
    )
