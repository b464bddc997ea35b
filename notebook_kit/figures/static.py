"""A still of a plotly figure, drawn by matplotlib: no browser needed. It covers the traces that the kit draws."""

import collections
import html
import io
import os
import re

import numpy as np
import plotly.graph_objects as go

from notebook_kit.figures.static_sankey import paint_sankey

DPI = 100
WIDTH = 720
_DASH = {"dash": "--", "dot": ":", "dashdot": "-.", "solid": "-"}
_MARKER = {"circle": "o", "square": "s", "diamond": "D", "x": "x", "cross": "+", "triangle-up": "^", "star": "*"}


def to_png(figure: go.Figure, *, width: int = WIDTH, dpi: int = DPI) -> bytes:
    """Draw a figure as PNG.

    Args:
        figure: heatmap, bar, scatter, histogram, box, contour and Sankey traces are drawn; others are named in the
            picture.
        width: pixels; the height is the figure's own.
        dpi: dots per inch of the file.

    Returns:
        The PNG file's bytes, white background.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layout = figure.layout
    height = layout.height or 360
    single = len({_key(trace) for trace in figure.data}) == 1
    canvas = Figure((width / DPI, height / DPI), dpi, facecolor="white", layout="constrained" if single else None)
    FigureCanvasAgg(canvas)
    colours = list(layout.colorway or ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"])
    axes: dict[tuple[str, str], object] = {}
    bars = collections.Counter(_key(trace) for trace in figure.data if trace.type == "bar")
    drawn = 0
    for trace in figure.data:
        axis = axes.get(_key(trace))
        if axis is None:
            axis = canvas.add_subplot() if single else _new_axis(canvas, figure, trace)
            axes[_key(trace)] = axis
        axis._nbk_bars = bars[_key(trace)]
        colour = colours[drawn % len(colours)]
        if not _paint_trace(axis, trace, colour, canvas, layout):
            axis.text(0.5, 0.5, f"{trace.type}: open in a notebook", ha="center", transform=axis.transAxes)
        drawn += trace.type != "heatmap"
    for key, axis in axes.items():
        _finish(axis, figure, key)
    if layout.title.text and single:
        canvas.suptitle(_plain(layout.title.text), x=0.01, ha="left", fontsize=11)
    elif layout.title.text:
        canvas.text(0.01, 0.985, _plain(layout.title.text), ha="left", va="top", fontsize=11)
    for note in () if any(trace.type == "sankey" for trace in figure.data) else layout.annotations or ():
        if note.xref == "paper" and note.yref == "paper" and note.text:
            canvas.text(
                note.x * 0.84 + 0.1, note.y * 0.74 + 0.14, _plain(note.text), fontsize=9, ha="center", va="bottom"
            )
    file = io.BytesIO()
    canvas.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


def _paint_trace(axis, trace, colour, canvas, layout) -> bool:
    """Draw one trace; False where this file cannot, because a still must not take the live figure with it."""
    painter = _PAINTERS.get(trace.type)
    if painter is None:
        return False
    if trace.type != "sankey" and not any(getattr(trace, key, None) is not None for key in "xyz"):
        return True
    try:
        painter(axis, trace, colour, canvas, layout)
    except (TypeError, ValueError, IndexError):
        if os.environ.get("NOTEBOOK_KIT_STRICT"):
            raise
        return False
    return True


def _mpl(colour):
    """plotly writes rgb(1, 2, 3) and rgba(1, 2, 3, 0.5) where matplotlib takes numbers from 0 to 1."""
    found = re.fullmatch(r"rgba?\(([^)]*)\)", colour.strip()) if isinstance(colour, str) else None
    if not found:
        return colour
    red, green, blue, *alpha = (float(part) for part in found[1].split(","))
    return (red / 255, green / 255, blue / 255, *alpha)


def _marker_paint(colour, otherwise):
    """One colour, or one for each point; numbers stay numbers, matplotlib maps them."""
    if colour is None:
        return otherwise
    return _mpl(colour) if isinstance(colour, str) else [_mpl(each) for each in colour]


def _key(trace) -> tuple[str, str]:
    return getattr(trace, "xaxis", None) or "x", getattr(trace, "yaxis", None) or "y"


def _layout_axis(figure: go.Figure, name: str):
    key = f"{name[0]}axis{name[1:]}"
    return figure.layout[key] if key in figure.layout else None  # noqa: SIM401  plotly's layout has no get


def _new_axis(canvas, figure: go.Figure, trace):
    """Place an axis by plotly's domains, inside margins that leave room for title and labels."""
    x, y = (_layout_axis(figure, name) for name in _key(trace))
    x0, x1 = (x.domain if x is not None and x.domain else None) or (0, 1)
    y0, y1 = (y.domain if y is not None and y.domain else None) or (0, 1)
    top = 0.88 if figure.layout.title.text else 0.95
    room = (0.12, 0.17, 0.86 if any(t.type == "heatmap" for t in figure.data) else 0.85, top - 0.17)
    box = (room[0] + x0 * room[2], room[1] + y0 * room[3], (x1 - x0) * room[2], (y1 - y0) * room[3])
    return canvas.add_axes(box)


