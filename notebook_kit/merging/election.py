"""Votes about a parameter: which sign is elected, and what the entries that agree with it come to.

    elect   γ_p  = sgn(Σ_i τ_ip), or another vote
    merge   τ*_p = mean, sum or largest of the τ_ip with sign γ_p

τ_i [n]: entries of expert i's task vector, some of them zero because they were trimmed or dropped; zeros have no vote.
Yadav et al., 2023, section 4; `resolve_sign` and `disjoint_merge` of the official code. Shared by every merge of this
room that elects.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

Taus = Float[Tensor, "experts n"]
Signs = Float[Tensor, " n"]


def elect_sign(tau: Taus, how: str, norms: Sequence[float] | None = None) -> Signs:
    """Elect each parameter's sign: +1 or -1, and 0 where the vote is even.

    Args:
        tau: task vectors.
        how: "mass" weighs a vote by |τ_ip|, "count" gives each one vote; "normmass" weighs by τ_ip² / ‖τ_i‖², and
            "normfrac" takes the sign of the entry for which that share is largest.
        norms: ‖τ_i‖, for the last two.
    """
    if how in ("normmass", "normfrac"):
        share = (tau * tau.new_tensor([1 / norm if norm else 0 for norm in norms])[:, None]).square_()
        if how == "normfrac":
            return tau.gather(0, share.argmax(dim=0, keepdim=True))[0].sign_()
        tau = share.mul_(tau.sign())
    return (tau.sign() if how == "count" else tau).sum(dim=0).sign_()


def disjoint_merge(tau: Taus, gamma: Signs | None, weights: Sequence[float], combine: str) -> Float[Tensor, " n"]:
    """Merge: combine, for each parameter, only the entries that have the elected sign (all, without an election)."""
    if combine == "average":  # the ablation: everyone counts, zeros and dissenters too
        merged = tau.sum(dim=0).div_(sum(map(abs, weights)) or 1)
        return merged if gamma is None else merged.abs_().mul_(gamma)
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
    n = (voters * tau.new_tensor(weights).abs()[:, None]).sum(dim=0)
    return merged.div_(n.masked_fill_(n == 0, 1))


def fuse(tau: Taus, elect: str, weights: Sequence[float], *, normalize: bool) -> Float[Tensor, " n"]:
    """Sum the weighted task vectors, or only their entries that win the election; an even vote leaves 0.

    Args:
        tau: task vectors, already multiplied by the weights.
        elect: "none", "mass" or "count".
        weights: one factor an expert.
        normalize: divide by the weights of those who have a say.

    Raises:
        ValueError: without an election, weights that sum to 0 while `normalize` is on.
    """
    if elect != "none":
        return disjoint_merge(tau, elect_sign(tau, elect), weights, "mean" if normalize else "sum")
    if normalize and abs(sum(weights)) < 1e-12:
        raise ValueError(f"weights sum to {sum(weights):g}, so they cannot be normalized; set normalize=False")
    return tau.sum(dim=0).div_(sum(weights) if normalize else 1)


def cancels(tau: Taus, gamma: Signs) -> Float[Tensor, " n"]:
    """The mass that stands behind an even vote; more than 0 only where entries were kept and their sum is exactly 0."""
    return tau.abs().sum(dim=0).mul_(1 - gamma.abs())
