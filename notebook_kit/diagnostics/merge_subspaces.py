"""Numbers about merges in subspaces: spectra, interference between tasks, what DOGE's correction learns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.diagnostics.weights import effective_rank, stable_rank
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging import doge, doge_details
from notebook_kit.merging.doge_descent import Descent
from notebook_kit.merging.matrices import matrix_names, polar
from notebook_kit.merging.task_singular_vectors import leading_factors
from notebook_kit.weights import Weights, at_least_float32, check

Score = Callable[[Weights], float]


def merge_spectra(
    base: Weights, merges: Mapping[str, Weights], tensor: str | None = None
) -> dict[str, Float[np.ndarray, " k"]]:
    """Singular values of what each model changed in one matrix, in falling order.

    Args:
        base: state dict θ₀.
        merges: name to state dict; merged models and experts alike.
        tensor: name of a matrix; None for the largest one. Fused experts are laid below each other.

    Returns:
        dict: name to singular values of θ − θ₀.

    Raises:
        ValueError: the tensor is no matrix of base.
    """
    check(base, list(merges.values()), names=list(merges))
    tensor = matrix_of(base, tensor)
    start = at_least_float32(base[tensor].detach())
    changes = {name: (at_least_float32(weights[tensor].detach()) - start) for name, weights in merges.items()}
    return {name: torch.linalg.svdvals(change.flatten(end_dim=-2)).numpy() for name, change in changes.items()}


def spectrum_table(base: Weights, merges: Mapping[str, Weights]) -> pd.DataFrame:
    """Say how flat each model's change is, matrix by matrix.

    Args:
        base: state dict θ₀.
        merges: name to state dict.

    Returns:
        DataFrame: tensor, model, norm (Frobenius), largest (singular value), stable_rank, effective_rank.
    """
    rows = []
    for tensor in sorted(matrix_names(base, "all")):
        for name, values in merge_spectra(base, merges, tensor).items():
            s = torch.from_numpy(values)
            rows.append((tensor, name, float(s.norm()), float(s[0]), float(stable_rank(s)), float(effective_rank(s))))
    return pd.DataFrame(rows, columns=["tensor", "model", "norm", "largest", "stable_rank", "effective_rank"])


def interference(base: Weights, experts: Sequence[Weights], *, rank_fraction: float | None = None) -> pd.DataFrame:
    """How much the tasks' singular vectors overlap, before TSV-Merge turns them apart and after.

    ‖(ÛᵀÛ − I) diag(Ŝ) (V̂ᵀV̂ − I)‖₁, the sum of magnitudes, over the k leading triplets of every task; 0 where no task's
    directions overlap another's. Gargiulo et al., 2024.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i.
        rank_fraction: share of min(m, n) that each task keeps; None means 1 / K.

    Returns:
        DataFrame: tensor, before, after, before_share (before / (ΣŜ · Kk), so that layers can be compared).
        Fused experts are left out.
    """
    check(base, experts)
    fraction = 1 / len(experts) if rank_fraction is None else rank_fraction
    rows = []
    for tensor in sorted(name for name in matrix_names(base, "all") if base[name].dim() == 2):
        start = at_least_float32(base[tensor].detach())
        k = int(min(start.shape) * fraction + 1e-9)
        if k == 0:
            continue
        u, s, vh = leading_factors([at_least_float32(expert[tensor].detach()) - start for expert in experts], k)
        before, after = _overlap(u, s, vh), _overlap(polar(u)[0], s, polar(vh)[0])
        rows.append((tensor, before, after, before / max(float(s.sum()) * len(s), 1e-30)))
    return pd.DataFrame(rows, columns=["tensor", "before", "after", "before_share"])


def _overlap(u: Tensor, s: Tensor, vh: Tensor) -> float:
    one = torch.eye(len(s), dtype=s.dtype)
    return float((((u.T @ u - one) * s) @ (vh @ vh.T - one)).abs().sum())


def matrix_of(base: Weights, tensor: str | None) -> str:
    """Return the name of a matrix: the given one, if it is one, or the largest; raises ValueError."""
    names = matrix_names(base, "all")
    if tensor is None and names:
        return max(sorted(names), key=lambda name: base[name].numel())
    if tensor not in names:
        raise ValueError(f"{tensor!r} is no matrix of base; there are {', '.join(sorted(names)[:5]) or 'none'}, ...")
    return tensor


# ---------------------------------------------------------------- DOGE
@dataclass(frozen=True)
class DogePath:
    """DOGE recorded at several numbers of steps.

    Args:
        steps: where it was recorded.
        details: tensor to Descent, one for each number of steps.
        scores: of the merged models.
        taus: tensor to the experts' task vectors [experts, m, n].
    """

    steps: tuple[int, ...]
    details: tuple[dict[str, Descent], ...]
    scores: tuple[float, ...]
    taus: dict[str, Tensor]


def doge_path(
    base: Weights,
    experts: Sequence[Weights],
    score: Score,
    *,
    grid: Sequence[int] = (0, 10, 25, 50, 100, 200, 400),
    **settings,
) -> DogePath:
    """Run DOGE for several numbers of steps and keep what it did.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i.
        score: state dict to a number; higher is better.
        grid: numbers of steps.
        settings: of `doge`, other than `steps`. Matrices must have two axes.
    """
    details = [
        {name: found[0] for name, found in doge_details(base, experts, steps=steps, **settings).items()}
        for steps in grid
    ]
    scores = [score(doge(base, experts, steps=steps, **settings)) for steps in grid]
    taus = {name: torch.stack([expert[name] - base[name] for expert in experts]) for name in details[0]}
    return DogePath(tuple(grid), tuple(details), tuple(scores), taus)


def energy_table(details: Mapping[str, Descent]) -> pd.DataFrame:
    """Where Δ lies, and how large it is.

    Args:
        details: tensor to Descent.

    Returns:
        DataFrame: tensor, inside (share of ‖Δ‖² in the shared subspace; 0 where Δ is zero), by_chance (k / m, what a
        random Δ would have there), rank (k), norm (‖Δ‖).
    """
    rows = []
    for name, one in details.items():
        inside = one.energy_inside() if one.delta.any() else 0.0
        m, k = one.subspace.shape
        rows.append((name, inside, k / m, k, float(one.delta.norm())))
    return pd.DataFrame(rows, columns=["tensor", "inside", "by_chance", "rank", "norm"])


@dataclass(frozen=True)
class DogeView:
    """One look at a DogePath: the recorded number of steps nearest to the one asked for, and one tensor."""

    path: DogePath
    index: int
    tensor: str
    show: str


def doge_view(
    path: DogePath,
    *,
    steps: Annotated[int, Range(0, 1000)] = 400,
    tensor: Annotated[str | None, Choice(None)] = None,
    show: Annotated[str, Choice("loss and energy", "matrices")] = "loss and energy",
) -> DogeView:
    """Pick a moment of a recorded descent.

    Args:
        path: from `doge_path`.
        steps: how many; the nearest recorded number is taken.
        tensor: whose matrices are shown; None for the first.
        show: the losses and where Δ lies, or the matrices themselves.

    Raises:
        ValueError: no such tensor.
    """
    tensor = next(iter(path.taus)) if tensor is None else tensor
    if tensor not in path.taus:
        raise ValueError(f"no treated tensor is called {tensor!r}; there are {', '.join(path.taus)}")
    index = int(np.argmin([abs(steps - recorded) for recorded in path.steps]))
    return DogeView(path, index, tensor, show)
