"""A still of a Sankey diagram, drawn by matplotlib."""

from collections.abc import Callable

import numpy as np


def paint_sankey(axis, trace, layout, colour: str, *, paint: Callable, plain: Callable) -> None:
    """Draw nodes in columns, as high as their flow, and bands between them; placed as the figure says, or by rank.

    Args:
        axis: of matplotlib.
        trace: plotly's Sankey.
        layout: of the figure; its notes on the paper are headings of columns.
        colour: of nodes that have none.
        paint: turns plotly's colours into matplotlib's.
        plain: turns plotly's text into matplotlib's.
    """
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path

    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.set_ylim(1, -0.06)
    for note in layout.annotations or ():
        place = 0.02 + note.x * 0.94 if note.xanchor != "center" else 0.03 + note.x * 0.92
        axis.text(place, -0.02, plain(note.text), ha=note.xanchor or "center", va="bottom", fontsize=9)
    source, target = (np.asarray(trace.link[end], int) for end in ("source", "target"))
    value = np.asarray(trace.link.value, float)
    if not len(value):
        return
    n = int(max(source.max(), target.max())) + 1
    if trace.node.label is not None:
        n = max(n, len(trace.node.label))
    out, into = (np.bincount(end, value, n) for end in (source, target))
    size = np.maximum(out, into)
    x, column = _columns(trace, source, target, n)
    pad = (15 if trace.node.pad is None else trace.node.pad) / (layout.height or 360)
    members = [np.flatnonzero(column == c) for c in np.unique(column)]
    if trace.node.y is not None and len(trace.node.y) == n:
        members = [nodes[np.argsort(np.asarray(trace.node.y, float)[nodes], kind="stable")] for nodes in members]
    scale = min((1 - pad * (len(nodes) - 1)) / max(size[nodes].sum(), 1e-12) for nodes in members)
    top = np.zeros(n)
    for nodes in members:
        heights = size[nodes] * scale
        begin = (1 - heights.sum() - pad * (len(nodes) - 1)) / 2
        top[nodes] = begin + np.cumsum(heights) - heights + pad * np.arange(len(nodes))
    width, left = 0.02, 0.02 + x * 0.92
    leaving, coming = top.copy(), top.copy()
    starts, ends = np.zeros(len(value)), np.zeros(len(value))
    for link in np.lexsort((top[target], source)):  # bands leave a node in the order of where they go
        starts[link] = leaving[source[link]]
        leaving[source[link]] += value[link] * scale
    for link in np.lexsort((top[source], target)):
        ends[link] = coming[target[link]]
        coming[target[link]] += value[link] * scale
    paints = _each(trace.link.color, len(value), "rgba(128,128,128,0.35)")
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    for link, own in enumerate(paints):
        x0, x1, h = left[source[link]] + width, left[target[link]], value[link] * scale
        middle, y0, y1 = (x0 + x1) / 2, starts[link], ends[link]
        points = [(x0, y0), (middle, y0), (middle, y1), (x1, y1), (x1, y1 + h), (middle, y1 + h), (middle, y0 + h)]
        axis.add_patch(PathPatch(Path([*points, (x0, y0 + h), (x0, y0)], codes), facecolor=paint(own), linewidth=0))
    labels = _each(trace.node.label, n, "")
    for node, own in enumerate(_each(trace.node.color, n, colour)):
        axis.add_patch(Rectangle((left[node], top[node]), width, size[node] * scale, facecolor=paint(own)))
        if size[node]:
            last = column[node] == column.max()
            at = (left[node] - 0.006, "right") if last else (left[node] + width + 0.006, "left")
            axis.text(at[0], top[node] + size[node] * scale / 2, plain(labels[node]), ha=at[1], va="center", fontsize=8)


def _columns(trace, source, target, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each node stands from left to right in [0, 1], and the number of its column."""
    if trace.node.x is not None and len(trace.node.x) == n:
        x = np.asarray(trace.node.x, float)
        return x, np.unique(x.round(3), return_inverse=True)[1]
    rank = np.zeros(n, int)
    for _ in range(n):  # the longest way from a beginning
        np.maximum.at(rank, target, rank[source] + 1)
        rank = np.minimum(rank, n - 1)
    return rank / max(rank.max(), 1), rank


def _each(values, n: int, otherwise) -> list:
    if values is None or isinstance(values, str):
        return [otherwise if values is None else values] * n
    return list(values)
