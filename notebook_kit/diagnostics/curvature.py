"""Numbers about curvature: whose say is louder where, what grafting keeps, and how alike experts' curvatures are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging import fast_fisher_graft, graft_masks, ota
from notebook_kit.weights import Weights

SPAN = 2.0  # decades: where one expert is a hundred times as loud, the colour ends


# ---------------------------------------------------------------- who decides
def weight_fronts(
    base: Weights,
    pair: Sequence[Weights],
    merges: Mapping[str, tuple[Callable, dict]],
    *,
    score: Callable[[dict], float],
    tasks: Sequence[str],
    n_points: int = 41,
) -> pd.DataFrame:
    """Merge two experts at every weight from 0 to 1, in several ways.

    Args:
        base: state dict θ₀.
        pair: two experts.
        merges: name -> (a merge that takes `weights`, its other arguments).
        score: of a state dict; must have `.tasks`.
        tasks: two names in `.tasks`, the experts' own tasks.
        n_points: weights tried.

    Returns:
        DataFrame: merge, weight (of the first expert), a, b (the two tasks' scores), mean.
    """
    rows = []
    for name, (merge, settings) in merges.items():
        for weight in np.linspace(0, 1, n_points):
            done = score(merge(base, pair, weights=[float(weight), 1 - float(weight)], **settings)).tasks
            a, b = (done[task] for task in tasks)
            rows.append({"merge": name, "weight": float(weight), "a": a, "b": b, "mean": (a + b) / 2})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class FrontView:
    """The fronts of several merges, and where one weight lies on each."""

    fronts: pd.DataFrame
    weight: float
    here: pd.DataFrame


def front_view(fronts: pd.DataFrame, *, weight: Annotated[float, Range(0, 1)] = 0.5) -> FrontView:
    """Look up one weight on every front.

    Args:
        fronts: from `weight_fronts`.
        weight: λ of the first expert; the other has 1 − λ. The nearest weight of the table is taken.
    """
    known = np.unique(fronts["weight"])
    nearest = float(known[np.abs(known - weight).argmin()])
    return FrontView(fronts, nearest, fronts[fronts["weight"] == nearest])


@dataclass(frozen=True)
class DecisionView:
    """log₁₀ of two curvatures of one tensor, and of their ratio with the experts' weights in it."""

    tensor: str
    names: tuple[str, str]
    logs: tuple[Float[np.ndarray, "rows columns"], Float[np.ndarray, "rows columns"]]
    ratio: Float[np.ndarray, "rows columns"]
    share: float


def decision_view(
    fishers: Sequence[Weights],
    names: Sequence[str],
    *,
    tensor: Annotated[str, Choice("")] = "",
    weight: Annotated[float, Range(0.01, 0.99)] = 0.5,
) -> DecisionView:
    """Say, entry by entry of one tensor, which of two experts decides a curvature-weighted merge.

    Args:
        fishers: two Fishers (or second moments) by tensor name.
        names: of the two experts.
        tensor: which tensor; "" is the first.
        weight: λ of the first expert.

    Returns:
        DecisionView: `ratio` is log₁₀(λ F_a / ((1 − λ) F_b)), above 0 where the first decides; NaN where both are 0.
        `share` is the share of entries, of those that anyone cares about, where the first is louder.

    Raises:
        ValueError: no such tensor.
    """
    tensor = tensor or next(iter(fishers[0]))
    if tensor not in fishers[0]:
        raise ValueError(f"no tensor is called {tensor!r}; there are {', '.join(list(fishers[0])[:5])}, ...")
    a, b = (np.atleast_2d(one[tensor].double().numpy()) for one in fishers)
    a, b = (x.reshape(len(x), -1) for x in (a, b))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = tuple(np.where(x > 0, np.log10(x), np.nan).astype(np.float32) for x in (a, b))
        ratio = np.log10(weight * a / ((1 - weight) * b))
    cared = (a > 0) | (b > 0)
    share = float((ratio[cared] > 0).mean()) if cared.any() else float("nan")
    ratio = np.where(cared, np.clip(ratio, -SPAN, SPAN), np.nan).astype(np.float32)
    return DecisionView(tensor, tuple(names), logs, ratio, share)


# ---------------------------------------------------------------- grafting
def density_map(masks: Sequence[Mapping[str, torch.Tensor]], names: Sequence[str]) -> pd.DataFrame:
    """Share of the edits that each tensor (row) of each expert (column) keeps.

    Args:
        masks: from `graft_masks`.
        names: of the experts.
    """
    shares = {
        name: {key: float(m.float().mean()) for key, m in mask.items()} for name, mask in zip(names, masks, strict=True)
    }
    return pd.DataFrame(shares)


def graft_curves(
    base: Weights,
    experts: Sequence[Weights],
    moments: Sequence[Weights],
    *,
    score: Callable[[dict], float],
    names: Sequence[str],
    densities: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0),
) -> pd.DataFrame:
    """Score what is left at each density: experts grafted by curvature and by magnitude, and the merge of all.

    Args:
        base: state dict θ₀.
        experts: state dicts.
        moments: second moments of each.
        score: of a state dict; its `.tasks` has the experts' names.
        names: of the experts, which are their tasks.
        densities: shares kept.

    Returns:
        DataFrame: curve ("graft: FFG", "graft: magnitude": mean over the experts of the score on their own task;
        "merge: OTA + FFG": mean over tasks), density, score.
    """
    rows = []
    for density in densities:
        for importance, curve in (("fisher", "graft: FFG"), ("magnitude", "graft: magnitude")):
            settings = {"density": density, "importance": importance}
            rows.append((curve, density, _own(base, experts, moments, score, names, **settings)))
        rows.append(("merge: OTA + FFG", density, float(score(ota(base, experts, moments=moments, density=density)))))
    return pd.DataFrame(rows, columns=["curve", "density", "score"])


