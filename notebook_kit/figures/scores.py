"""Scores as bars: one a task, with where they started."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from notebook_kit.figures.style import NEUTRAL, PALETTE, figure


def score_figure(score: float, start: float | None = None, *, title: str = "", y: str = "") -> go.Figure:
    """Bars of a score, one a task, with a diamond where they stood at first.

    Args:
        score: a number; if it has `.tasks` (name to number), each task gets a bar.
        start: the score to compare with.
        title: of the picture; the mean is added.
        y: what the score measures, with its unit; default: what the score itself says.
    """
    y = y or getattr(score, "unit", "score")
    tasks = _tasks(score)
    names = list(tasks)
    values = np.array([tasks[name] for name in names], dtype=float)
    bars = {"type": "bar", "x": names, "y": values, "name": "now", "marker": {"color": PALETTE[0]}}
    data = [bars]
    if start is not None:
        first = _tasks(start)
        marker = {"symbol": "diamond", "size": 9, "color": PALETTE[1], "line": {"width": 1, "color": NEUTRAL}}
        points = {"type": "scatter", "mode": "markers", "x": names, "y": np.array([first[name] for name in names])}
        data.append({**points, "name": "at the start", "marker": marker})
    low = float(np.nanmin(values)) if len(values) else 0.0
    span = {"range": [0, 1.02]} if 0 <= low and float(np.nanmax(values, initial=0)) <= 1 else {}
    return figure(data, title=f"{title}: mean {float(score):.3f}" if title else "", x="task", y=y, yaxis=span)


def compare_scores(scores: Mapping[str, float], *, title: str = "", y: str = "score") -> go.Figure:
    """Grouped bars: each model's score on each task.

    Args:
        scores: model name to score, with `.tasks` or without.
        title: of the picture.
        y: what the score measures, with its unit.
    """
    data = []
    for i, (name, score) in enumerate(scores.items()):
        tasks = _tasks(score)
        colour = {"color": PALETTE[i % len(PALETTE)]}
        data.append({"type": "bar", "name": name, "x": list(tasks), "y": np.array([*tasks.values()]), "marker": colour})
    return figure(data, title=title, x="task", y=y, barmode="group")


def _tasks(score: float) -> dict[str, float]:
    return {str(name): float(value) for name, value in getattr(score, "tasks", {"all": score}).items()}
