"""The two ends of a Frank-Wolfe step: where the path starts, and how an iterate moves towards what was picked.

plain        θᵗ⁺¹ = θᵗ + size · Σ_k (s_k − θᵗ)            the coefficients of the vertices move likewise
AdaMerging   θᵗ⁺¹ = θᵗ + Σ_k λ_k (s_k − θᵗ)               λ learned for each tensor
TIES         θᵗ⁺¹ = ties(θᵗ, s; scale = size)             entry by entry: no coefficients
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from notebook_kit.merging.adamerging import adamerging_path
from notebook_kit.merging.ties import ties
from notebook_kit.weights import Weights, at_least_float32

FIRST, LATER = 0.3, 1e-8  # where AdaMerging's coefficients begin, in the first step and afterwards (official code)


def start_of(
    base: Weights, experts: Sequence[Weights], names: Sequence[str], init: str, init_scale: float
) -> dict[str, Tensor]:
    """θ⁰ in float32: base, or task arithmetic of the pool; one tensor of one model is read at a time."""
    theta = {}
    for name in names:
        theta_0 = at_least_float32(base[name])
        theta[name] = theta_0.clone()
        if init == "merge":
            for expert in experts:
                theta[name] += init_scale * (at_least_float32(expert[name]) - theta_0)
    return theta


def move_towards(
    theta: Mapping[str, Tensor],
    weights: Float[Tensor, "layers start_and_experts"],
    pool: Sequence[Weights],
    picked: Int[Tensor, "at_once layers"],
    groups: Sequence[Sequence[str]],
    owners: Mapping[str, str],
    *,
    move: str,
    size: float,
    first: bool,
    density: float,
    learn: Mapping,
) -> tuple[dict[str, Tensor], Float[Tensor, "layers start_and_experts"]]:
    """Take one step.

    Args:
        theta: θᵗ, without the second names of tied parameters.
        weights: coefficients of θᵗ: of the start, then of the experts.
        pool: the experts, then the start if it is a vertex.
        picked: the vertices to go to, in each group of names.
        groups: names that move together.
        owners: every name with the name of its parameter.
        move: "task_arithmetic", "ties" or "adamerging".
        size: γ_t λ.
        first: AdaMerging starts its coefficients elsewhere in the first step.
        density: of TIES.
        learn: what `adamerging_path` needs.

    Returns:
        θᵗ⁺¹ and its coefficients.
    """
    rows = torch.zeros(*picked.shape, weights.shape[1])  # the picked vertices' own coefficients
    n_experts = weights.shape[1] - 1
    rows.scatter_(2, torch.where(picked < n_experts, picked + 1, 0)[..., None], 1.0)
    if move == "task_arithmetic":
        moved = dict(theta)
        for i, group in enumerate(groups):
            for name in group:
                step = torch.zeros_like(theta[name])
                for k in range(len(picked)):
                    step += at_least_float32(pool[int(picked[k, i])][name]) - theta[name]
                moved[name] = theta[name] + size * step
        return moved, weights + size * (rows - weights).sum(0)

    targets = [
        {name: at_least_float32(pool[int(row[i])][name]) for i, group in enumerate(groups) for name in group}
        for row in picked
    ]
    if move == "ties":
        return ties(theta, targets, density=density, scale=size), torch.full_like(weights, float("nan"))

    def every(part):
        return {name: part[owner] for name, owner in owners.items()}

    layer_wise = "layer" if len(groups) == len(theta) else "task"
    start = {"granularity": layer_wise, "scale": FIRST if first else LATER}
    path = adamerging_path(every(theta), [every(target) for target in targets], **start, **learn)
    lambdas = path.coefficients[-1]  # [at_once, groups]
    merged = path.merged()
    return {name: merged[name] for name in theta}, weights + (lambdas[..., None] * (rows - weights)).sum(0)
