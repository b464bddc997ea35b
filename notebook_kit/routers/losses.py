"""Losses that routers add to the task's: even load, small logits, small spread. Each is a plain function."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from notebook_kit.catalog import method


@method(family="routers", paper=("switch", "gshard"))
def load_balancing_loss(
    probs: Float[Tensor, "tokens experts"],
    experts: Int[Tensor, "tokens k"],
    *,
    mask: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """N Σᵢ fᵢ Pᵢ: smallest when every expert gets the same share of tokens and of probability.

    fᵢ is the share of tokens that picked i (a count, no gradient), Pᵢ the mean probability of i (the gradient flows
    here). With one pick a token (Switch; GShard counts first choices) an even load gives 1. With k picks f sums to k
    and an even load gives k: so transformers' Mixtral counts, over all layers at once, where this is one layer.

    Args:
        probs: p, rows sum to 1.
        experts: picks before capacity dropped any; -1 is no pick.
        mask: True for real tokens.

    Returns:
        Scalar; multiply by a coefficient such as 0.01.

    Source: Fedus et al. 2021, equations 4 to 6.
    """
    n_experts = probs.shape[1]
    if mask is not None:
        probs, experts = probs[mask], experts[mask]
    picks = torch.bincount(experts.reshape(-1) + 1, minlength=n_experts + 1)[1:]  # T f
    return picks.float() @ probs.float().sum(0) * (n_experts / max(len(probs), 1) ** 2)


@method(family="routers", paper="st-moe")
def z_loss(
    logits: Float[Tensor, "tokens experts"],
    *,
    mask: Bool[Tensor, " tokens"] | None = None,
    normalizer: Float[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """mean over tokens of (logsumexp z)²: keeps logits small, where float rounding is fine-grained.

    The softmax does not see a constant added to all logits; this loss does.

    Args:
        logits: z.
        mask: True for real tokens.
        normalizer: logsumexp z, where it is known already (`log_normalizer`).

    Returns:
        Scalar; multiply by a coefficient such as 0.001.

    Source: Zoph et al. 2022, equation 5.
    """
    normalizer = logits.float().logsumexp(1) if normalizer is None else normalizer
    normalizer = normalizer if mask is None else normalizer[mask]
    return normalizer.square().sum() / max(len(normalizer), 1)


def log_normalizer(
    logits: Float[Tensor, "tokens experts"],
    probs: Float[Tensor, "tokens experts"],
    experts: Int[Tensor, "tokens k"],
) -> Float[Tensor, " tokens"]:
    """logsumexp z, from one probability that is known already: z_i - log p_i.

    Args:
        logits: z.
        probs: softmax of z.
        experts: the first column is read; take the most probable, which is not 0.
    """
    best = experts[:, :1]
    return (logits.gather(1, best) - probs.gather(1, best).log()).squeeze(1)


@method(family="routers", paper="sparsely-gated-moe")
def cv_squared(amounts: Float[Tensor, " experts"]) -> Float[Tensor, ""]:
    """variance / mean²: the squared coefficient of variation of what the experts got.

    Args:
        amounts: one non-negative number an expert, such as the sum of its weights.

    Returns:
        Scalar, 0 for one expert or when nobody got anything. The variance is the unbiased one, as in the codes.

    Source: Shazeer et al. 2017, equation 7.
    """
    if len(amounts) < 2:
        return amounts.sum() * 0
    return amounts.float().var() / (amounts.float().mean().square() + 1e-10)