def _finish(axis, figure: go.Figure, key: tuple[str, str]) -> None:
    if not axis.axison:
        return
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    for name, set_label, set_scale, set_limits in (
        (key[0], axis.set_xlabel, axis.set_xscale, axis.set_xlim),
        (key[1], axis.set_ylabel, axis.set_yscale, axis.set_ylim),
    ):
        style = _layout_axis(figure, name)
        if style is None:
            continue
        if style.title.text:
            set_label(_plain(style.title.text), fontsize=9)
        if style.type == "log":
            set_scale("log")
        if style.range:
            set_limits(*(10 ** np.asarray(style.range, float) if style.type == "log" else style.range))
        elif style.autorange == "reversed" and name[0] == "y" and not axis.yaxis_inverted():
            axis.invert_yaxis()
        if style.tickvals is not None and style.ticktext is not None:
            setter = axis.set_xticks if name[0] == "x" else axis.set_yticks
            setter(list(style.tickvals), [_plain(str(text)) for text in style.ticktext])
    if not axis.images and not getattr(axis, "_nbk_bar", False):
        axis.grid(alpha=0.25)
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > 1 and figure.layout.showlegend is not False:
        above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": len(labels), "columnspacing": 1}
        axis.legend(handles, labels, fontsize=8, frameon=False, **(above if len(labels) > 6 else {}))


def _scatter(axis, trace, colour, canvas, layout) -> None:
    mode = trace.mode or "lines"
    line = _mpl(trace.line.color or (trace.marker.color if isinstance(trace.marker.color, str) else None) or colour)
    x = list(trace.x) if trace.x is not None else list(range(len(trace.y)))
    y = list(trace.y) if trace.y is not None else list(range(len(x)))
    style = {"label": _plain(trace.name) if trace.name else None}
    if "lines" in mode:
        style |= {
            "color": line,
            "linestyle": _DASH.get(trace.line.dash or "solid", "-"),
            "linewidth": trace.line.width or 2,
        }
        if "markers" in mode:
            style |= {"marker": _MARKER.get(trace.marker.symbol or "circle", "o"), "markersize": 4}
        axis.plot(x, y, **style)
    elif "markers" in mode:
        paint = _marker_paint(trace.marker.color, line)
        size = trace.marker.size if isinstance(trace.marker.size, (int, float)) else 7
        marker = _MARKER.get(trace.marker.symbol if isinstance(trace.marker.symbol, str) else "circle", "o")
        one = {"color": paint} if isinstance(paint, (str, tuple)) else {"c": paint}
        axis.scatter(x, y, **one, s=size**2 / 2, marker=marker, **style)
    if "text" in mode and trace.text is not None:
        place = {"xytext": (3, 3), "textcoords": "offset points"}
        if trace.textposition == "middle center":
            place = {"ha": "center", "va": "center_baseline"}
            family = "monospace" if "mono" in (trace.textfont.family or "").lower() else None
            place |= {"family": family} if family else {}
        for px, py, text in zip(x, y, np.broadcast_to(np.asarray(trace.text), (len(x),)), strict=True):
            axis.annotate(_plain(str(text)), (px, py), fontsize=8, **place)


def _bar(axis, trace, colour, canvas, layout) -> None:
    flat = trace.orientation == "h"
    names, values = (trace.y, trace.x) if flat else (trace.x, trace.y)
    names = list(range(len(values))) if names is None else [_plain(n) if isinstance(n, str) else n for n in names]
    groups = getattr(axis, "_nbk_groups", 0)
    axis._nbk_groups, axis._nbk_bar = groups + 1, True
    numeric = all(not isinstance(name, str) for name in names)
    at = np.asarray(names, float) if numeric else np.arange(len(names), dtype=float)
    paint = _marker_paint(trace.marker.color, colour)
    base = 0 if trace.base is None else trace.base if isinstance(trace.base, (int, float)) else np.asarray(trace.base)
    stacked = layout.barmode == "stack"
    bottom = getattr(axis, "_nbk_stack", np.zeros(len(at))) if stacked and len(at) else base
    total = 1 if stacked or layout.barmode == "overlay" else axis._nbk_bars
    width = trace.width if isinstance(trace.width, (int, float)) and total == 1 else 0.8 / total
    offset = 0.0 if total == 1 else (groups - (total - 1) / 2) * width
    label = _plain(trace.name) if trace.name else None
    numbers = np.asarray([np.nan if v is None else v for v in values], float)
    if flat:
        axis.barh(at + offset, numbers, height=width, left=bottom, color=paint, label=label)
    else:
        axis.bar(at + offset, numbers, width=width, bottom=bottom, color=paint, label=label)
    if stacked:
        axis._nbk_stack = bottom + np.nan_to_num(numbers)
    if not numeric:
        ticks = axis.set_yticks if flat else axis.set_xticks
        ticks(at, names)
        if not flat and sum(map(len, names)) > 70:
            axis.tick_params(axis="x", rotation=30)


