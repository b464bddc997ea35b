"""Numbers about interference: where task vectors disagree, who keeps which weight, and what masks rescue."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging import MaskedExperts, consensus, pcb, pcb_scores, tall_masks, ties
from notebook_kit.merging.election import cancels, elect_sign
from notebook_kit.merging.pcb import statistics
from notebook_kit.merging.selection import trims
from notebook_kit.merging.ties import statistics as ties_statistics
from notebook_kit.merging.ties import trimmed
from notebook_kit.weights import Weights, check, float_keys

MODEL = "whole model"


def sign_conflicts(
    base: Weights, experts: Sequence[Weights], *, density: float = 1.0, scope: str = "model"
) -> pd.DataFrame:
    """Count, tensor by tensor, where experts pull a weight in opposite directions.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i.
        density: share of each task vector that is kept, the largest magnitudes.
        scope: where the largest are sought, "model" or "tensor".

    Returns:
        DataFrame: a row a tensor and one for the whole model: tensor, entries, kept (share of weights that some expert
        keeps), contested (two or more keep it), conflict (kept with both signs), lost (share of the kept mass that
        cancels in the sum).

    Raises:
        IncompatibleWeights, ValueError: as `notebook_kit.weights.check`.
    """
    sums = _conflict_sums(base, experts, density, scope)
    return _conflict_frame(base, {name: rows[-1] for name, rows in sums.items()})


def _conflict_sums(base, experts, density: float, scope: str) -> dict[str, Tensor]:
    """For each tensor and the first 1, 2, ... experts: weights kept, contested, in conflict; mass left, mass."""
    check(base, experts)
    trim, ones = trims(base, experts, density=density, scope=scope), [1.0] * len(experts)
    found = {}
    for name in float_keys(base):
        found[name] = torch.zeros(len(experts), 5, dtype=torch.float64)
        for _, _, tau in trimmed(name, base, experts, trim, ones):
            up, down = (tau > 0).cumsum(dim=0), (tau < 0).cumsum(dim=0)
            masks = (
                up + down > 0,
                up + down > 1,
                (up > 0) & (down > 0),
                tau.cumsum(dim=0).abs(),
                tau.abs().cumsum(dim=0),
            )
            found[name] += torch.stack([mask.sum(dim=1, dtype=torch.float64) for mask in masks], dim=1)
    return found


def _conflict_frame(base: Weights, sums: dict[str, Tensor]) -> pd.DataFrame:
    columns = ["tensor", "entries", "kept", "contested", "conflict", "left", "mass"]
    frame = pd.DataFrame([[name, base[name].numel(), *row.tolist()] for name, row in sums.items()], columns=columns)
    frame.loc[len(frame)] = [MODEL, *frame[columns[1:]].sum()]
    frame["lost"] = 1 - frame.pop("left") / frame.pop("mass").replace(0, np.nan)
    for column in ("kept", "contested", "conflict"):
        frame[column] /= frame["entries"].replace(0, np.nan)
    return frame.fillna(0.0).astype({"entries": int})


@dataclass(frozen=True)
class ConflictView:
    """Conflicts by tensor at one setting, and how they grow with the number of experts."""

    frame: pd.DataFrame
    curve: pd.DataFrame
    density: float
    n_experts: int


def conflict_view(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: Annotated[float, Range(0.01, 1)] = 0.2,
    n_experts: Annotated[int, Range(1, 64)] = 8,
) -> ConflictView:
    """Look at sign conflicts: where they are, and how they grow as experts join.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i; the first `n_experts` are taken.
        density: share of each task vector that is kept.
        n_experts: how many experts meet.
    """
    sums = _conflict_sums(base, experts, density, "model")
    frames = [_conflict_frame(base, {name: rows[n] for name, rows in sums.items()}) for n in range(len(experts))]
    curve = pd.DataFrame([frame.iloc[-1][["conflict", "lost"]] for frame in frames]).reset_index(drop=True)
    curve.insert(0, "experts", range(1, len(experts) + 1))
    n = min(n_experts, len(experts))
    return ConflictView(frames[n - 1], curve, density, n)


@dataclass(frozen=True)
class PatchView:
    """A square of one tensor: two task vectors after trimming, the elected sign, and what TIES makes of all experts."""

    tensor: str
    first: Float[np.ndarray, "rows columns"]
    second: Float[np.ndarray, "rows columns"]
    sign: Float[np.ndarray, "rows columns"]
    merged: Float[np.ndarray, "rows columns"]
    names: tuple[str, str]


def patch_view(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: Annotated[float, Range(0, 1)] = 0.5,
    elect: Annotated[str, Choice("mass", "count", "normmass", "normfrac", "none")] = "mass",
    combine: Annotated[str, Choice("mean", "sum", "max", "average")] = "mean",
    tensor: str | None = None,
    size: int = 8,
    names: tuple[str, str] = ("expert 0", "expert 1"),
) -> PatchView:
    """Watch TIES at work on a few weights.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i; the first two are shown, all are merged.
        density: share of each task vector that is kept.
        elect: how the sign is elected.
        combine: what is made of the entries that agree.
        tensor: a matrix; None takes the largest.
        size: rows and columns of the square.
        names: of the two experts shown.

    Raises:
        ValueError: fewer than two experts; no matrix, or no such tensor.
    """
    if len(experts) < 2:
        raise ValueError(f"patch_view shows two experts, got {len(experts)}")
    name = _matrix(base, tensor)
    options = {"density": density, "elect": elect}
    seen = ties_statistics(base, experts, **options)
    tau = torch.cat([part for _, _, part in trimmed(name, base, experts, seen["trim"], [1.0] * len(experts))], dim=1)
    gamma = torch.zeros(tau.shape[1])
    if elect != "none":
        gamma = elect_sign(tau, elect, seen.get("norms", {}).get(name))
        gamma[cancels(tau, gamma) > 0] = seen["tie_sign"]
    merged = ties(base, experts, combine=combine, **options, **seen)[name] - base[name]

    def cut(flat):
        return flat.reshape(base[name].shape)[:size, :size].float().numpy()

    return PatchView(name, cut(tau[0]), cut(tau[1]), cut(gamma), cut(merged.reshape(-1)), names)


@dataclass(frozen=True)
class PcbView:
    """One look at PCB: a sample of scores, who is kept, how many keep a weight, and what the merge scores."""

    intra: Float[np.ndarray, " points"]
    inter: Float[np.ndarray, " points"]
    expert: Int[np.ndarray, " points"]
    kept: np.ndarray
    claims: Int[np.ndarray, " counts"]
    names: list[str]
    score: float | None


def pcb_view(
    base: Weights,
    experts: Sequence[Weights],
    score: Callable[[dict[str, Tensor]], float] | None = None,
    *,
    density: Annotated[float, Range(0.01, 1)] = 0.1,
    scale: Annotated[float, Range(0, 3)] = 1.0,
    intra: Annotated[str, Choice("exp", "softmax", "none")] = "exp",
    inter: Annotated[str, Choice("sum", "votes", "pairwise_softmax", "none")] = "sum",
    names: Sequence[str] | None = None,
    points: int = 2000,
) -> PcbView:
    """Look at the competition of parameters, and at what comes of it.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i.
        score: of the merged state dict, higher is better; None scores nothing.
        density: share of each task's parameters that is kept.
        scale: λ, what multiplies the merged task vector.
        intra: importance inside the task.
        inter: agreement with the other tasks.
        names: of the experts.
        points: how many (expert, parameter) pairs are sampled, the same ones whatever the settings.
    """
    options = {"density": density, "intra": intra, "inter": inter}
    levels = statistics(base, experts, **options)
    scores = pcb_scores(base, experts, **options, **levels)

    def stack(of):
        return torch.cat([part.reshape(len(experts), -1) for part in of.values()], dim=1)

    kept = stack(scores.kept) > 0
    picks = torch.randint(kept.numel(), (points,), generator=torch.Generator().manual_seed(0))

    def take(of):
        return of.reshape(-1)[picks].numpy()

    counts = kept.sum(dim=0).bincount(minlength=len(experts) + 1).numpy()
    found = None if score is None else score(pcb(base, experts, scale=scale, **options, **levels))
    labels = list(names) if names is not None else [f"expert {i}" for i in range(len(experts))]
    who = (picks // kept.shape[1]).numpy()
    return PcbView(take(stack(scores.intra)), take(stack(scores.inter)), who, take(kept), counts, labels, found)


def claim_counts(masked: MaskedExperts) -> Int[np.ndarray, " counts"]:
    """How many weights are claimed by 0, 1, ..., K experts; they add up to the number of weights."""
    counts = sum(part.reshape(-1).bincount(minlength=len(masked) + 1) for part in masked.claims().values())
    return counts.numpy()


@dataclass(frozen=True)
class TallView:
    """One look at TALL-masks: each task with its mask, its own expert, and no mask; who claims what; the consensus."""

    names: list[str]
    masked: Float[np.ndarray, " experts"]
    own: Float[np.ndarray, " experts"]
    unmasked: Float[np.ndarray, " experts"]
    consensus: Float[np.ndarray, " experts"]
    claims: Int[np.ndarray, " counts"]
    density: float
    k: int


def tall_view(
    base: Weights,
    experts: Sequence[Weights],
    score: Callable[[dict[str, Tensor]], float],
    *,
    threshold: Annotated[float, Range(0, 2)] = 0.4,
    k: Annotated[int, Range(0, 64)] = 2,
    scale: Annotated[float, Range(0, 1.5)] = 0.3,
    base_merge: Annotated[str, Choice("sum", "ties")] = "sum",
) -> TallView:
    """Look at masks: what they rescue, who claims which weight, and what is left when the unclaimed are deleted.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_t.
        score: of a state dict, with `.tasks` in the order of the experts, as a bed's.
        threshold: how much a task must outweigh the others to claim a weight.
        k: how many tasks must claim a weight to keep it in the consensus.
        scale: λ of the consensus, and of the merge without masks.
        base_merge: the multi-task vector, a sum or TIES' disjoint sum.
    """
    masked = tall_masks(base, experts, threshold=threshold, base_merge=base_merge)

    def own_task(weights, i):
        return list(score(weights).tasks.values())[i]

    def every_task(weights):
        return np.array(list(score(weights).tasks.values()))

    options = {"threshold": threshold, "base_merge": base_merge, "scale": scale}
    return TallView(
        list(score(base).tasks),
        np.array([own_task(masked.expert(i), i) for i in range(len(experts))]),
        np.array([own_task(expert, i) for i, expert in enumerate(experts)]),
        every_task(masked.unmasked(scale)),
        every_task(consensus(base, experts, k=k, **options)),
        claim_counts(masked),
        float(np.mean(masked.densities())),
        k,
    )


def owners(masked: MaskedExperts, tensor: str | None = None, *, size: int = 16) -> Int[np.ndarray, "rows columns"]:
    """Say whose each weight of a square is: −1 nobody's, i expert i's alone, K several experts', with K experts.

    Args:
        masked: from `tall_masks`.
        tensor: a matrix; None takes the largest.
        size: rows and columns of the square, the first ones.

    Raises:
        ValueError: no matrix, or no such tensor.
    """
    name = _matrix(masked.merged, tensor)
    mine = torch.stack([masked.mask(i)[name][:size, :size] for i in range(len(masked))]).long()
    count = mine.sum(dim=0)
    owner = torch.where(count == 1, mine.argmax(dim=0), torch.where(count == 0, -1, len(masked)))
    return owner.numpy()


def _matrix(weights: Weights, tensor: str | None) -> str:
    matrices = [name for name in float_keys(weights) if weights[name].ndim == 2 and weights[name].numel()]
    if not matrices or tensor not in (None, *matrices):
        raise ValueError(f"tensor must be a matrix, one of {', '.join(matrices[:5]) or 'none'}; got {tensor!r}")
    return tensor or max(matrices, key=lambda name: weights[name].numel())
