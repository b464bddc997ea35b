"""TIES: task vectors interfere through small redundant changes and through opposite signs; remove both, then average.

    trim    τ̂_i  = τ_i where |τ_i| is among its ⌊density · d⌋ largest, else 0
    elect   γ_p  = sgn(Σ_i τ̂_ip)                       the sign with more mass behind it
    merge   τ*_p = mean of the τ̂_ip ≠ 0 with sign γ_p   zeros do not count
            θ    = θ₀ + λ τ*

τ_i = θ_i − θ₀ [d]: task vector of expert i; p: a parameter; λ: `scale`. Yadav et al., 2023, section 4, algorithm 1.
Where the official code differs: it keeps one entry more than ⌊density · d⌋ (an index off by one); here exactly that
many. Where the masses cancel exactly, both take the sign that most parameters have.
Steps are switched off by density=1 (no trim), elect="none" (no election), combine="average" (a plain mean over all
experts in place of the disjoint one; with an election it gets the elected sign, as in the official code).
Peers: mergekit and peft trim each tensor (`scope="tensor"`); peft multiplies by the weights after the election.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.election import Signs, Taus, cancels, disjoint_merge, elect_sign
from notebook_kit.merging.selection import Trim, chunks, trims, without_tied
from notebook_kit.weights import IncompatibleWeights, Weights, check, expert_weights, float_keys


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


def statistics(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: float = 0.2,
    scope: str = "model",
    elect: str = "mass",
    weights: Sequence[float] | None = None,
    signs: Weights | None = None,
    **_,
) -> dict[str, object]:
    """What TIES must know of the whole model before it can merge one tensor: thresholds, norms, the majority's sign."""
    trim = trims(base, experts, density=density, scope=scope)
    if elect == "none" or signs is not None:
        return {"trim": trim}
    factors, votes, even = expert_weights(weights, len(experts)), 0.0, 0.0
    norms = lengths(base, experts, trim, scope) if elect.startswith("norm") else None
    for name in float_keys(base):
        for _, _, tau in trimmed(name, base, experts, trim, factors):
            gamma = elect_sign(tau, elect, norms and norms[name])
            votes += float(gamma.sum())
            even += float(cancels(tau, gamma).sum())
    seen = {"trim": trim, "tie_sign": -1.0 if even and votes < 0 else 1.0}
    return seen if norms is None else seen | {"norms": norms}


@method(family="merging", paper="ties-merging", statistics=statistics)
def ties(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: Annotated[float, Range(0, 1)] = 0.2,
    scale: Annotated[float, Range(0, 3)] = 1.0,
    scope: Annotated[str, Choice("model", "tensor")] = "model",
    elect: Annotated[str, Choice("mass", "count", "normmass", "normfrac", "none")] = "mass",
    combine: Annotated[str, Choice("mean", "sum", "max", "average")] = "mean",
    weights: Sequence[float] | None = None,
    signs: Weights | None = None,
    trim: Sequence[dict[str, Trim]] | None = None,
    tie_sign: float | None = None,
    norms: dict[str, list[float]] | None = None,
) -> dict[str, Tensor]:
    """Merge by trim, elect sign, and disjoint mean.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i, fine-tuned from it.
        density: share of each task vector that is kept; 1 trims nothing.
        scale: λ, what multiplies the merged task vector.
        scope: where the largest are sought: in the whole model (paper) or in each tensor (mergekit, peft).
        elect: the sign that counts: by mass (paper), by count, by share of the task vector's squared norm (normmass:
            summed, normfrac: the largest), or no election.
        combine: of the agreeing entries, the mean (paper), sum or largest; or the plain average over all experts.
        weights: one factor an expert, applied before the election; None means 1 for each.
        signs: an oracle in place of the election: tensors whose signs are taken, such as
            `task_vector(base, multitask)` of a model trained on all tasks; where it is 0 the base stays.
        trim: from `statistics`, when the model is merged in parts; None computes it.
        tie_sign: from `statistics`; None computes it.
        norms: from `statistics`; None computes them where `elect` needs them.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ; a tensor has no signs, or signs of another shape.
        ValueError: NaN or Inf in a tensor.

    Source:
        Yadav et al., 2023, arXiv 2306.01708, algorithm 1; prateeky2806/ties-merging.
    """
    check(base, experts)
    factors = expert_weights(weights, len(experts))
    if trim is None:
        trim = trims(base, experts, density=density, scope=scope)
    if norms is None and signs is None and elect.startswith("norm"):
        norms = lengths(base, experts, trim, scope)

    result, votes, if_negative = {}, 0.0, []
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            result[name] = tensor.clone()
            continue
        oracle = None if signs is None else _oracle(signs, name, tensor)
        out = tensor.new_empty(tensor.numel())
        for where, theta_0, tau in trimmed(name, base, experts, trim, factors):
            gamma = None
            if oracle is not None:
                gamma = oracle[where].to(tau.dtype).sign()
            elif elect != "none":
                gamma = elect_sign(tau, elect, norms and norms[name])
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


def lengths(base: Weights, experts: Sequence[Weights], trim: Sequence[dict], scope: str) -> dict[str, list[float]]:
    """‖τ̂_i‖ for each tensor's election: of the whole model, where tied tensors count once, or of that tensor."""
    once, ones = set(without_tied(base)), [1.0] * len(experts)
    squares, total = {}, torch.zeros(len(experts), dtype=torch.float64)
    for name in float_keys(base):
        parts = [tau.double().square().sum(dim=1).cpu() for _, _, tau in trimmed(name, base, experts, trim, ones)]
        squares[name] = sum(parts, torch.zeros_like(total))
        total += squares[name] if name in once else 0
    return {name: (total if scope == "model" else square).sqrt().tolist() for name, square in squares.items()}


def _oracle(signs: Weights, name: str, tensor: Tensor) -> Signs:
    if name not in signs:
        raise IncompatibleWeights(f"signs has no tensor {name!r}; give one for each floating tensor of base (ties)")
    if signs[name].shape != tensor.shape:
        raise IncompatibleWeights(
            f"signs[{name!r}] has shape {list(signs[name].shape)}, base has {list(tensor.shape)} (ties)"
        )
    return signs[name].reshape(-1).float()
