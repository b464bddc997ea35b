"""Pictures of routing that follow tokens: through a text, from layer to layer, from checkpoint to checkpoint."""

import html
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from notebook_kit.diagnostics import routing as numbers
from notebook_kit.figures.routing_pictures import label_of_token, ticks_every
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap
from notebook_kit.routing import Routing

LETTERS, LINES = 64, 9  # of the picture of a text
MONOSPACE = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
SHOWN = 12  # experts of a layer in the flow; the others are one
PLOT = 340  # pixels of the flow's height
PAD = 8  # pixels between two experts


def expert_colours(n_experts: int) -> list[str]:
    """A colour for each expert: the palette, and beyond eight its hues again, lighter and darker."""
    colours = [tuple(int(text[i : i + 2], 16) for i in (1, 3, 5)) for text in PALETTE]
    shades = (0.0, 0.45, -0.35)
    out = []
    for i in range(n_experts):
        shade = shades[i // len(colours) % len(shades)]
        target = 255 if shade > 0 else 0
        out.append("#" + "".join(f"{round(c + (target - c) * abs(shade)):02X}" for c in colours[i % len(colours)]))
    return out


def faded(colour: str, alpha: float) -> str:
    """A colour #rrggbb with transparency, as plotly writes it."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def text_figure(routing: Routing, texts: Sequence[str], *, start: int = 0, title: str = "") -> go.Figure:
    """Draw a text, each token on the colour of the expert that counts most for it.

    Args:
        routing: of all tokens.
        texts: of the tokens from `start` on; as many are drawn as fit.
        start: the first token drawn.
        title: beginning of the title.
    """
    labels = [label_of_token(text, 24) for text in texts[: len(routing) - start]]
    x, line = _places([max(len(html.unescape(label)), 1) for label in labels])
    count = int((line < LINES).sum())
    width = np.array([max(len(html.unescape(label)), 1) for label in labels[:count]], dtype=np.float32)
    x, line = x[:count], line[:count]
    leaders = numbers.leading(routing)[start : start + count].numpy()
    n_experts = routing.logits.shape[1]
    scores = routing.probs[start : start + count].detach().numpy()
    data = []
    for expert, colour in enumerate(expert_colours(n_experts)):
        mine = np.flatnonzero(leaders == expert)
        bars = {"type": "bar", "orientation": "h", "x": width[mine], "base": x[mine], "y": line[mine], "width": 0.9}
        about = {"customdata": np.stack([mine + start, scores[mine, expert]], 1)}
        about["hovertemplate"] = f"token %{{customdata[0]}}: expert {expert}, %{{customdata[1]:.2f}}<extra></extra>"
        marker = {"color": faded(colour, 0.55), "line": {"width": 0}}
        data.append({**bars, **about, "name": str(expert), "marker": marker})
    font = {"family": MONOSPACE, "size": 13}
    words = {"type": "scatter", "mode": "text", "text": labels[:count], "textfont": font, "hoverinfo": "skip"}
    data.append({**words, "x": x + width / 2, "y": line, "showlegend": False, "textposition": "middle center"})
    nobody = f", {(leaders < 0).mean():.0%} of these have none" if (leaders < 0).any() else ""
    firsts = [start + int(np.flatnonzero(line == row)[0]) for row in range(int(line.max()) + 1)] if count else []
    return figure(
        data,
        title=f"{title}: the text, coloured by expert{nobody}",
        x="letter of the line",
        y="token",
        height=388,
        barmode="overlay",
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"}
        | {"title": {"text": "expert", "side": "left"}},
        showlegend=n_experts <= 16,
        xaxis={"range": [0, LETTERS], "showgrid": False, "zeroline": False},
        yaxis={
            "range": [LINES - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
            "tickvals": list(range(len(firsts))),
            "ticktext": [str(first) for first in firsts],
        },
    )


def _places(widths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where each token begins, and in which line, if lines are broken between tokens."""
    x, line, at, row = [], [], 0, 0
    for width in widths:
        if at and at + width > LETTERS:
            at, row = 0, row + 1
        x.append(at)
        line.append(row)
        at += width
    return np.array(x, dtype=np.float32), np.array(line, dtype=np.int32)


def flow_figure(routings: Sequence[Routing], *, first_layer: int = 0, title: str = "") -> go.Figure:
    """Draw from which expert of a layer the tokens go to which expert of the next: a Sankey diagram.

    Args:
        routings: of consecutive layers, two at least, of the same tokens. Of more than 12 experts the busiest 11 are
            shown, and the others as one.
        first_layer: number of the first.
        title: beginning of the title.

    Raises:
        ValueError: one layer only.
    """
    if len(routings) < 2:
        raise ValueError(f"a flow needs two layers at least, got {len(routings)}")
    own = [_busiest(routing) for routing in routings]
    whole = [numbers.flows(a, b).numpy() for a, b in pairwise(routings)]
    favourite = np.mean([table.max(1).sum() / max(table.sum(), 1e-9) for table in whole])
    tables = [_lumped(_lumped(table, i).T, j).T for table, (i, j) in zip(whole, pairwise(own), strict=True)]
    names = [[*map(str, o), *["others"] * (len(o) < r.logits.shape[1])] for o, r in zip(own, routings, strict=True)]
    colours = [
        [expert_colours(routing.logits.shape[1])[expert] for expert in mine] + [NEUTRAL] * (len(called) - len(mine))
        for routing, mine, called in zip(routings, own, names, strict=True)
    ]
    first_node = np.cumsum([0, *map(len, names)])
    source, target, value, paint = [], [], [], []
    for step, table in enumerate(tables):
        rows, columns = np.nonzero(table)
        source.append(first_node[step] + rows)
        target.append(first_node[step + 1] + columns)
        value.append(table[rows, columns])
        paint += [faded(colours[step][row], 0.4) for row in rows]
    link = {"source": np.concatenate(source), "target": np.concatenate(target), "value": np.concatenate(value)}
    link |= {"color": paint, "hovertemplate": "%{source.label} to %{target.label}: %{value}<extra></extra>"}
    # A node is as high as what comes in or goes out, whichever is more.
    sizes = [table.sum(1) for table in tables] + [tables[-1].sum(0)]
    for after, table in enumerate(tables[:-1], 1):
        sizes[after] = np.maximum(sizes[after], table.sum(0))
    nodes = {"label": [*chain(*names)], "color": [*chain(*colours)], "pad": PAD, "thickness": 16, "line": {"width": 0}}
    # plotly takes 0 for "not given".
    nodes["x"] = np.repeat(np.linspace(0.001, 0.999, len(names)), [len(called) for called in names])
    nodes |= {"y": _heights(sizes), "hovertemplate": "expert %{label}: %{value} of the tokens<extra></extra>"}
    notes = [
        {"text": f"layer {first_layer + i}", "x": i / (len(names) - 1), "xanchor": anchor}
        | {"xref": "paper", "yref": "paper", "y": 1.0, "yanchor": "bottom", "showarrow": False}
        for i, anchor in enumerate(["left", *["center"] * (len(names) - 2), "right"])
    ]
    return figure(
        [{"type": "sankey", "arrangement": "fixed", "valueformat": ".1%", "node": nodes, "link": link}],
        title=f"{title}: {favourite:.0%} of tokens go on to their expert's favourite; heights are shares of tokens",
        height=PLOT + 96,
        margin={"l": 24, "r": 24, "t": 72, "b": 24},
        annotations=notes,
    )


def _busiest(routing: Routing) -> list[int]:
    """The experts that get a node of their own."""
    n_experts = routing.logits.shape[1]
    if n_experts <= SHOWN:
        return list(range(n_experts))
    counts = torch.bincount(numbers.leading(routing) + 1, minlength=n_experts + 1)[1:]
    return sorted(counts.sort(descending=True, stable=True).indices[: SHOWN - 1].tolist())


def _lumped(table: np.ndarray, own: list[int]) -> np.ndarray:
    """Rows of their own, then the sum of the others."""
    if len(own) == len(table):
        return table
    return np.concatenate([table[own], np.delete(table, own, axis=0).sum(0, keepdims=True)])


def _heights(sizes: Sequence[np.ndarray]) -> np.ndarray:
    """Centre of every node from the top, so that experts stand in order; all columns share plotly's own scale."""
    scale = min((PLOT - PAD * (len(column) - 1)) / max(column.sum(), 1e-9) for column in sizes)
    centres = []
    for column in sizes:
        tall = column * scale
        above = (PLOT - tall.sum() - PAD * (len(column) - 1)) / 2
        centres.append(above + np.cumsum(tall) - tall / 2 + PAD * np.arange(len(column)))
    return np.clip(np.concatenate(centres) / PLOT, 0.001, 0.999)


def drift_figure(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw how far two checkpoints route the same tokens differently, layer by layer.

    Args:
        table: from `drift_table`.
        title: beginning of the title.
    """
    shown = {"best_changed": "another best expert", "set_changed": "another set of experts"}
    x = np.arange(len(table))
    bars = [{"type": "bar", "x": x, "y": table[c].to_numpy(np.float32), "name": name} for c, name in shown.items()]
    return figure(
        bars,
        title=f"{title}: {table['best_changed'].mean():.1%} of tokens have another best expert in the other checkpoint",
        x="layer",
        y="share of tokens",
        xaxis=ticks_every(len(table)),
        yaxis={"range": [0, 1]},
    )


def confusion_figure(first: Routing, then: Routing, *, title: str = "") -> go.Figure:
    """Draw where each expert's tokens are in the other checkpoint.

    Args:
        first: routing of some tokens.
        then: of the same tokens, by the other checkpoint.
        title: beginning of the title.
    """
    z = numbers.transitions(first, then).numpy()
    stay = float((numbers.leading(first) == numbers.leading(then)).float().mean())
    return figure(
        [heatmap(z, x=range(z.shape[1]), y=range(len(z)), label="share of the expert's tokens", limit=1.0)],
        title=f"{title}: {stay:.1%} of tokens keep their best expert",
        x="expert in the other checkpoint",
        y="expert",
        height=460,
        xaxis=ticks_every(z.shape[1]),
        yaxis={"autorange": "reversed", **ticks_every(len(z))},
    )
