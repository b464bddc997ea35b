"""The scores of PCB: how much a parameter matters inside its own task, and how well it agrees with the other tasks.

    clip    c_i  = |τ_i| clipped to its [q, 1 − q] quantiles,        τc_i = sgn(τ_i) ⊙ c_i
    intra   exp(K · norm(c_i)²)               or, "softmax",          exp(K · norm(c_i²))
    inter   tanh(τ_i ⊙ Σ_j τ_j)               or, "votes",            tanh(τ_i ⊙ Σ_j sgn(τ_j) ⊙ norm(c_j))
                                              or, "pairwise_softmax", Σ_j softmax(norm(τ_i ⊙ τ_j))
    drop    S_i  = norm(max(B_i, its (1 − r) quantile)),              B = intra ⊙ inter

norm(x) = (x − min)/(max − min) over the parameters of one expert, 0 where all are equal. K: number of experts, or
`power`; r: density. S is 0 for what is dropped and 1 for each expert's best parameter. Du et al., 2024, section 3.
The first form of each score, the clipping and the norm in the last line are the official code's; the paper's text has
the softmax forms. Here intra is divided by e^K, a constant of its row that S does not see; so is the softmax's sum.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.merging.election import Taus
from notebook_kit.merging.ranks import kth_largest
from notebook_kit.merging.selection import chunks, without_tied
from notebook_kit.weights import Weights, float_keys

Row = Float[Tensor, " n"]


@dataclass
class Levels:
    """What the scores of one expert need to know of all its parameters."""

    low: float  # the quantiles of |τ|
    high: float
    threshold: float = 0.0  # of B
    top: float = 0.0
    pairs: list[tuple[float, float, float]] = field(default_factory=list)  # min, max of τ_i ⊙ τ_j; Σ of exp(norm)


@dataclass(frozen=True)
class Scoring:
    """Which form of each score is meant."""

    intra: str
    inter: str
    power: float

    @property
    def off(self) -> bool:
        """Neither score is on: nothing is dropped, and PCB is the plain average of the clipped task vectors."""
        return self.intra == self.inter == "none"

    def intra_score(self, tau: Row, at: Levels) -> Row:
        """Importance inside the task, from e^-K to 1."""
        c = tau.abs().clamp_(at.low, at.high)
        if self.intra == "none":
            return torch.ones_like(c)
        share = norm(c, at.low, at.high).square_() if self.intra == "exp" else norm(c**2, at.low**2, at.high**2)
        return share.sub_(1).mul_(self.power).exp_()

    def inter_score(self, tau: Taus, i: int, levels: Sequence[Levels]) -> Row:
        """Agreement of expert i with all."""
        if self.inter == "none":
            return torch.ones_like(tau[i])
        if self.inter == "sum":
            return (tau[i] * tau.sum(dim=0)).tanh_()
        if self.inter == "votes":
            votes = [
                row.sign() * norm(row.abs().clamp_(at.low, at.high), at.low, at.high)
                for row, at in zip(tau, levels, strict=True)
            ]
            return (tau[i] * sum(votes)).tanh_()
        products = (
            norm(tau[i] * row, low, high).exp_() / total
            for row, (low, high, total) in zip(tau, levels[i].pairs, strict=True)
        )
        return sum(products, torch.zeros_like(tau[i]))

    def balance(self, tau: Taus, i: int, levels: Sequence[Levels]) -> Row:
        """B_i, the product of both."""
        return self.intra_score(tau[i], levels[i]) * self.inter_score(tau, i, levels)

    def kept(self, tau: Taus, i: int, levels: Sequence[Levels]) -> Row:
        """S_i: 0 for what is dropped, up to 1."""
        if self.off:
            return torch.ones_like(tau[i])
        return norm(self.balance(tau, i, levels), levels[i].threshold, levels[i].top).clamp_(0, 1)


def norm(x: Row, low: float, high: float) -> Row:
    """(x − low)/(high − low), or 0 where the two are equal."""
    return (x - low) / (high - low) if high > low else torch.zeros_like(x)


def levels_of(
    base: Weights, experts: Sequence[Weights], scoring: Scoring, *, density: float, clip: float, scope: str
) -> dict[str, list[Levels]]:
    """Read the models tensor by tensor for what the scores must know: for each tensor, one `Levels` an expert."""
    names = without_tied(base)
    groups = [names] if scope == "model" else [[name] for name in float_keys(base)]
    found: dict[str, list[Levels]] = {}
    for group in groups:
        d = sum(base[name].numel() for name in group)
        levels = _levels(base, experts, group, d, scoring, density, clip) if d else [Levels(0, 0) for _ in experts]
        found |= dict.fromkeys(group, levels)
    shared = next(iter(found.values()), [])
    return {
        name: found.get(name, shared) for name in float_keys(base)
    }  # a tied copy is scored as the first of its kind


def _levels(base, experts, names, d, scoring, density, clip) -> list[Levels]:
    def walk():
        return _walk(base, experts, names)

    # Ranks from the largest, of the sorted positions ⌊d q⌋ and ⌊d (1 − q) − 1⌋ of the official code.
    ranks = d - min(int(d * clip), d - 1), d - max(int(d * (1 - clip) - 1), 0)
    levels = []
    for expert in experts:

        def magnitudes(expert=expert):
            return (tau[0].abs() for tau in _walk(base, [expert], names))

        low, high = kth_largest(magnitudes, d, ranks)
        levels.append(Levels(low, max(low, high)))
    if scoring.off:
        return levels
    if scoring.inter == "pairwise_softmax":
        for i, at in enumerate(levels):
            at.pairs = [_pair(walk, i, j) for j in range(len(experts))]
    for i, at in enumerate(levels):

        def balances(i=i):
            return (scoring.balance(tau, i, levels) for tau in walk())

        at.threshold, at.top = kth_largest(balances, d, (d - min(int(d * (1 - density)), d - 1), 1))
    return levels


def _pair(walk, i: int, j: int) -> tuple[float, float, float]:
    low, high = float("inf"), -float("inf")
    for tau in walk():
        least, most = (tau[i] * tau[j]).aminmax()
        low, high = min(low, float(least)), max(high, float(most))
    return low, high, math.fsum(float(norm(tau[i] * tau[j], low, high).exp_().sum()) for tau in walk())


def _walk(base: Weights, experts: Sequence[Weights], names: Sequence[str]) -> Iterator[Taus]:
    for name in names:
        for _, _, tau in chunks(name, base, experts):
            yield tau
