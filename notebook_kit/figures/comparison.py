"""A comparison of merging methods as a picture: every method's score against base, experts and a reference."""

from typing import Annotated

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap
from notebook_kit.hyperparameters import Choice

MEAN = "mean"
NOT_TASKS = ("model", "kind", "score", "tuned", "settings", "seconds", "problem")
LINES = {"base": ("dot", NEUTRAL), "experts": ("dash", PALETTE[2]), "reference": ("solid", PALETTE[5])}


def tasks_of(frame: pd.DataFrame) -> list[str]:
    """The task columns of a comparison's table."""
    return [column for column in frame.columns if column not in NOT_TASKS]


def comparison_view(
    frame: pd.DataFrame,
    *,
    picture: Annotated[str, Choice("dots", "map")] = "dots",
    task: Annotated[str, Choice(MEAN)] = MEAN,
    best_first: bool = True,
    unit: str = "score",
) -> go.Figure:
    """Draw a comparison of merges.

    Args:
        frame: of a MergeComparison: model, kind (base, expert, experts, reference, method), score, tasks, ...
        picture: dots along the score, or a map of models against tasks.
        task: what is drawn along the axis and sorted by; "mean" also shows each task as a small dot.
        best_first: sort the methods by it; otherwise they stand in the order of the call.
        unit: what the score measures.

    Raises:
        ValueError: no such task, or not one method has a score.
    """
    tasks = tasks_of(frame)
    if task not in (MEAN, *tasks):
        raise ValueError(f"task must be one of {', '.join([MEAN, *tasks])}, got {task!r}")
    column = "score" if task == MEAN else task
    shown = frame[(frame["kind"] == "method") & frame["score"].notna()]
    if shown.empty:
        raise ValueError("no method has a score to draw; the column `problem` says why")
    if best_first:
        shown = shown.sort_values(column, ascending=False, kind="stable")
    failed = int(((frame["kind"] == "method") & frame["score"].isna()).sum())
    title = f"{len(shown)} merging methods" + (f", {failed} more without a score (see the table)" if failed else "")
    others = frame[frame["kind"].isin(LINES) & frame["score"].notna()]
    if picture == "map":
        return _map(pd.concat([others, shown]), tasks, title, unit)
    return _dots(
        shown, others, tasks if task == MEAN else [], column, title, unit if task == MEAN else f"{task}: {unit}"
    )


def _dots(shown: pd.DataFrame, others: pd.DataFrame, tasks: list[str], column: str, title: str, x: str) -> go.Figure:
    names = list(shown["model"])
    traces = []
    for _, row in others.iterrows():
        dash, colour = LINES[row["kind"]]
        # Through every name, so that the first trace sets the order of the rows.
        places = {"x": np.full(len(names), float(row[column])), "y": names}
        line = {"color": colour, "dash": dash, "width": 2}
        traces.append({"type": "scatter", "mode": "lines", "name": row["model"], "line": line} | places)
    if tasks:
        small = {"type": "scatter", "mode": "markers", "name": "each task"}
        small |= {"x": shown[tasks].to_numpy(dtype=float).T.ravel(), "y": names * len(tasks)}
        small |= {"hovertext": [task for task in tasks for _ in names], "hoverinfo": "text+x+y"}
        traces.append(small | {"marker": {"size": 5, "color": PALETTE[4]}})
    big = {"type": "scatter", "mode": "markers", "name": "mean" if tasks else "method", "y": names}
    big |= {"x": shown[column].to_numpy(dtype=float), "hovertext": list(shown["settings"]), "hoverinfo": "text+x+y"}
    traces.append(big | {"marker": {"size": 11, "color": PALETTE[0]}})
    return figure(
        traces,
        title=title,
        x=x,
        height=int(np.clip(24 * len(names) + 140, 320, 1000)),
        yaxis={"autorange": "reversed", "type": "category", "title": {"text": "method", "standoff": 10}},
    )


def _map(rows: pd.DataFrame, tasks: list[str], title: str, unit: str) -> go.Figure:
    columns = [*tasks, "score"] if tasks else ["score"]
    z = rows[columns].to_numpy(dtype=float)
    low, high = float(np.nanmin(z)), float(np.nanmax(z))
    names = [MEAN if column == "score" else column for column in columns]
    trace = heatmap(z, x=names, y=list(rows["model"]), label=unit, limit=(low, high if high > low else low + 1))
    return figure(
        [trace],
        title=title,
        x="task",
        height=int(np.clip(24 * len(rows) + 140, 320, 1000)),
        yaxis={"autorange": "reversed", "type": "category", "title": {"text": "model", "standoff": 10}},
        xaxis={"type": "category"},
    )
