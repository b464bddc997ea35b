"""Pictures of one layer's routing, or of all layers: tokens, labels, load, entropy, co-activation."""

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from notebook_kit.diagnostics import routing as numbers
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap
from notebook_kit.routing import Routing

VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def label_of_token(text: str, longest: int = 8) -> str:
    """A token as a tick label: whitespace and control characters visible, short, and escaped for plotly."""
    text = "".join(VISIBLE.get(letter, letter if letter.isprintable() else f"\\x{ord(letter):02x}") for letter in text)
    return html.escape(text if len(text) <= longest else text[: longest - 1] + "…")


def token_figure(routing: Routing, texts: Sequence[str], *, start: int = 0, title: str = "") -> go.Figure:
    """Draw tokens x experts: colour is the probability, a circle a served claim, a cross a dropped one.

    Args:
        routing: of all tokens.
        texts: of the tokens from `start` on; as many are drawn, at most 512.
        start: the first token drawn.
        title: beginning of the title.
    """
    stop = min(start + min(len(texts), 512), len(routing))
    count, n_experts = stop - start, routing.logits.shape[1]
    z = routing.probs[start:stop].detach().numpy()
    labels = [label_of_token(text) for text in texts[:count]]
    experts = routing.experts[start:stop].numpy()
    claimed = experts if routing.claimed is None else routing.claimed[start:stop].numpy()
    data = [heatmap(z.T, x=range(count), y=range(n_experts), label="probability", limit=1.0)]
    marks = [("served", experts, "circle-open", 8), ("dropped", np.where(experts < 0, claimed, -1), "x", 7)]
    for name, used, symbol, size in marks:
        token, slot = np.nonzero(used >= 0)
        style = {"symbol": symbol, "size": size, "color": "#FFFFFF" if name == "served" else PALETTE[5]}
        points = {"type": "scatter", "mode": "markers", "x": token, "y": used[token, slot]}
        data.append({**points, "name": name, "marker": style, "hoverinfo": "skip"})
    dropped = f", {routing.dropped:.1%} of all claims dropped" if routing.claimed is not None else ""
    ticks = {"tickvals": list(range(count)), "ticktext": labels}
    ticks["tickangle"] = 0 if max(map(len, labels), default=0) <= 1 else -90
    return figure(
        data,
        title=f"{title}: tokens {start} to {stop - 1} of {len(routing)}{dropped}",
        x="token",
        y="expert",
        height=int(np.clip(180 + 22 * n_experts, 280, 760)),
        xaxis={**ticks, "tickfont": {"size": 10}, "showgrid": False, "range": [-0.5, max(count, 1) - 0.5]},
        yaxis={"range": [-0.5, n_experts - 0.5], **ticks_every(n_experts)},
        showlegend=False,
    )


