"""A comparison of routers as pictures: loss, cost, learning, balance, specialisation."""

import html
from typing import Annotated

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from notebook_kit.figures.style import PALETTE, figure
from notebook_kit.hyperparameters import Choice

PICTURES = ("loss", "cost", "learning", "balance in training", "balance", "specialisation")
SYMBOLS = ("circle", "square", "diamond")
LOSS = "nats per byte, held out"


def router_comparison_view(
    frame: pd.DataFrame,
    curves: pd.DataFrame,
    *,
    picture: Annotated[str, Choice(*PICTURES)] = "loss",
    best_first: bool = True,
) -> go.Figure:
    """Draw a comparison of routers.

    Args:
        frame: of a `RouterComparison`: a row for each router and seed.
        curves: of it too: router, seed, share of the budget, training loss, MaxVio.
        picture: the loss; the loss against active parameters; loss or MaxVio in training; MaxVio and dead experts on
            held-out text; what experts tell of the language, beside chance.
        best_first: sort the routers by loss; otherwise they stand in the order of the call.

    Raises:
        ValueError: not one router has a loss.
    """
    frame, curves = (table.assign(router=table["router"].map(html.escape)) for table in (frame, curves))
    ran = frame[frame["loss"].notna()]
    if ran.empty:
        raise ValueError("no router has a loss to draw; the column `problem` says why")
    means = ran.groupby("router", sort=False).mean(numeric_only=True)
    if best_first:
        means = means.sort_values("loss", kind="stable")
    failed = frame[frame["loss"].isna()]["router"].nunique()
    tail = f", {failed} failed (see the table)" if failed else ""
    if picture == "loss":
        return _dots(ran, means, f"{len(means)} routers at one budget: lower is better{tail}")
    if picture == "cost":
        return _cost(means, f"what a token costs, and what it brings{tail}")
    if picture == "learning":
        return _lines(curves, means, "loss", "nats per byte, training", f"loss in training, mean over seeds{tail}")
    if picture == "balance in training":
        return _lines(curves, means, "max_violation", "MaxVio of a batch", f"load in training: 0 is even{tail}")
    if picture == "balance":
        dead = means["dead_experts"].to_numpy()
        names = [f"{name}{f' ({d:.0f} dead)' if d else ''}" for name, d in zip(means.index, dead, strict=True)]
        title = f"busiest expert above its even share, on held-out text{tail}"
        return _bars(means["max_violation"], names, "MaxVio (0 is even)", title)
    title = f"what a token's best expert tells of its language{tail}"
    bars = _bars(means["information_bits"], list(means.index), "bits, of 3.58 there are", title)
    mark = {"symbol": "line-ns", "size": 18, "line": {"width": 3, "color": PALETTE[5]}, "color": PALETTE[5]}
    chance = {"x": means["chance_99"].to_numpy(np.float32), "y": list(means.index), "name": "chance stays below, 99 %"}
    bars.data[0].name = "measured"
    return bars.add_trace({"type": "scatter", "mode": "markers", "marker": mark, **chance}).update_layout(
        margin={"t": 70}
    )


def _tall(n: int) -> int:
    return int(np.clip(30 * n + 130, 260, 900))


def _rows(names: list[str]) -> dict:
    order = {"categoryorder": "array", "categoryarray": names, "autorange": "reversed", "type": "category"}
    return {**order, "title": {"text": "router", "standoff": 10}}


def _dots(ran: pd.DataFrame, means: pd.DataFrame, title: str) -> go.Figure:
    names = list(means.index)
    big = {"x": means["loss"].to_numpy(np.float32), "y": names, "name": "mean"}
    data = [{"type": "scatter", "mode": "markers", **big, "marker": {"size": 12, "color": PALETTE[0]}}]
    if len(ran) > len(names):
        small = {"x": ran["loss"].to_numpy(np.float32), "y": list(ran["router"]), "name": "each seed"}
        data.append({"type": "scatter", "mode": "markers", **small, "marker": {"size": 6, "color": PALETTE[4]}})
    return figure(data, title=title, x=LOSS, height=_tall(len(names)), yaxis=_rows(names))


def _cost(means: pd.DataFrame, title: str) -> go.Figure:
    data = [
        {"type": "scatter", "mode": "markers", "name": name}
        | {"x": np.array([row["active_parameters"] / 1e3]), "y": np.array([row["loss"]])}
        | {"marker": {"size": 13, "color": PALETTE[i % len(PALETTE)], "symbol": SYMBOLS[i // len(PALETTE) % 3]}}
        for i, (name, row) in enumerate(means.iterrows())
    ]
    side = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}
    return figure(
        data,
        title=title,
        x="active parameters of a token (thousands)",
        y=LOSS,
        height=420,
        legend=side,
        showlegend=True,
    )


def _lines(curves: pd.DataFrame, means: pd.DataFrame, column: str, y: str, title: str) -> go.Figure:
    data = []
    for i, name in enumerate(means.index):
        mine = curves[curves["router"] == name].groupby("share")[column].mean()
        line = {"color": PALETTE[i % len(PALETTE)], "width": 2, "dash": ("solid", "dash", "dot")[i // len(PALETTE) % 3]}
        place = {"x": mine.index.to_numpy(np.float32), "y": mine.to_numpy(np.float32)}
        data.append({"type": "scatter", "mode": "lines", "name": name, "line": line, **place})
    side = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}
    return figure(data, title=title, x="share of the budget used", y=y, height=420, legend=side, showlegend=True)


def _bars(values: pd.Series, names: list[str], x: str, title: str) -> go.Figure:
    bar = {"type": "bar", "orientation": "h", "x": values.to_numpy(np.float32), "y": names}
    bar |= {"marker": {"color": PALETTE[0]}}
    height = _tall(len(names))
    return figure([bar], title=title, x=x, height=height, yaxis=_rows(names), xaxis={"rangemode": "tozero"})
