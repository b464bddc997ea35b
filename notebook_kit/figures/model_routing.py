"""Pictures of routing between whole models: a budget at work, adaptation by domain, embeddings, letters and gates."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from notebook_kit.diagnostics import model_routing as numbers
from notebook_kit.figures.style import NEUTRAL, PALETTE, figure, heatmap
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures.contrastive_moe import ContrastiveMoE
from notebook_kit.mixtures.meta_dmoe import MetaDMoE
from notebook_kit.mixtures.mova import MoVA

BRIGHTNESS = [[0.0, "#000000"], [1.0, "#FFFFFF"]]


def _label(text: str, longest: int) -> str:
    """A name as plotly may show it: short, and without HTML."""
    return html.escape(text if len(text) <= longest else text[: longest - 1] + "…")


def budget_view(
    roster: numbers.ModelRoster,
    curve: pd.DataFrame | None = None,
    *,
    budget: Annotated[float, Range(0, 1e15)] = 1e4,
    threshold: Annotated[float | None, Range(0, 20)] = None,
) -> go.Figure:
    """Compose under a budget and draw the table category x expert with the choice marked, over the curve of budgets.

    Args:
        roster: of the models.
        curve: from `budget_curve`, or None for the table alone.
        budget: parameters that may be hosted.
        threshold: entropy in nats above which the best expert on average answers; None is without.
    """
    served = numbers.serve(roster, budget, threshold=threshold)
    found, names = served.composition, [_label(name, 14) for name in roster.experts]
    z = roster.scores.numpy()
    rows, places = list(range(len(z))), list(range(len(names)))
    data = [heatmap(z, x=places, y=rows, label="accuracy", limit=1.0, xgap=1, ygap=1)]
    data[0]["colorbar"] |= {"len": 0.6, "y": 1, "yanchor": "top"}
    ring = {"symbol": "circle-open", "size": 17, "color": "#FFFFFF", "line": {"width": 3}}
    mark = {"type": "scatter", "mode": "markers", "hoverinfo": "skip", "showlegend": False}
    data.append({**mark, "x": found.mapping.numpy(), "y": np.array(rows), "marker": ring})
    if curve is not None:
        data += _curve(curve, budget, served.accuracy)
    ticks = []
    for k, (name, size) in enumerate(zip(names, roster.sizes, strict=True)):
        name = name.replace(", ", ",<br>")
        ticks.append(f"<b>{name}</b><br>● {size:,.0f}" if k in found.hosted else f"{name}<br>{size:,.0f}")
    unsure = "" if threshold is None else f", {served.fallback:.0%} fell back"
    return figure(
        data,
        title=f"budget {budget:,.0f}: hosted {found.size:,.0f}, active {served.active:,.0f} in the mean, accuracy "
        f"{served.accuracy:.3f}{unsure}",
        x="expert (● hosted) and its parameters",
        height=380 if curve is None else 640,
        xaxis={"tickvals": places, "ticktext": ticks, "showgrid": False, "tickangle": 0, "tickfont": {"size": 10}},
        yaxis={
            "domain": [0, 1] if curve is None else [0.5, 1],
            "title": {"text": "category", "standoff": 10},
            "autorange": "reversed",
            "tickvals": rows,
            "ticktext": [_label(name, 16) for name in roster.names],
            "showgrid": False,
        },
        **({} if curve is None else _CURVE_AXES),
    )


_CURVE_AXES = {
    "xaxis2": {"anchor": "y2", "title": {"text": "budget: parameters that may be hosted"}},
    "yaxis2": {"anchor": "x2", "domain": [0, 0.29], "title": {"text": "accuracy", "standoff": 10}},
    "legend": {"x": 0.98, "xanchor": "right", "y": 0.02, "yanchor": "bottom"},
}


def _curve(curve: pd.DataFrame, budget: float, accuracy: float) -> list[dict]:
    line = {"type": "scatter", "mode": "lines", "xaxis": "x2", "yaxis": "y2", "x": curve["budget"].to_numpy()}
    steps = [("composition", "accuracy", PALETTE[0], "solid"), ("best single expert", "single", PALETTE[1], "dash")]
    data = [
        {**line, "name": name, "y": curve[column].to_numpy(), "line": {"color": colour, "dash": dash, "shape": "hv"}}
        for name, column, colour, dash in steps
    ]
    here = {"mode": "markers", "x": np.array([budget]), "y": np.array([accuracy]), "showlegend": False}
    return [*data, {**line, **here, "marker": {"color": PALETTE[5], "size": 11}}]


def adaptation_view(
    model: MetaDMoE,
    domains: Mapping[str, tuple[Tensor, Tensor]],
    rivals: Mapping[str, Mapping[str, float]] | None = None,
    *,
    inner_lr: Annotated[float, Range(0, 1)] = 0.1,
    inner_steps: Annotated[int, Range(0, 20)] = 1,
    n_support: Annotated[int, Range(1, 1024)] = 24,
) -> go.Figure:
    """Adapt to every domain anew and draw accuracy before and after, beside other models.

    Args:
        model: meta-trained.
        domains: name to (pictures, labels).
        rivals: name to domain to accuracy, of models that do not adapt.
        inner_lr: rate of the step.
        inner_steps: steps taken.
        n_support: unlabelled pictures.
    """
    settings = {"inner_lr": inner_lr, "inner_steps": inner_steps, "n_support": n_support}
    table = numbers.adaptation_table(model, domains, **settings)
    names = [*table.index, "mean", "worst"]
    bars = {"student, before": table["before"], "student, after": table["after"]}
    bars |= {name: pd.Series(dict(scores))[table.index] for name, scores in (rivals or {}).items()}
    colours = {"student, before": NEUTRAL, "student, after": PALETTE[0]}
    spare = [colour for colour in PALETTE[1:] if colour != NEUTRAL]
    data = []
    for place, (name, values) in enumerate(bars.items()):
        heights = np.array([*values, values.mean(), values.min()])
        colour = colours.get(name, spare[(place - 2) % len(spare)])
        data.append({"type": "bar", "name": name, "x": names, "y": heights, "marker": {"color": colour}})
    before, after = table.mean()
    return figure(
        data,
        title=f"{inner_steps} step(s) of {inner_lr:.3g} on {n_support} unlabelled pictures: {before:.3f} → {after:.3f}",
        x="unseen domain (rotation of the pictures)",
        y="accuracy",
        barmode="group",
        yaxis={"range": [0, 1]},
        height=400,
    )


def expert_share_figure(table: pd.DataFrame, *, title: str = "", x: str = "expert", y: str, label: str) -> go.Figure:
    """Draw rows x experts, a share in each cell, with its number.

    Args:
        table: index rows, columns experts.
        title: of the picture.
        x: title of the columns.
        y: title of the rows.
        label: of the colours, with its unit.
    """
    z, rows = table.to_numpy(dtype=float), list(range(len(table)))
    names = [_label(str(name), 32) for name in table.index]
    columns = [_label(str(column), 32) for column in table]
    data = [heatmap(z, x=range(len(columns)), y=rows, label=label, limit=float(z.max()))]
    for shade, cells in (("#FFFFFF", z < 0.6 * z.max()), ("#000000", z >= 0.6 * z.max())):
        row, column = np.nonzero(cells)
        text = {"text": [f"{share:.2f}" for share in z[row, column]], "textfont": {"color": shade, "size": 12}}
        places = {"x": column, "y": row, "mode": "text", "hoverinfo": "skip"}
        data.append({"type": "scatter", "showlegend": False, **places, **text})
    return figure(
        data,
        title=title,
        x=x,
        y=y,
        height=int(np.clip(170 + 34 * len(table), 260, 700)),
        xaxis={"tickvals": list(range(len(columns))), "ticktext": columns, "showgrid": False},
        yaxis={"autorange": "reversed", "tickvals": rows, "ticktext": names, "showgrid": False},
    )


@dataclass(frozen=True)
class PairBed:
    """Held-out pairs of texts: ids of both sides, the domain and a group (such as the language) of each pair."""

    a: Int[Tensor, "pairs length"]
    b: Int[Tensor, "pairs length"]
    domains: Int[Tensor, " pairs"]
    groups: list[str]


def embedding_view(
    model: ContrastiveMoE,
    bed: PairBed,
    *,
    shift: Annotated[int, Range(0, 255)] = 0,
    scale: Annotated[float, Range(0.01, 1000, log=True)] = 20.0,
) -> go.Figure:
    """Embed pairs with the experts that `shift` names; draw them on a plane, and which partner each text would take.

    Args:
        model: trained.
        bed: the pairs.
        shift: 0 enforces each text's own experts, 1 those of the next domain, and so on, around the end.
        scale: of the similarities in the softmax.
    """
    with torch.no_grad():
        route = (bed.domains + shift) % model.n_experts
        a, b = (F.normalize(model(ids, route).float(), dim=-1) for ids in (bed.a, bed.b))
    recall = numbers.ranking_scores(a, b, bed.domains)["recall"].mean()
    order = bed.domains.argsort(stable=True)
    z = (scale * a[order] @ b[order].T).softmax(1).numpy()
    points = numbers.plane(torch.cat([a, b])).reshape(2, -1, 2)
    data = []
    for place, group in enumerate(dict.fromkeys(bed.groups)):
        rows = np.array([name == group for name in bed.groups])
        colour = PALETTE[place % len(PALETTE)]
        # NaN parts the lines from partner to partner.
        pair = np.stack([points[0][rows], points[1][rows], np.full((rows.sum(), 2), np.nan)], 1).reshape(-1, 2)
        line = {"type": "scatter", "mode": "lines+markers", "x": pair[:, 0], "y": pair[:, 1], "name": group}
        data.append({**line, "marker": {"size": 6, "color": colour}, "line": {"width": 1, "color": colour}})
    pairs = range(len(z))
    data.append(heatmap(z, x=pairs, y=pairs, label="probability", limit=1.0, xaxis="x2", yaxis="y2"))
    told = "own experts" if shift % model.n_experts == 0 else f"experts of the domain {shift % model.n_experts} further"
    return figure(
        data,
        title=f"{told}: the partner comes first for {recall:.0%}, mean over domains",
        x="first direction",
        y="second direction",
        height=460,
        margin={"l": 64, "r": 24, "t": 84, "b": 52},
        xaxis={"domain": [0, 0.44]},
        xaxis2={
            "domain": [0.56, 1],
            "anchor": "y2",
            "title": {"text": "candidate, by domain"},
            "showgrid": False,
        },
        yaxis2={
            "anchor": "x2",
            "title": {"text": "text", "standoff": 6},
            "autorange": "reversed",
            "showgrid": False,
        },
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
    )


@dataclass(frozen=True)
class SceneBed:
    """Pictures, the questions, and the right words: answers[question][picture]."""

    images: Float[Tensor, "n channels side side2"]
    questions: list[str]
    answers: Sequence[Sequence[str]]
    experts: list[str]


def question_view(
    model: MoVA,
    bed: SceneBed,
    *,
    question: Annotated[int, Range(0, 255)] = 0,
    picture: Annotated[int, Range(0, 100_000)] = 0,
    routing: Annotated[str, Choice("written letters", "all experts", "no expert")] = "written letters",
) -> go.Figure:
    """Ask one question about one picture and draw the picture and the gates of every block.

    Args:
        model: trained.
        bed: pictures and questions.
        question: number of the question.
        picture: number of the picture.
        routing: who chooses the experts.
    """
    asked, image = bed.questions[question], bed.images[picture : picture + 1]
    masks = {"all experts": True, "no expert": False}
    mask = torch.full((1, len(bed.experts)), masks[routing]) if routing in masks else None
    said = model(image, [asked], mask=mask)
    bright = image[0].mean(0).numpy()
    side = range(len(bright))
    data = [heatmap(bright, x=side, y=side, limit=1.0, showscale=False, colorscale=BRIGHTNESS)]
    chosen = said.mask[0]
    names = [f"{letter} {_label(n, 12)}" for letter, n in zip("ABCDEFGHIJ", bed.experts, strict=False)]
    axes = {"type": "bar", "x": names, "xaxis": "x2", "yaxis": "y2"}
    data.append(
        {**axes, "name": "coarse: chosen", "y": chosen.float().numpy(), "marker": {"color": "rgba(128,128,128,0.35)"}}
    )
    for block, gates in enumerate(said.gates[:, 0].float().numpy()):
        colour = PALETTE[block % len(PALETTE)]
        data.append({**axes, "name": f"fine: gate of block {block}", "y": gates, "marker": {"color": colour}})
    wrote = f"wrote “{_label(said.letters[0], 16)}”, " if mask is None else ""
    truth = bed.answers[question][picture]
    return figure(
        data,
        title=f"{_label(asked, 30)}? {wrote}answered “{_label(said.texts[0], 12)}” (right: {truth})",
        x="pixel",
        y="pixel",
        height=380,
        barmode="group",
        xaxis={"domain": [0, 0.34], "showgrid": False},
        yaxis={"autorange": "reversed", "showgrid": False},
        xaxis2={"domain": [0.46, 1], "anchor": "y2", "title": {"text": "vision expert"}},
        yaxis2={"anchor": "x2", "range": [0, 1.05], "title": {"text": "chosen (0 or 1), gate weight", "standoff": 8}},
    )
