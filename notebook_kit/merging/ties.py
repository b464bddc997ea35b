"""TIES: task vectors interfere through small redundant changes and through opposite signs; remove both, then average.

    trim    τ̂_i  = τ_i where |τ_i| is among its ⌊density · d⌋ largest, else 0
    elect   γ_p  = sgn(Σ_i τ̂_ip)                       the sign with more mass behind it
    merge   τ*_p = mean of the τ̂_ip ≠ 0 with sign γ_p   zeros do not count
            θ    = θ₀ + λ τ*

τ_i = θ_i − θ₀ [d]: task vector of expert i; p: a parameter; λ: `scale`. Yadav et al., 2023, section 4, algorithm 1.
Where the official code differs: it keeps one entry more than ⌊density · d⌋ (an index off by one); here exactly that
many. Where the masses cancel exactly, both take the sign that most parameters have.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import hardshrink

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.selection import Trim, chunks, trims
from notebook_kit.weights import Weights, check, expert_weights, float_keys

Taus = Float[Tensor, "experts n"]
Signs = Float[Tensor, " n"]


def keep_largest(tau: Taus, trim: Sequence[Trim], drop: list[int]) -> Taus:
    """Trim: zero what lies under each expert's threshold, and the first `drop` entries exactly at it."""
    rows = []
    for i, (row, rule) in enumerate(zip(tau, trim, strict=True)):
        kept = hardshrink(row, rule.just_under(row.dtype))
        if drop[i]:
            tied = (row.abs() == rule.threshold).nonzero().squeeze(-1)[: drop[i]]
            kept[tied] = 0
            drop[i] -= len(tied)
        rows.append(kept)
    return torch.stack(rows)


def elect_sign(tau: Taus, how: str) -> Signs:
    """Elect each parameter's sign, by mass or by count: +1 or -1, and 0 where the vote is even."""
    return (tau if how == "mass" else tau.sign()).sum(dim=0).sign_()


def disjoint_merge(tau: Taus, gamma: Signs | None, weights: Sequence[float], combine: str) -> Float[Tensor, " n"]:
    """Merge: combine, for each parameter, only the entries that have the elected sign (all, without an election)."""
    if gamma is None:
        if combine == "max":
            return tau.gather(0, tau.abs().argmax(dim=0, keepdim=True))[0]
        agreeing, gamma = tau, 1.0
    else:
        agreeing = (tau * gamma).relu_()  # magnitudes of those that agree, 0 for the others
    if combine == "max":
        return agreeing.amax(dim=0) * gamma
    merged = agreeing.sum(dim=0) * gamma
    if combine == "sum":
        return merged
    voters = agreeing.sign().abs_()
    if all(weight == 1 for weight in weights):
        return merged.div_(voters.sum(dim=0).clamp_(min=1))
    n = (voters * torch.tensor(weights, dtype=tau.dtype).abs()[:, None]).sum(dim=0)
    return merged.div_(n.masked_fill_(n == 0, 1))


def cancels(tau: Taus, gamma: Signs) -> Float[Tensor, " n"]:
    """The mass that stands behind an even vote; more than 0 only where entries were kept and their sum is exactly 0."""
    return tau.abs().sum(dim=0).mul_(1 - gamma.abs())


def statistics(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: float = 0.2,
    scope: str = "model",
    elect: str = "mass",
    weights: Sequence[float] | None = None,
    **_,
) -> dict[str, object]:
    """What TIES must know of the whole model before it can merge one tensor: thresholds, and the majority's sign."""
    trim = trims(base, experts, density=density, scope=scope)
    if elect == "none":
        return {"trim": trim}
    factors, votes, even = expert_weights(weights, len(experts)), 0.0, 0.0
    for name in float_keys(base):
        for _, _, tau in trimmed(name, base, experts, trim, factors):
            gamma = elect_sign(tau, elect)
            votes += float(gamma.sum())
            even += float(cancels(tau, gamma).sum())
    return {"trim": trim, "tie_sign": -1.0 if even and votes < 0 else 1.0}


@method(family="merging", paper="ties-merging", statistics=statistics)
def ties(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: Annotated[float, Range(0, 1)] = 0.2,
    scale: Annotated[float, Range(0, 3)] = 1.0,
    scope: Annotated[str, Choice("model", "tensor")] = "model",
    elect: Annotated[str, Choice("mass", "count", "none")] = "mass",
    combine: Annotated[str, Choice("mean", "sum", "max")] = "mean",
    weights: Sequence[float] | None = None,
    trim: Sequence[dict[str, Trim]] | None = None,
    tie_sign: float | None = None,
) -> dict[str, Tensor]:
    """Merge by trim, elect sign, and disjoint mean.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i, fine-tuned from it.
        density: share of each task vector that is kept; 1 trims nothing.
        scale: λ, what multiplies the merged task vector.
        scope: where the largest are sought: in the whole model (paper) or in each tensor (mergekit, peft).
        elect: the sign that counts: by mass (paper), by count, or no election.
        combine: of the agreeing entries, the mean (paper), sum or largest.
        weights: one factor an expert, applied before the election; None means 1 for each.
        trim: from `statistics`, when the model is merged in parts; None computes it.
        tie_sign: from `statistics`; None computes it.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor.

    Source:
        Yadav et al., 2023, arXiv 2306.01708, algorithm 1; prateeky2806/ties-merging.
    """
    check(base, experts)
    factors = expert_weights(weights, len(experts))
    if trim is None:
        trim = trims(base, experts, density=density, scope=scope)

    result, votes, if_negative = {}, 0.0, []
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            result[name] = tensor.clone()
            continue
        out = torch.empty(tensor.numel(), dtype=tensor.dtype)
        for where, theta_0, tau in trimmed(name, base, experts, trim, factors):
            gamma = None
            if elect != "none":
                gamma = elect_sign(tau, elect)
                votes += float(gamma.sum())
                even = cancels(tau, gamma)
                if float(even.sum()) > 0:
                    p = even.nonzero().squeeze(-1)
                    if tie_sign is None:  # the majority is known at the end: keep what these would be if it is negative
                        other = disjoint_merge(tau[:, p], gamma[p] - 1, factors, combine).mul_(scale).add_(theta_0[p])
                        if_negative.append((out, where.start + p, other.to(out.dtype)))
                    gamma[p] = 1.0 if tie_sign is None else tie_sign
            out[where] = disjoint_merge(tau, gamma, factors, combine).mul_(scale).add_(theta_0)
        result[name] = out.reshape(tensor.shape)
    if votes < 0:
        for out, places, values in if_negative:
            out[places] = values
    return result


def trimmed(name: str, base: Weights, experts: Sequence[Weights], trim: Sequence[dict], factors: Sequence[float]):
    """Walk one tensor in pieces: (where, θ₀ there, the weighted and trimmed task vectors there)."""
    rules = [of_expert[name] for of_expert in trim]
    drop = [rule.drop.get(name, 0) for rule in rules]
    for where, theta_0, tau in chunks(name, base, experts):
        tau = keep_largest(tau, rules, drop)
        for row, factor in zip(tau, factors, strict=True):
            if factor != 1:
                row.mul_(factor)
        yield where, theta_0, tau