@dataclass(frozen=True)
class GraftView:
    """One density: the scores there, the curves around it, and who keeps how much of which tensor."""

    density: float
    scores: dict[str, float]
    curves: pd.DataFrame
    kept: pd.DataFrame


def graft_view(
    base: Weights,
    experts: Sequence[Weights],
    moments: Sequence[Weights],
    score: Callable[[dict], float],
    names: Sequence[str],
    curves: pd.DataFrame,
    *,
    density: Annotated[float, Range(0.01, 1)] = 0.1,
    importance: Annotated[str, Choice("fisher", "magnitude", "curvature")] = "fisher",
    curvature: Annotated[str, Choice("full", "rank1")] = "full",
    power: Annotated[float, Range(0, 1)] = 0.5,
) -> GraftView:
    """Graft every expert at one density, merge them, and say where the kept edits lie.

    Args:
        base: state dict θ₀.
        experts: state dicts.
        moments: second moments of each.
        score: of a state dict; its `.tasks` has the experts' names.
        names: of the experts, which are their tasks.
        curves: from `graft_curves`.
        density: share of each expert's edits that is kept.
        importance: what ranks the edits: v Δ² ("fisher"), |Δ| or v.
        curvature: second moments in full, or from their row and column sums.
        power: exponent of the curvature in the merge.
    """
    settings = {"density": density, "importance": importance, "curvature": curvature}
    masks = graft_masks(base, experts, moments=moments, **settings)
    own = []
    for name, expert, mask in zip(names, experts, masks, strict=True):
        grafted = {key: torch.where(mask[key], t, base[key]) if key in mask else t for key, t in expert.items()}
        own.append(score(grafted).tasks[name])
    merged = float(score(ota(base, experts, moments=moments, power=power, **settings)))
    return GraftView(density, {"grafts": sum(own) / len(own), "merge": merged}, curves, density_map(masks, names))


def _own(base, experts, moments, score, names, **settings) -> float:
    done = [
        score(fast_fisher_graft(base, [expert], moments=[v], **settings)).tasks[name]
        for name, expert, v in zip(names, experts, moments, strict=True)
    ]
    return sum(done) / len(done)


# ---------------------------------------------------------------- curvatures compared
def curvature_cosine(moments: Sequence[Weights], *, power: float = 0.5) -> Float[np.ndarray, "experts experts"]:
    """Cosine between the experts' v^power over the whole model: 1 if they care about the same parameters.

    Args:
        moments: second moments or Fishers, one mapping an expert, of the same names.
        power: exponent; 0.5 compares what `ota` weighs with.
    """
    rows = torch.stack([torch.cat([v.reshape(-1).double().pow(power) for v in one.values()]) for one in moments])
    norms = rows.norm(dim=1)
    return (rows @ rows.T / torch.outer(norms, norms)).float().numpy()


def log_pairs(one: Weights, other: Weights, *, n_points: int = 1500, seed: int = 0) -> tuple[pd.DataFrame, float]:
    """Two curvatures of one model, entry against entry, on logarithmic scales.

    Args:
        one: such as Adam's second moments.
        other: such as the exact Fisher, of the same names.
        n_points: entries drawn for the table; the correlation takes all.
        seed: of the draw.

    Returns:
        DataFrame (tensor, one, other: log₁₀ of both) and the correlation of the logarithms, over the entries where
        both are above 0.
    """
    names = np.repeat(list(one), [v.numel() for v in one.values()])
    x, y = (torch.cat([table[name].reshape(-1).double() for name in one]).numpy() for table in (one, other))
    both = (x > 0) & (y > 0)
    frame = pd.DataFrame({"tensor": names[both], "one": np.log10(x[both]), "other": np.log10(y[both])})
    correlation = float(np.corrcoef(frame["one"], frame["other"])[0, 1])
    return frame.sample(min(n_points, len(frame)), random_state=seed).reset_index(drop=True), correlation
