"""Pictures of alignment: the line between two networks, and unit against unit before and after matching."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from torch import Tensor

from notebook_kit.diagnostics.alignment import AlignmentView
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap

COLOURS = {"naive": PALETTE[5], "aligned": PALETTE[0]}


def path_figure(path: pd.DataFrame, *, title: str = "", y: str = "score", mark: float | None = None) -> go.Figure:
    """Draw what the straight lines between networks score, against the chord between their ends.

    Args:
        path: from `path_frame`: version, t, score, chord.
        title: of the picture.
        y: what the score measures, with its unit.
        mark: place on the lines to mark.
    """
    return figure(path_traces(path, mark=mark), title=title, x="place t on the line from A (0) to B (1)", y=y)


def path_traces(path: pd.DataFrame, *, mark: float | None = None, **axes) -> list[dict]:
    """One line a version, the chord between the ends dotted, and dots at the marked place."""
    traces = []
    for number, (version, rows) in enumerate(path.groupby("version", sort=False)):
        colour = COLOURS.get(version, PALETTE[number % len(PALETTE)])
        t, score, chord = (rows[name].to_numpy() for name in ("t", "score", "chord"))
        line = {"type": "scatter", "mode": "lines", "x": t, "y": score, "name": version, "line": {"color": colour}}
        traces.append(line | axes)
        if mark is not None:
            dot = {"type": "scatter", "mode": "markers", "x": [mark], "y": [float(np.interp(mark, t, score))]}
            traces.append(dot | {"marker": {"color": colour, "size": 9}, "showlegend": False} | axes)
    dotted = {"color": NEUTRAL, "dash": "dot"}
    traces.append({"type": "scatter", "mode": "lines", "x": t, "y": chord, "name": "chord", "line": dotted} | axes)
    return traces


def similarity_figure(before, after, *, title: str = "") -> go.Figure:
    """Draw unit against unit, side by side: before matching and after, where a diagonal appears.

    Args:
        before: cosines of a's units (rows) with b's (columns), as b is.
        after: the same with b in a's order.
        title: of the picture.
    """
    traces = [heatmap(before, limit=1.0, signed=True, label="cosine", showscale=False)]
    traces.append(heatmap(after, limit=1.0, signed=True, label="cosine", xaxis="x2", yaxis="y2"))
    layout = {"xaxis": {"domain": [0, 0.46]}, "yaxis": _rows("unit of A")}
    layout |= {"xaxis2": _columns("unit of B in A's order", [0.54, 1]), "yaxis2": _rows("", anchor="x2")}
    return figure(traces, title=title, x="unit of B, as it is", y="unit of A", height=380, **layout)


def permutation_figure(permutations: Mapping[str, Tensor], perm: str, *, title: str = "") -> go.Figure:
    """Draw one permutation: a dot at (i, p[i]); the diagonal would be the identity.

    Args:
        permutations: from a matching.
        perm: name of the one to draw.
        title: of the picture.
    """
    index = permutations[perm].numpy()
    order = np.arange(len(index))
    flipped = getattr(permutations, "signs", {}).get(perm)
    colours = [PALETTE[0]] * len(index) if flipped is None else [PALETTE[0] if s > 0 else PALETTE[5] for s in flipped]
    size = 4 if len(index) > 64 else 7
    dots = {"type": "scatter", "mode": "markers", "x": index, "y": order, "marker": {"color": colours, "size": size}}
    return figure(
        [dots], title=title or perm, x="unit of B", y="place in A's order", yaxis={"autorange": "reversed"}, height=380
    )


def cosine_figure(frame: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Bars of each tensor's (or permutation's) cosine with a, before and after.

    Args:
        frame: from `tensor_similarity`.
        title: of the picture.
    """
    bars = []
    for number, (version, rows) in enumerate(frame.groupby("version", sort=False)):
        colour = COLOURS.get(version, PALETTE[number % len(PALETTE)])
        names, values = list(rows["tensor"]), rows["cosine"].to_numpy()
        bars.append({"type": "bar", "x": names, "y": values, "name": version, "marker": {"color": colour}})
    return figure(bars, title=title, x="tensor", y="cosine with A", barmode="group")


def alignment_figure(view: AlignmentView, *, y: str = "score") -> go.Figure:
    """Draw one look at an alignment: the line between the networks, and one layer's units before and after.

    Args:
        view: from `alignment_view`.
        y: what the score measures, with its unit.
    """
    n = len(view.before)
    moved = int((view.permutations[view.perm].numpy() != np.arange(n)).sum())
    maps = [
        heatmap(view.before, limit=1.0, signed=True, label="cosine", showscale=False, xaxis="x2", yaxis="y2"),
        heatmap(view.after, limit=1.0, signed=True, label="cosine", xaxis="x3", yaxis="y3"),
    ]
    title = f"{view.perm}: {moved} of {n} units move"
    layout = {
        "xaxis2": _columns("B as it is", [0.46, 0.69]),
        "yaxis2": _rows("unit of A", anchor="x2"),
        "xaxis3": _columns("B matched", [0.76, 0.99], anchor="y3"),
        "yaxis3": _rows("", anchor="x3"),
    }
    if view.path is None:
        diagonals = [
            {"type": "scatter", "mode": "lines", "y": np.sort(np.diagonal(s))[::-1], "name": name}
            | {"line": {"color": COLOURS[name]}, "x": np.arange(n)}
            for name, s in (("naive", view.before), ("aligned", view.after))
        ]
        layout |= {"xaxis": {"domain": [0, 0.36]}, "yaxis": {"range": [-1, 1.02]}}
        return figure(
            [*diagonals, *maps], title=title, x="units, most alike first", y="cosine of a pair", height=400, **layout
        )
    lines = path_traces(view.path, mark=view.t)
    if view.barriers:
        title += "; barrier " + ", ".join(f"{name} {value:.3g}" for name, value in view.barriers.items())
    layout["xaxis"] = {"domain": [0, 0.36]}
    return figure([*lines, *maps], title=title, x="place t from A to B", y=y, height=400, **layout)


def _columns(title: str, domain: list[float], anchor: str = "y2") -> dict:
    return {"title": {"text": title}, "domain": domain, "anchor": anchor}


def _rows(title: str, anchor: str = "x") -> dict:
    return {"title": {"text": title}, "autorange": "reversed", "anchor": anchor}
