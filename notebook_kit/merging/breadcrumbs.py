"""Model Breadcrumbs: of each task vector drop the small entries, which are noise, and the very largest, which disturb.

    keep  m_ip = 1 where |τ_ip| is neither among the γ · n largest nor among the smallest, until density · n are left
    merge θ    = θ₀ + λ Σ_i m_i ⊙ τ_i

τ_i = θ_i − θ₀; n: entries of a tensor (or of the model, `scope`); λ: `scale`. Davari and Belilovsky, 2023, section 3.
Counts are mergekit's: ⌊γn⌋ go at the top and n − ⌊density · n⌋ − ⌊γn⌋ at the bottom; where that is negative, fewer go
at the top, so that density=1 is task arithmetic. mergekit's breadcrumbs_ties elects signs and, as here by default,
sums; its `rescale` gives each tensor its old L1 norm back.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.election import Taus, fuse
from notebook_kit.merging.selection import Trim, chunks, trims
from notebook_kit.merging.ties import keep_largest
from notebook_kit.weights import Weights, check, expert_weights

Bands = list[dict[str, tuple[Trim, Trim]]]


def statistics(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: float = 0.9,
    gamma: float = 0.01,
    scope: str = "tensor",
    **_,
) -> dict[str, Bands]:
    """For each expert and tensor: what is large enough to be in the band, and what is too large."""

    def edges(n: int) -> tuple[int, int]:
        kept, top = int(density * n), int(gamma * n)
        bottom = max(0, n - kept - top)
        return n - bottom, n - bottom - kept

    lower, upper = (
        trims(base, experts, density=density, scope=scope, count=lambda n, edge=edge: edges(n)[edge]) for edge in (0, 1)
    )
    return {"bands": [{name: (low[name], up[name]) for name in low} for low, up in zip(lower, upper, strict=True)]}


def keep_band(tau: Taus, lower: Sequence[Trim], upper: Sequence[Trim], drop: tuple[list[int], list[int]]) -> Taus:
    """Keep of each task vector what reaches the lower edge of its band, without what reaches the upper one."""
    return keep_largest(tau, lower, drop[0]).sub_(keep_largest(tau, upper, drop[1]))


@method(family="merging", paper="model-breadcrumbs", statistics=statistics)
def breadcrumbs(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: Annotated[float, Range(0, 1)] = 0.9,
    gamma: Annotated[float, Range(0, 0.5)] = 0.01,
    scale: Annotated[float, Range(0, 3)] = 0.3,
    scope: Annotated[str, Choice("tensor", "model")] = "tensor",
    rescale: Annotated[str, Choice("none", "norm")] = "none",
    elect: Annotated[str, Choice("none", "mass", "count")] = "none",
    normalize: bool = False,
    weights: Sequence[float] | None = None,
    bands: Bands | None = None,
) -> dict[str, Tensor]:
    """Merge what is left of each task vector without its smallest and its very largest entries.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i, fine-tuned from it.
        density: share of entries kept.
        gamma: share of entries dropped at the top.
        scale: λ, what multiplies the merged task vector.
        scope: where magnitudes are ranked: in each tensor (paper, mergekit) or in the whole model.
        rescale: to the old L1 norm of each tensor (mergekit's `rescale`), or not at all (paper).
        elect: "none" sums (paper); "mass" or "count" elects signs first (mergekit's breadcrumbs_ties).
        normalize: divide by the weights of those who have a say.
        weights: one factor an expert; None means 1 for each.
        bands: from `statistics`, when the model is merged in parts; None computes them.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor; weights that sum to 0 while `normalize` is on and nothing is elected.

    Source:
        Davari and Belilovsky, 2023, arXiv 2312.06795, section 3.
    """
    check(base, experts)
    factors = expert_weights(weights, len(experts))
    if bands is None:
        bands = statistics(base, experts, density=density, gamma=gamma, scope=scope)["bands"]

    result, by_expert = {}, torch.tensor(factors)[:, None]
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            result[name] = tensor.clone()
            continue
        stretch = by_expert.to(tensor.device)
        if rescale == "norm":
            norms = sum(
                torch.stack([tau.abs().sum(dim=1), kept.abs().sum(dim=1)]).double()
                for _, _, tau, kept in _banded(name, base, experts, bands)
            )
            stretch = stretch * torch.where(norms[1] > 0, norms[0] / norms[1], 1)[:, None] if tensor.numel() else 1
        out = tensor.new_empty(tensor.numel())
        for where, theta_0, _, kept in _banded(name, base, experts, bands):
            kept *= stretch
            out[where] = fuse(kept, elect, factors, normalize=normalize).mul_(scale).add_(theta_0)
        result[name] = out.reshape(tensor.shape)
    return result


def _banded(name: str, base: Weights, experts: Sequence[Weights], bands: Bands):
    """Walk one tensor in pieces: (where, θ₀ there, the task vectors there, what of them lies in the bands)."""
    lower, upper = zip(*(of_expert[name] for of_expert in bands), strict=True)
    drop = tuple([rule.drop.get(name, 0) for rule in edge] for edge in (lower, upper))
    for where, theta_0, tau in chunks(name, base, experts):
        yield where, theta_0, tau, keep_band(tau, lower, upper, drop)
