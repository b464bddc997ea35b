"""One house style: every figure of the kit is made by `figure`, with colours from here.

Colours are Okabe and Ito's, told apart with any colour vision; sequential maps are cividis-like, signed ones are
centred on zero. Text and lines carry no colour of their own: the widget gives them the notebook theme's.
"""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import plotly.io as pio

# A template would be deep-copied into every figure; ours is small enough to be spelled out.
pio.templates.default = None

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8A8A8A")
NEUTRAL = "#8A8A8A"
SEQUENTIAL = [
    [0.0, "#00204D"],
    [0.2, "#2D446E"],
    [0.4, "#666970"],
    [0.6, "#958F78"],
    [0.8, "#CBBA69"],
    [1.0, "#FFEA46"],
]
DIVERGING = [[0.0, "#2166AC"], [0.25, "#92C5DE"], [0.5, "#F7F7F7"], [0.75, "#F4A582"], [1.0, "#B2182B"]]
GRID = "rgba(128,128,128,0.25)"
FONT = {"family": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", "size": 13}


def figure(
    data: Sequence[Mapping],
    *,
    title: str = "",
    x: str = "",
    y: str = "",
    height: int = 360,
    **layout,
) -> go.Figure:
    """Make a figure in the house style.

    Args:
        data: plotly traces as dicts; scatter and bar traces without a colour get the palette's next.
        title: one line, left-aligned.
        x: title of the x axis, with its unit.
        y: title of the y axis, with its unit.
        height: pixels.
        layout: more of plotly's layout; `xaxis` and `yaxis` are merged with the titles.

    Returns:
        go.Figure
    """
    data = list(data)
    named = sum(bool(trace.get("name")) and trace.get("showlegend", True) for trace in data)
    top = (44 if title else 12) + (26 if named > 1 else 8)  # room for the title, then for the legend
    xaxis = {"title": {"text": x}, "gridcolor": GRID, "zerolinecolor": GRID, "automargin": True}
    yaxis = {"title": {"text": y, "standoff": 10}, "gridcolor": GRID, "zerolinecolor": GRID, "automargin": True}
    style = {
        "title": {
            "text": title,
            "x": 0.01,
            "xanchor": "left",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 14},
            "font": {"size": 15},
        },
        "font": FONT,
        "height": height,
        "margin": {"l": 64, "r": 24, "t": top, "b": 52},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": list(PALETTE),
        "bargap": 0.25,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        "hovermode": "closest",
    }
    for axis in [key for key in layout if key.startswith(("xaxis", "yaxis"))]:
        own = xaxis if axis == "xaxis" else yaxis if axis == "yaxis" else {**xaxis, "title": {"text": ""}}
        layout[axis] = own | layout[axis]
    return go.Figure(data=data, layout={"xaxis": xaxis, "yaxis": yaxis} | style | layout)


def heatmap(
    z,
    *,
    x: Sequence | None = None,
    y: Sequence | None = None,
    label: str = "",
    signed: bool = False,
    limit: float | tuple[float, float] | None = None,
    **trace,
) -> dict:
    """A heatmap trace; a signed one is centred on zero.

    Args:
        z: Float[rows, columns]; row 0 is drawn at the top if the figure sets `yaxis={"autorange": "reversed"}`.
        x: names of the columns.
        y: names of the rows.
        label: title of the colour bar, with its unit.
        signed: zero gets the neutral colour.
        limit: largest magnitude (signed) or upper end or (lower, upper) of the colour scale; from the data when None.
            Give it wherever pictures are compared, so that a colour means the same in both.
        trace: more of plotly's heatmap trace.
    """
    import numpy as np

    z = np.asarray(z, dtype=np.float32)
    finite = z[np.isfinite(z)]
    if signed:
        top = float(limit) if limit is not None else float(np.abs(finite).max(initial=0)) or 1.0
        low, high = -top, top
    elif isinstance(limit, tuple):
        low, high = limit
    else:
        low = min(0.0, float(finite.min(initial=0)))
        high = float(limit) if limit is not None else float(finite.max(initial=0)) or 1.0
    style = {
        "type": "heatmap",
        "z": z,
        "zmin": low,
        "zmax": high,
        "colorscale": DIVERGING if signed else SEQUENTIAL,
        "colorbar": {"title": {"text": label, "side": "right"}, "thickness": 12, "outlinewidth": 0},
    }
    if x is not None:
        style["x"] = list(x)
    if y is not None:
        style["y"] = list(y)
    return style | trace
