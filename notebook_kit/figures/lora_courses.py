"""Old knowledge and new tasks in the course of training, and who answers for which: before, during, after."""

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from notebook_kit.figures.style import PALETTE, figure

DASHES = ("solid", "dash", "dot", "dashdot")
KINDS = {"known": "knowledge (type 1)", "fresh": "new tasks (type 0)"}


def course_figure(courses: Mapping[str, pd.DataFrame], *, run: str, title: str = "") -> go.Figure:
    """Draw how old and new accuracy move while each way trains, and how one run shares its groups of experts.

    Args:
        courses: way of training to a table with columns step (0 is before), old and new (accuracies); of `run` also
            known and fresh, the share of the first group of experts on samples of either kind.
        run: whose shares are drawn.
        title: of the picture.

    Raises:
        ValueError: `run` is not among the courses, or has no shares.
    """
    if run not in courses or not {"known", "fresh"} <= set(courses[run].columns):
        raise ValueError(f"run must name a course with columns known and fresh, got {run!r} of {', '.join(courses)}")
    data = []
    for i, (name, table) in enumerate(courses.items()):
        style = {"color": PALETTE[i % len(PALETTE)], "dash": DASHES[i % len(DASHES)]}
        line = {"type": "scatter", "mode": "lines", "x": table["step"].to_numpy(), "line": style, "name": name}
        data.append(line | {"y": table["old"].to_numpy()})
        data.append(line | {"y": table["new"].to_numpy(), "xaxis": "x2", "yaxis": "y2", "showlegend": False})
    steps = courses[run]["step"].to_numpy()
    for column, colour in zip(KINDS, (PALETTE[5], PALETTE[4]), strict=True):
        style = {"xaxis": "x3", "yaxis": "y3", "line": {"color": colour}, "connectgaps": False, "name": KINDS[column]}
        y = courses[run][column].to_numpy()
        data.append({"type": "scatter", "mode": "lines", "x": steps, "y": y, **style})
    step, share = {"text": "training step"}, {"range": [0, 1]}
    return figure(
        data,
        title=title,
        x="training step",
        y="accuracy on old knowledge",
        height=380,
        xaxis={"domain": [0, 0.26]},
        xaxis2={"domain": [0.37, 0.63], "anchor": "y2", "title": step},
        xaxis3={"domain": [0.74, 1], "anchor": "y3", "title": step},
        yaxis=share,
        yaxis2=share | {"anchor": "x2", "title": {"text": "accuracy on new tasks"}},
        yaxis3=share | {"anchor": "x3", "title": {"text": f"share of group 1 ({run})"}},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
    )