def _heatmap(axis, trace, colour, canvas, layout) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    scale = trace.colorscale
    stops = [(float(at), _mpl(paint)) for at, paint in scale] if scale else [(0, "#00204D"), (1, "#FFEA46")]
    z = np.asarray(trace.z, dtype=float)
    x, y = (_centres(values, n) for values, n in ((trace.x, z.shape[1]), (trace.y, z.shape[0])))
    extent = (x[0] - x[1] / 2, x[0] + x[1] * (z.shape[1] - 0.5), y[0] - y[1] / 2, y[0] + y[1] * (z.shape[0] - 0.5))
    colours = LinearSegmentedColormap.from_list("scale", stops)
    image = axis.imshow(
        z,
        cmap=colours,
        vmin=trace.zmin,
        vmax=trace.zmax,
        origin="lower",
        aspect="auto",
        extent=extent,
        interpolation="nearest",
    )
    for values, ticks, room in ((trace.x, axis.set_xticks, 60), (trace.y, axis.set_yticks, 22)):
        if values is not None and len(values) and isinstance(values[0], str):
            longest = max(len(_plain(text)) for text in values) if room == 60 else 1
            every = max(1, int(np.ceil(len(values) * longest / room)))
            places = range(0, len(values), every)
            ticks(list(places), [_plain(values[i]) for i in places])
    if trace.showscale is not False:
        bar = canvas.colorbar(image, ax=axis, fraction=0.04, pad=0.02)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
        if trace.colorbar.title.text:
            bar.set_label(_plain(trace.colorbar.title.text), fontsize=9)


def _centres(values, count: int) -> tuple[float, float]:
    if values is None or isinstance(values[0], str):
        return 0.0, 1.0
    return float(values[0]), float(values[1] - values[0]) if count > 1 else 1.0


def _histogram(axis, trace, colour, canvas, layout) -> None:
    paint = _mpl(trace.marker.color) if isinstance(trace.marker.color, str) else colour
    label = _plain(trace.name) if trace.name else None
    flat = {"orientation": "horizontal"} if trace.x is None else {}
    values = np.asarray(trace.y if flat else trace.x, float)
    axis.hist(values, bins=trace.nbinsx or 30, color=paint, alpha=trace.opacity or 1, label=label, **flat)


def _box(axis, trace, colour, canvas, layout) -> None:
    place = getattr(axis, "_nbk_groups", 0)
    axis._nbk_groups = place + 1
    axis.boxplot(np.asarray(trace.y, float), positions=[place], tick_labels=[_plain(trace.name or "")], widths=0.6)


def _contour(axis, trace, colour, canvas, layout) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    stops = (
        [(float(at), _mpl(paint)) for at, paint in trace.colorscale]
        if trace.colorscale
        else [(0, "#00204D"), (1, "#FFEA46")]
    )
    z = np.asarray(trace.z, float)
    x = np.arange(z.shape[1]) if trace.x is None else np.asarray(trace.x, float)
    y = np.arange(z.shape[0]) if trace.y is None else np.asarray(trace.y, float)
    filled = axis.contourf(x, y, z, levels=14, cmap=LinearSegmentedColormap.from_list("scale", stops))
    if trace.showscale is not False:
        canvas.colorbar(filled, ax=axis, fraction=0.04, pad=0.02)


def _sankey(axis, trace, colour, canvas, layout) -> None:
    paint_sankey(axis, trace, layout, colour, paint=_mpl, plain=_plain)


_PAINTERS = {
    "scatter": _scatter,
    "scattergl": _scatter,
    "bar": _bar,
    "heatmap": _heatmap,
    "histogram": _histogram,
    "box": _box,
    "contour": _contour,
    "sankey": _sankey,
}


def _plain(text: str) -> str:
    """plotly's markup is dropped, escaped text comes back, and matplotlib's dollar signs stay dollars."""
    text = re.sub(r"</?(b|i|br|sub|sup|span)[^>]*>", " ", str(text))
    return html.unescape(text).replace("$", r"\$")
