"""mergekit's "generalized task arithmetic", one formula behind nine of its names.

    τ̂_i = w_i · sparsify_i(θ_i − θ₀)        θ = θ₀ + λ · Σ_i [sign τ̂_i = γ] τ̂_i / n

sparsify: none, largest magnitudes, largest without outliers, at random, at random by rank; γ: the elected sign (or no
election); n = 1, or Σ_i w_i of those that agree with `normalize`; λ: `lambda`. Every model has its own weight, density,
gamma, epsilon. Where it differs from the papers' methods in `notebook_kit.merging`: thresholds are each tensor's,
an even vote counts as plus, `rescale` restores the tensor's L1 norm.
Random masks (dare, della) are drawn from other random numbers than mergekit's; all else is the same to rounding.
Read from mergekit 0.1.5: merge_methods/generalized_task_arithmetic.py, sparsify.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from notebook_kit.merging.contract import tensor_by_tensor, tensor_generator
from notebook_kit.weights import Weights


def sparse_sum(
    base: Weights,
    experts: Sequence[Weights],
    *,
    sparsify: str,
    weights: Sequence[float],
    density: Sequence[float],
    elect: bool = False,
    normalize: bool = False,
    rescale: bool = False,
    scale: float = 1.0,
    gamma: Sequence[float] | None = None,
    epsilon: Sequence[float] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Merge as mergekit's family does: sparsify each task vector, weight, elect signs, sum, divide, scale.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i.
        sparsify: "magnitude", "outliers", "random" or "rank".
        weights: w_i.
        density: share kept, one an expert.
        elect: count only entries with the sign of the weighted sum.
        normalize: divide by the weights of the entries that count.
        rescale: give each sparsified task vector its L1 norm back.
        scale: λ.
        gamma: share of the largest entries dropped as outliers, one an expert.
        epsilon: half the spread of the keep probabilities, one an expert.
        seed: of the random masks.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights, ValueError: as `check`; density ± epsilon outside (0, 1).
    """
    keep = {"magnitude": _largest, "outliers": _without_outliers, "random": _random, "rank": _random_by_rank}[sparsify]

    def merge(name: str, theta_0: Tensor, thetas: list[Tensor]) -> Tensor:
        rows = []
        for i, theta in enumerate(thetas):
            tau = theta - theta_0
            if density[i] < 1:
                extra = gamma[i] if sparsify == "outliers" else epsilon[i] if sparsify == "rank" else 0.0
                kept = tau * keep(tau, density[i], extra, tensor_generator(seed, name, i))
                left, whole = kept.abs().sum(), tau.abs().sum()
                tau = kept * (whole / left) if rescale and min(left, whole) >= 1e-7 else kept
            rows.append(weights[i] * tau)
        stack = torch.stack(rows)
        w = torch.tensor(weights, dtype=stack.dtype).reshape(-1, *[1] * theta_0.ndim)
        if elect:
            plus = (stack.sum(dim=0) >= 0).to(stack.dtype) * 2 - 1
            counts = (stack.sign() == plus).to(stack.dtype)
            merged, n = (stack * counts).sum(dim=0), (w * counts).sum(dim=0)
            n = n.masked_fill(n == 0, 1)
        else:
            merged, n = stack.sum(dim=0), w.sum(dim=0)
            n = n.masked_fill(n.abs() < 1e-8, 1)
        return theta_0 + scale * (merged / n if normalize else merged)

    return tensor_by_tensor(base, experts, merge)


def _largest(tau: Tensor, density: float, _: float, __: torch.Generator) -> Tensor:
    wanted = max(1, int(density * tau.numel())) if density > 0 else 0
    return _top(tau, wanted).to(tau.dtype)


def _without_outliers(tau: Tensor, density: float, gamma: float, _: torch.Generator) -> Tensor:
    n = tau.numel()
    wanted = int(density * n)
    lowest = max(0, n - wanted - int(gamma * n))
    return (_top(tau, n - lowest) & ~_top(tau, n - lowest - wanted)).to(tau.dtype)


def _top(tau: Tensor, k: int) -> Tensor:
    """Where the k largest magnitudes are; of equal ones at the edge the first. Five times faster than sorting."""
    size = tau.abs().reshape(-1)
    n = len(size)
    if k <= 0 or k >= n:
        return torch.full(tau.shape, k > 0)
    edge = size.kthvalue(n - k + 1).values
    keep = size > edge
    keep[(size == edge).nonzero().squeeze(-1)[: k - int(keep.sum())]] = True
    return keep.reshape(tau.shape)


def _random(tau: Tensor, density: float, _: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(tau.shape, generator=generator) < density).to(tau.dtype)


def _random_by_rank(tau: Tensor, density: float, epsilon: float, generator: torch.Generator) -> Tensor:
    if density <= 0:
        return torch.zeros_like(tau)
    if density + epsilon >= 1 or density - epsilon <= 0:
        raise ValueError(f"density ± epsilon must stay in (0, 1), got {density} ± {epsilon} (della)")
    rows = tau.reshape(1, -1) if tau.ndim < 2 else tau
    ranks = rows.abs().argsort(dim=1).argsort(dim=1).to(tau.dtype)
    probability = density - epsilon + 2 * epsilon * ranks / max(rows.shape[1] - 1, 1)
    return (torch.rand(rows.shape, generator=generator) < probability).to(tau.dtype).reshape(tau.shape)
