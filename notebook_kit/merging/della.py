"""DELLA: drop at random as DARE does, but let large entries of a task vector survive more often than small ones.

    drop    p_j  = (density − ε) + 2ε · r_j / (n − 1),   m_j ~ Bernoulli(p_j),   τ̃_j = m_j τ_j / p_j      E[τ̃] = τ
    elect   γ    = sgn(Σ_i τ̃_i)
    fuse    θ    = θ₀ + λ · mean of the τ̃_i with sign γ

τ_i = θ_i − θ₀; r_j in 0..n−1: rank of |τ_j| in its row of n entries, 0 the smallest; λ: `scale`; ε: half the width of
the window of probabilities (the paper's ε is the whole width). Deep et al., 2024, section 3; declare-lab/della.
mergekit rescales each tensor to its old L1 norm instead of by 1/p_j (`rescale="norm"`); its della_linear is
elect="none", normalize=False. It refuses a window that leaves (0, 1); here ε shrinks until the window fits, so that the
share kept stays `density`. A row: the last axis of matrices and of stacked experts, all inputs of a convolution's
channel (mergekit: always the second axis).
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.contract import PIECE, tensor_generator
from notebook_kit.merging.election import fuse
from notebook_kit.weights import Weights, at_least_float32, check, expert_weights


def keep_probabilities(
    tau: Float[Tensor, "*shape"], *, density: float, epsilon: float, scope: str = "row"
) -> Float[Tensor, "*shape"]:
    """Rank magnitudes, and spread the probabilities of survival evenly from density − ε to density + ε.

    Args:
        tau: a task vector's tensor; one without axes or with one axis is a single row.
        density: the mean probability.
        epsilon: half the window; at most what keeps it inside [0, 1].
        scope: rank in each "row", or in the whole "tensor".
    """
    epsilon = min(epsilon, density, 1 - density)
    if tau.numel() == 0:
        return tau.clone()
    rows = tau.reshape(1, -1) if tau.ndim < 2 or scope == "tensor" else tau.reshape(-1, _row_length(tau.shape))
    n = rows.shape[1]
    if n < 2:  # one entry is neither large nor small
        return torch.full_like(tau, density)
    order = rows.abs().argsort(dim=1, stable=True)
    spread = torch.linspace(density - epsilon, density + epsilon, n, dtype=tau.dtype, device=tau.device)
    return torch.empty_like(rows).scatter_(1, order, spread.expand_as(rows)).reshape(tau.shape)


def drop_by_rank(
    tau: Float[Tensor, "*shape"], keep: Float[Tensor, "*shape"], rescale: str, generator: torch.Generator
) -> Float[Tensor, "*shape"]:
    """Keep each entry with its own probability, and divide it by that (only for rescale="inverse")."""
    kept = tau * (torch.rand(tau.shape, generator=generator).to(tau.device) < keep)
    if rescale == "inverse":
        kept.div_(keep.masked_fill(keep == 0, 1))
    return kept


@method(family="merging", paper="della")
def della(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: Annotated[float, Range(0, 1)] = 0.5,
    epsilon: Annotated[float, Range(0, 0.5)] = 0.15,
    scale: Annotated[float, Range(0, 3)] = 1.0,
    scope: Annotated[str, Choice("row", "tensor")] = "row",
    rescale: Annotated[str, Choice("inverse", "norm", "none")] = "inverse",
    elect: Annotated[str, Choice("mass", "count", "none")] = "mass",
    normalize: bool = True,
    weights: Sequence[float] | None = None,
    seed: Annotated[int, Range(0, 999)] = 0,
) -> dict[str, Tensor]:
    """Merge task vectors of which a random part was dropped, small entries more often than large ones.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i, fine-tuned from it.
        density: share of entries kept, on average.
        epsilon: the largest entry of a row is kept with probability density + epsilon, the smallest with
            density − epsilon; 0 is DARE. It shrinks where the window would leave [0, 1].
        scale: λ, what multiplies the merged task vector.
        scope: where magnitudes are ranked: in each row (paper, mergekit) or in each tensor.
        rescale: each entry by 1/p (paper), each tensor to its old L1 norm (mergekit), or not at all.
        elect: elect signs by mass (paper) or by count, where an even vote leaves the base; "none" sums everything.
        normalize: divide by the weights of those who have a say: the mean of the paper.
        weights: one factor an expert; None means 1 for each.
        seed: of the random masks; a tensor's mask depends on its name, not on its place.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor; weights that sum to 0 while `normalize` is on and nothing is elected.

    Source:
        Deep et al., 2024, arXiv 2406.11617, section 3; declare-lab/della.
    """
    factors = expert_weights(weights, len(experts))

    check(base, experts)
    result = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            result[name] = tensor.clone()
            continue
        kept = torch.stack(
            [
                _dropped(theta, tensor, tensor_generator(seed, name, i), density, epsilon, scope, rescale)
                for i, theta in enumerate(expert[name] for expert in experts)
            ]
        )
        out = tensor.new_empty(tensor.numel())
        for start in range(0, tensor.numel(), PIECE):
            where = slice(start, start + PIECE)
            weighted = kept[:, where] * kept.new_tensor(factors)[:, None]
            merged = fuse(weighted, elect, factors, normalize=normalize).mul_(scale)
            out[where] = merged.add_(at_least_float32(tensor.reshape(-1)[where]))
        result[name] = out.reshape(tensor.shape)
    return result


def _dropped(
    theta: Tensor, theta_0: Tensor, generator: torch.Generator, density: float, epsilon: float, scope: str, rescale: str
) -> Float[Tensor, " n"]:
    """What is left of one task vector's tensor. Rows are ranked each for itself, so a few at a time are."""
    n = theta.numel()
    row = n if scope == "tensor" or theta.ndim < 2 else _row_length(theta.shape)
    step = max(1, PIECE // max(row, 1)) * max(row, 1)
    result, norms = at_least_float32(theta.reshape(-1)[:0]).new_empty(n), [0.0, 0.0]
    for start in range(0, n, step):
        where = slice(start, start + step)
        tau = (at_least_float32(theta.reshape(-1)[where]) - at_least_float32(theta_0.reshape(-1)[where])).view(-1, row)
        keep = keep_probabilities(tau, density=density, epsilon=epsilon, scope=scope)
        kept = drop_by_rank(tau, keep, rescale, generator)
        norms = [norms[0] + float(tau.abs().sum()), norms[1] + float(kept.abs().sum())]
        result[where] = kept.view(-1)
    return result.mul_(norms[0] / norms[1]) if rescale == "norm" and norms[1] > 0 else result


def _row_length(shape: Sequence[int]) -> int:
    return shape[-1] if len(shape) <= 3 else math.prod(shape[1:])