def ticks_every(n: int) -> dict:
    """Ticks at whole numbers, at most about 16 of them."""
    places = list(range(0, n, max(1, n // 16)))
    return {"tickvals": places, "ticktext": [str(place) for place in places], "showgrid": False}


def layer_figure(load: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw layers x experts: each expert's share of a layer's claims.

    Args:
        load: from `load_table`.
        title: beginning of the title.
    """
    z = load.to_numpy()
    worst = float(np.nanmax(z.max(1) / np.nanmean(z, 1) - 1)) if z.size and np.nanmax(z) > 0 else 0.0
    return figure(
        [heatmap(z, x=range(z.shape[1]), y=range(len(z)), label="share of claims")],
        title=f"{title}: the busiest expert has {1 + worst:.2f} times its even share",
        x="expert",
        y="layer",
        height=int(np.clip(180 + 26 * len(z), 260, 760)),
        yaxis={"autorange": "reversed", **ticks_every(len(z))},
        xaxis=ticks_every(z.shape[1]),
    )


def label_figure(table: pd.DataFrame, information: numbers.Information | None = None, *, title: str = "") -> go.Figure:
    """Draw labels x experts: to which experts each label's tokens go.

    Args:
        table: from `specialisation`.
        information: from `mutual_information`, told in the title.
        title: beginning of the title.
    """
    names = [label_of_token(str(name), 16) for name in table.index]
    told = ""
    if information is not None:
        told = f": expert tells {information.bits:.3f} bits of the label, chance {information.chance_mean:.3f}"
    return figure(
        [heatmap(table.to_numpy(), x=range(table.shape[1]), label="share of the label's claims")],
        title=f"{title}{told}",
        x="expert",
        y="label",
        height=int(np.clip(180 + 24 * len(names), 260, 760)),
        xaxis=ticks_every(table.shape[1]),
        yaxis={"autorange": "reversed", "showgrid": False, "tickvals": list(range(len(names))), "ticktext": names},
    )


def load_figure(routing: Routing, *, title: str = "") -> go.Figure:
    """Draw each expert's share of the claims, served and dropped, with the even share as a line.

    Args:
        routing: of one layer.
        title: beginning of the title.
    """
    n_experts, dropped = routing.logits.shape[1], routing.dropped
    served = routing.load.numpy() * (1 - dropped)
    lost = np.clip(routing.demand.numpy() - served, 0, None)
    x = np.arange(n_experts)
    data = [{"type": "bar", "x": x, "y": served, "name": "served", "marker": {"color": PALETTE[0]}}]
    if routing.claimed is not None:
        data.append({"type": "bar", "x": x, "y": lost, "name": "dropped", "marker": {"color": PALETTE[5]}})
    even = {"type": "scatter", "mode": "lines", "x": np.array([-0.5, n_experts - 0.5]), "name": "even share"}
    data.append({**even, "y": np.full(2, 1 / n_experts), "line": {"color": NEUTRAL, "dash": "dash"}})
    worst = numbers.max_violation(routing.demand)
    each = float((routing.experts >= 0).sum()) / max(len(routing), 1)
    return figure(
        data,
        title=f"{title}: MaxVio {worst:.2f}, {dropped:.1%} dropped, {each:.2f} experts a token",
        x="expert",
        y="share of claims",
        barmode="stack",
        xaxis=ticks_every(n_experts),
    )


def entropy_figure(bits: Float[Tensor, " tokens"], n_experts: int, *, title: str = "") -> go.Figure:
    """Draw how sure the router is: a histogram of each token's entropy.

    Args:
        bits: from `entropy`.
        n_experts: sets the upper end, log2 N.
        title: beginning of the title.
    """
    top = max(float(np.log2(n_experts)), 1e-6)
    counts, edges = np.histogram(bits.numpy(), bins=40, range=(0, top * (1 + 1e-6)))
    bars = {"type": "bar", "x": (edges[1:] + edges[:-1]) / 2, "y": counts / max(len(bits), 1)}
    return figure(
        [{**bars, "width": edges[1] - edges[0], "marker": {"color": PALETTE[0]}, "showlegend": False}],
        title=f"{title}: mean {float(bits.mean()):.2f} of at most {top:.2f} bits",
        x="entropy of a token's probabilities (bits)",
        y="share of tokens",
        bargap=0.05,
        xaxis={"range": [0, top]},
    )


def co_activation_figure(matrix: Float[Tensor, "experts experts"], *, title: str = "") -> go.Figure:
    """Draw which experts work on the same tokens; the diagonal, an expert with itself, is left out.

    Args:
        matrix: from `co_activation`.
        title: beginning of the title.
    """
    z = matrix.numpy().copy()
    np.fill_diagonal(z, np.nan)
    return figure(
        [heatmap(z, x=range(len(z)), y=range(len(z)), label="share of tokens")],
        title=f"{title}: experts that share tokens",
        x="expert",
        y="expert",
        height=460,
        xaxis=ticks_every(len(z)),
        yaxis={"autorange": "reversed", **ticks_every(len(z))},
    )
