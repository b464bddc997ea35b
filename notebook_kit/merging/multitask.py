"""The multi-task vector, and the TALL masks that find each task in it again.

    sum   τ_MTL = Σ_t τ_t              or, "ties", TIES with the agreeing entries summed
    mask  m_t   = 1{ |τ_t| > threshold_t · |τ_MTL − τ_t| }

τ_t = θ_t − θ₀ [n]; τ_MTL − τ_t is what the other tasks put there. Wang et al., 2024, equations 2 and 4; the walk here
serves `tall_masks`, which keeps the masks, and `consensus`, which counts them.
"""

from collections.abc import Iterator, Sequence

from jaxtyping import Bool, Float
from torch import Tensor

from notebook_kit.merging.election import Taus, cancels, disjoint_merge, elect_sign
from notebook_kit.merging.selection import Trim, chunks
from notebook_kit.merging.ties import statistics as ties_statistics
from notebook_kit.merging.ties import trimmed
from notebook_kit.weights import Weights


def statistics(
    base: Weights, experts: Sequence[Weights], *, base_merge: str = "sum", density: float = 0.2, **_
) -> dict[str, object]:
    """What the "ties" form must know of the whole model; the plain sum needs nothing."""
    return ties_statistics(base, experts, density=density) if base_merge == "ties" else {}


def vectors(
    name: str,
    base: Weights,
    experts: Sequence[Weights],
    *,
    trim: Sequence[dict[str, Trim]] | None = None,
    tie_sign: float | None = None,
) -> Iterator[tuple[slice, Float[Tensor, " n"], Taus, Float[Tensor, " n"]]]:
    """Walk one tensor in pieces: (where, θ₀ there, the τ_t there, τ_MTL there); a plain sum unless `trim` is given."""
    ones = [1.0] * len(experts)
    trimmings = None if trim is None else trimmed(name, base, experts, trim, ones)
    for where, theta_0, tau in chunks(name, base, experts):
        if trimmings is None:
            yield where, theta_0, tau, tau.sum(dim=0)
            continue
        _, _, kept = next(trimmings)
        gamma = elect_sign(kept, "mass")
        gamma[cancels(kept, gamma) > 0] = tie_sign
        yield where, theta_0, tau, disjoint_merge(kept, gamma, ones, "sum")


def claimed(tau: Taus, multitask: Float[Tensor, " n"], thresholds: Sequence[float]) -> Bool[Tensor, "experts n"]:
    """m_t: the parameters at which a task outweighs the others; with threshold 0, wherever it changed anything."""
    others = (multitask - tau).abs_()
    for row, threshold in zip(others, thresholds, strict=True):
        row.mul_(threshold)
    return tau.abs() > others


def per_expert(threshold: float, thresholds: Sequence[float] | None, n_experts: int) -> list[float]:
    """One threshold for all, unless each expert has its own.

    Raises:
        ValueError: their number is not the number of experts, or one is negative or not finite.
    """
    if thresholds is None:
        return [threshold] * n_experts
    found = [float(value) for value in thresholds]
    if len(found) != n_experts:
        raise ValueError(f"thresholds must have one entry per expert, {n_experts}, got {len(found)}")
    if not all(0 <= value < float("inf") for value in found):
        raise ValueError(f"thresholds must be finite and not negative, got {found}")
    return found
