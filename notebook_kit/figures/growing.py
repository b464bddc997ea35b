"""Pictures of mixtures that grow out of a dense model: cooling gates, shared channels, experts known ahead."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from notebook_kit.diagnostics import growing as numbers
from notebook_kit.diagnostics.dynamic_routing import experts_per_token
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures import expert_cache, keep_channels

SHOWN = 60  # tokens side by side


def gate_view(
    snapshots: Float[Tensor, "moments tokens experts"],
    steps: Sequence[int],
    *,
    moment: Annotated[int, Range(0, 1000)] = 0,
    temperature: Annotated[float, Range(0.05, 5, log=True)] = 1.0,
    threshold: Annotated[float, Range(1e-5, 0.5, log=True)] = 1e-3,
    noise: bool = True,
    hard: bool = False,
) -> go.Figure:
    """Draw a dense-to-sparse gate over recorded logits: who is active, and how many experts a token has.

    Args:
        snapshots: logits of the same tokens at some steps of training.
        steps: at which.
        moment: which snapshot; beyond the last it is the last.
        temperature: τ.
        threshold: c, gates at or below it are cut (dark).
        noise: with Gumbel noise, the same at every setting.
        hard: the largest gate only.

    Returns:
        go.Figure
    """
    moment = min(moment, len(snapshots) - 1)
    settings = {"temperature": temperature, "threshold": threshold, "hard": hard, "noise": noise}
    routing = numbers.gate_at(snapshots[moment], **settings)
    counts, n_experts = experts_per_token(routing), routing.logits.shape[1]
    used = torch.zeros(len(routing), n_experts + 1).scatter_(1, routing.experts + 1, 1.0)[:, 1:]
    gates = (routing.probs * used)[:SHOWN].T.numpy()
    z = np.where(gates > 0, np.log10(np.clip(gates, 1e-5, 1)), np.nan)  # colour tells orders of magnitude
    square = heatmap(z, x=range(gates.shape[1]), y=range(n_experts), label="gate", limit=(-5.0, 0.0))
    ticks = {"tickvals": [-5, -4, -3, -2, -1, 0], "ticktext": ["1e-5", "1e-4", "0.001", "0.01", "0.1", "1"]}
    square["colorbar"] = square["colorbar"] | {"y": 0.78, "len": 0.5} | ticks
    share = torch.bincount(counts, minlength=n_experts + 1)[1:].float() / max(len(counts), 1)
    mean = float(counts.float().mean()) if len(counts) else 0.0
    bars = {"type": "bar", "x": np.arange(1, n_experts + 1), "y": share.numpy(), "showlegend": False}
    return figure(
        [square, bars | {"marker": {"color": PALETTE[0]}, "xaxis": "x2", "yaxis": "y2"}],
        title=f"step {steps[moment]}, temperature {temperature:.2g}: {mean:.2f} of {n_experts} experts a token",
        x="token",
        y="expert",
        height=520,
        xaxis={"showgrid": False, "anchor": "y"},
        yaxis={"showgrid": False, "dtick": max(n_experts // 8, 1), "domain": [0.54, 1]},
        xaxis2={"title": {"text": "active experts of a token"}, "anchor": "y2", "dtick": max(n_experts // 16, 1)},
        yaxis2={"title": {"text": "share of tokens"}, "anchor": "x2", "range": [0, 1], "domain": [0, 0.34]},
    )


def schedule_view(
    snapshots: Float[Tensor, "moments tokens experts"],
    steps: Sequence[int],
    measured: Sequence[float],
    *,
    duration: Annotated[int, Range(1, 1_000_000)] = 100,
    temperature: Annotated[float, Range(0.05, 10, log=True)] = 2.0,
    final_temperature: Annotated[float, Range(0.05, 10, log=True)] = 0.1,
    decay: Annotated[str, Choice("exponential", "linear", "constant")] = "exponential",
    threshold: Annotated[float, Range(1e-5, 0.5, log=True)] = 1e-3,
) -> go.Figure:
    """Draw a temperature schedule, and how many experts it would leave of recorded logits.

    Args:
        snapshots: logits of the same tokens at some steps of training.
        steps: at which.
        measured: mean active experts at every step of the run that was recorded.
        duration: D, steps until the gate is at its final temperature.
        temperature: at step 0.
        final_temperature: at step D; above the first it counts as the first.
        decay: exponential, linear or constant.
        threshold: c.

    Returns:
        go.Figure
    """
    schedule = {"temperature": temperature, "final_temperature": final_temperature, "decay": decay}
    course = numbers.active_course(snapshots, steps, duration=duration, threshold=threshold, **schedule)
    x = course["step"].to_numpy()
    line = {"type": "scatter", "mode": "lines+markers", "x": x}
    ran = {"type": "scatter", "mode": "lines", "x": np.arange(len(measured)), "y": np.asarray(measured)}
    return figure(
        [
            ran | {"name": "as trained", "line": {"color": NEUTRAL, "width": 1}},
            line | {"y": course["experts"].to_numpy(), "name": "this schedule", "line": {"color": PALETTE[0]}},
            line
            | {"y": course["temperature"].to_numpy(), "name": "temperature", "yaxis": "y2"}
            | {"line": {"color": PALETTE[5], "dash": "dot"}, "marker": {"size": 4}},
        ],
        title=f"{decay}: {course['experts'].iloc[0]:.1f} to {course['experts'].iloc[-1]:.1f} experts a token",
        x="training step",
        y="active experts a token, mean",
        height=360,
        yaxis={"range": [0, snapshots.shape[2] * 1.05]},
        yaxis2={"title": {"text": "temperature"}, "overlaying": "y", "side": "right", "showgrid": False}
        | {"rangemode": "tozero", "anchor": "x", "tickmode": "auto"},
    )


def growth_figure(
    courses: Mapping[str, Sequence[float]], dead: Mapping[str, Sequence[int]], n_experts: int
) -> go.Figure:
    """Draw how many experts each scheme of training uses, and how many it leaves unused.

    Args:
        courses: scheme to mean active experts at every step.
        dead: scheme to the number of experts without a token at the end, one number a seed.
        n_experts: N.
    """
    colours = dict(zip([*courses, *(name for name in dead if name not in courses)], PALETTE * 4, strict=False))
    data = []
    for name, course in courses.items():
        points = {"x": np.arange(1, len(course) + 1), "y": np.asarray(course), "name": name}
        data.append({"type": "scatter", "mode": "lines", "line": {"color": colours[name]}} | points)
    for name, counts in dead.items():
        dots = {"x": [name] * len(counts), "y": list(counts), "mode": "markers", "type": "scatter", "showlegend": False}
        spread = {"marker": {"color": colours[name], "size": 11, "opacity": 0.7}}
        bar = {"type": "bar", "x": [name], "y": [float(np.mean(counts))], "showlegend": False, "opacity": 0.45}
        data += [
            bar | {"marker": {"color": colours[name]}, "xaxis": "x2", "yaxis": "y2"},
            dots | spread | {"xaxis": "x2", "yaxis": "y2"},
        ]
    return figure(
        data,
        title="From dense to sparse",
        x="training step",
        y="active experts a token, mean",
        height=360,
        xaxis={"domain": [0, 0.52]},
        yaxis={"range": [0, n_experts * 1.05]},
        xaxis2={"domain": [0.64, 1], "anchor": "y2", "type": "category"},
        yaxis2={"title": {"text": "unused experts (dots: seeds)"}, "anchor": "x2", "range": [0, n_experts]},
    )


def channel_view(
    scores: Float[Tensor, "layers n_domains d_ff"],
    names: Sequence[str],
    *,
    density: Annotated[float, Range(0.01, 1.0, step=0.01)] = 0.5,
    layer: Annotated[int, Range(0, 255)] = 0,
) -> go.Figure:
    """Draw which hidden channels each domain keeps, and how much of its activation they hold.

    Args:
        scores: mean |a|, from `channel_scores`.
        names: of the domains.
        density: share of the channels that an expert has.
        layer: which one.

    Returns:
        go.Figure
    """
    layer = min(layer, len(scores) - 1)
    kept = keep_channels(scores, density=density)
    table, mask = numbers.mask_table(kept).iloc[layer], kept[layer].int()
    n, d_ff = mask.shape
    shared = mask.sum(0)
    key = shared * 2**n + (mask * 2 ** torch.arange(n - 1, -1, -1)[:, None]).sum(0) if n < 30 else shared
    order = key.sort(descending=True, stable=True).indices
    square = heatmap((mask * shared)[:, order], x=range(d_ff), label="kept by", limit=float(n))
    square["colorbar"] = square["colorbar"] | {"y": 0.8, "len": 0.46}
    falling = scores[layer].sort(dim=1, descending=True).values
    mass = (falling.cumsum(1) / falling.sum(1, keepdim=True).clamp_min(1e-12)).numpy()
    x = np.arange(1, d_ff + 1) / d_ff
    lines = [
        {"type": "scatter", "mode": "lines", "x": x, "y": row, "name": name, "xaxis": "x2", "yaxis": "y2"}
        | {"line": {"color": PALETTE[i % len(PALETTE)], "width": 1.5}}
        for i, (name, row) in enumerate(zip(names, mass, strict=True))
    ]
    cut = {"type": "scatter", "mode": "lines", "x": np.full(2, density), "y": np.array([0.0, 1.0]), "showlegend": False}
    return figure(
        [square, *lines, cut | {"xaxis": "x2", "yaxis": "y2", "line": {"color": NEUTRAL, "dash": "dash"}}],
        title=f"layer {layer}: {table['residual']:.0%} of the channels are everyone's, {table['specific']:.0%} one "
        f"expert's own, {table['any']:.0%} are stored",
        x="hidden channel, sorted by how many domains keep it",
        y="domain",
        height=560,
        xaxis={"showgrid": False, "anchor": "y"},
        yaxis={"autorange": "reversed", "showgrid": False, "domain": [0.6, 1]}
        | {"tickvals": [*range(n)], "ticktext": [*names]},
        xaxis2={"title": {"text": "share of the channels, the strongest first"}, "anchor": "y2", "range": [0, 1]},
        yaxis2={"title": {"text": "share of all |a|"}, "anchor": "x2", "range": [0, 1.02], "domain": [0, 0.38]},
        legend={"orientation": "h", "y": 0.39, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        margin={"l": 64, "r": 24, "t": 48, "b": 52},
    )


def density_figure(
    curve: pd.DataFrame, dense: float, marks: Mapping[str, tuple[float, float]] | None = None
) -> go.Figure:
    """Draw quality against the share of the MLP that runs.

    Args:
        curve: from `density_curve`.
        dense: the dense model's log-likelihood.
        marks: more points: name to (share, log-likelihood).
    """
    x = curve["density"].to_numpy()
    line = {"type": "scatter", "mode": "lines+markers", "x": x}
    data = [
        line | {"y": curve["domain"].to_numpy(), "name": "the domain's channels", "line": {"color": PALETTE[0]}},
        line | {"y": curve["random"].to_numpy(), "name": "random channels", "line": {"color": PALETTE[1]}},
    ]
    for i, (name, (share, value)) in enumerate((marks or {}).items()):
        # Named beside the point, on alternating sides: the values lie close together.
        text, side = f"  {name}  ", ("middle right", "middle left")[i % 2]
        point = {"type": "scatter", "mode": "markers+text", "x": [share], "y": [value], "text": [text]}
        marker = {"size": 10, "symbol": "diamond", "color": PALETTE[(i + 2) % 8]}
        data.append(point | {"textposition": side, "name": name, "marker": marker, "showlegend": False})
    flat = {"type": "scatter", "mode": "lines", "x": np.array([0.0, 1.0]), "y": np.full(2, dense), "name": "dense"}
    return figure(
        [*data, flat | {"line": {"color": NEUTRAL, "dash": "dash"}}],
        title="Quality against compute",
        x="share of the MLP that runs for a token",
        y="log-likelihood (nats per byte)",
        height=420,
        xaxis={"range": [0, 1.03], "tickformat": ".0%"},
        yaxis={"range": [dense - 1.0, dense + 0.06]},  # below one nat nothing is told apart
    )


def strip_view(
    before: Int[Tensor, "rows tokens"],
    after: Int[Tensor, "rows tokens"],
    names: Sequence[str],
    *,
    trained: bool = True,
) -> go.Figure:
    """Draw texts as strips, each token in the colour of its expert; row i is of the domain of expert i.

    Args:
        before: the expert of each token by the untrained router; at most 96 tokens are drawn.
        after: by the trained one.
        names: of the domains, which are the experts' too.
        trained: which of the two.

    Returns:
        go.Figure
    """
    choices, n = (after if trained else before)[:, :96], len(names)
    own = (choices == torch.arange(len(choices))[:, None]).float().mean()
    edges = np.repeat(np.arange(n + 1) / n, 2)[1:-1]
    scale = [[float(edge), PALETTE[(i // 2) % len(PALETTE)]] for i, edge in enumerate(edges)]
    square = heatmap(choices.float(), x=range(choices.shape[1]), label="expert", colorscale=scale)
    square |= {"zmin": -0.5, "zmax": n - 0.5}
    square["colorbar"] = square["colorbar"] | {"tickvals": list(range(n)), "ticktext": list(names)}
    return figure(
        [square],
        title=f"{'trained' if trained else 'untrained'} router: {own:.0%} of the tokens at their own domain's expert",
        x="token",
        y="language of the text",
        height=int(np.clip(150 + 30 * n, 240, 700)),
        xaxis={"showgrid": False},
        yaxis={"autorange": "reversed", "showgrid": False, "tickvals": [*range(n)], "ticktext": [*names]},
    )


def cache_view(
    sequence: Int[Tensor, " tokens"],
    n_experts: int,
    *,
    capacity: Annotated[int, Range(1, 64)] = 3,
    policy: Annotated[str, Choice(*numbers.POLICIES)] = "belady",
    lookahead: Annotated[int, Range(0, 64)] = 64,
    start: Annotated[int, Range(0, 1_000_000)] = 0,
) -> go.Figure:
    """Draw a cache of experts at work: what it holds over time, where it hits, and the hit rate at every capacity.

    Args:
        sequence: the expert of each token.
        n_experts: N.
        capacity: experts that fit; more than N counts as N.
        policy: who leaves on a miss.
        lookahead: coming tokens that belady knows; no other policy looks.
        start: first token drawn, of 60.

    Returns:
        go.Figure
    """
    capacity, ahead = min(capacity, n_experts), {"lookahead": lookahead} if policy == "belady" else {}
    run = expert_cache(sequence, capacity=capacity, policy=policy, **ahead)
    begin = max(min(start, len(sequence) - SHOWN), 0)
    window = slice(begin, begin + SHOWN)
    held = run.held[window]
    z = torch.zeros(len(held), n_experts + 1).scatter_(1, held + 1, 1.0)[:, 1:].T
    place, asked, hit = np.arange(begin, begin + len(held)), sequence[window].numpy(), run.hits[window].numpy()
    square = heatmap(z, x=range(begin, begin + len(held)), y=range(n_experts), limit=(0.0, 2.2), showscale=False)
    data = [square]
    for name, mask, symbol, colour in (("hit", hit, "circle", PALETTE[4]), ("load", ~hit, "x", PALETTE[1])):
        marker = {"symbol": symbol, "color": colour, "size": 8}
        points = {"type": "scatter", "mode": "markers", "x": place[mask], "y": asked[mask], "name": name}
        data.append(points | {"marker": marker})
    capacities = range(1, n_experts + 1)
    for other in ("lru", policy) if policy != "lru" else ("lru",):
        more = ahead if other == policy else {}
        rates = [expert_cache(sequence, capacity=c, policy=other, **more).hit_rate for c in capacities]
        colour = NEUTRAL if other == "lru" and policy != "lru" else PALETTE[0]
        line = {"type": "scatter", "mode": "lines+markers", "x": [*capacities], "y": rates, "name": other}
        data.append(line | {"xaxis": "x2", "yaxis": "y2", "line": {"color": colour}})
    mark = {"x": [capacity], "y": [run.hit_rate], "marker": {"size": 13, "color": PALETTE[5], "symbol": "diamond"}}
    data.append({"type": "scatter", "mode": "markers", "xaxis": "x2", "yaxis": "y2", "showlegend": False} | mark)
    reach = f", {lookahead} tokens ahead" if ahead else ""
    return figure(
        data,
        title=f"{policy}{reach}, capacity {capacity}: {run.hit_rate:.1%} hits, {run.loads} loads",
        x="token (light: in the cache)",
        y="expert",
        height=380,
        xaxis={"domain": [0, 0.6], "showgrid": False},
        yaxis={"showgrid": False, "dtick": 1, "range": [-0.5, n_experts - 0.5]},
        xaxis2={"title": {"text": "capacity (experts)"}, "domain": [0.75, 1], "anchor": "y2", "dtick": 1},
        yaxis2={"title": {"text": "hit rate"}, "anchor": "x2", "range": [0, 1.03]},
    )
