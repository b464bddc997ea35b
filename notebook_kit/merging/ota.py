"""OTA: average what experts changed, each edit weighted by the curvature that its optimiser measured on the way.

    P_i = v_i^p + ε                                  p = ½: √v, Adam's preconditioner
    θ   = θ₀ + λ Σ_i P_i m_i Δ_i / Σ_i P_i m_i        entry by entry; θ₀ where every mask is 0

Δ_i = θ_i − θ₀; v_i ≥ 0: expert i's second moments, of the same shape; m_i: its FFG mask (`graft`), 1 for the edits that
matter. Masked edits leave the denominator too: what only one expert wants is taken at full strength. With density 1 it
is Fisher merging with √v in place of F. Mahdavinia et al., 2025, sections 3 to 5.

Official code (pmahdavi/ota-merge) differs: with "linear" or "ties" and no rescaling it does not apply the masks to Δ,
here they always are; unless told otherwise its ε is 1e-8, which would swamp √v, and its fallback the mean; its "ties"
divides by all experts, here by those that agree (as TIES); tensors of three axes or more are rescaled as matrices.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.contract import tensor_by_tensor
from notebook_kit.merging.graft import statistics
from notebook_kit.merging.importance import MADE_BY, compressed, mask_of
from notebook_kit.merging.moments import EMBEDDING
from notebook_kit.merging.per_parameter import Pieces, find
from notebook_kit.merging.selection import Trim
from notebook_kit.weights import Weights, at_least_float32, check, expert_weights

Stack = Float[Tensor, "experts n"]


def combine(delta: Stack, P: Stack, aggregate: str) -> Float[Tensor, " n"]:
    """Join masked edits: the mean weighted by P (0 where masked), the plain mean, or the mean of those that agree.

    Args:
        delta: m_i Δ_i.
        P: weights, 0 where masked.
        aggregate: "precond", "linear" or "ties".
    """
    if aggregate == "precond":
        total = P.sum(dim=0)
        return (P / torch.where(total == 0, 1.0, total) * delta).sum(dim=0)
    if aggregate == "linear":
        return delta.mean(dim=0)
    agrees = delta.sign() * delta.sum(dim=0).sign() > 0
    return (delta * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


@method(family="merging", paper="ota-ffg", statistics=statistics)
def ota(
    base: Weights,
    experts: Sequence[Weights],
    *,
    moments: Sequence[Weights],
    density: Annotated[float, Range(0, 1)] = 0.4,
    power: Annotated[float, Range(0, 1)] = 0.5,
    scale: Annotated[float, Range(0, 3)] = 1.0,
    epsilon: Annotated[float, Range(1e-30, 1e-8, log=True)] = 1e-26,
    importance: Annotated[str, Choice("fisher", "magnitude", "curvature")] = "fisher",
    curvature: Annotated[str, Choice("full", "rank1", "svd")] = "full",
    rank: Annotated[int, Range(1, 256, log=True)] = 4,
    aggregate: Annotated[str, Choice("precond", "linear", "ties")] = "precond",
    fallback: Annotated[str, Choice("base", "mean")] = "base",
    rescale: bool = False,
    normalize_moments: bool = False,
    weights: Sequence[float] | None = None,
    trim: Sequence[dict[str, Trim]] | None = None,
) -> dict[str, Tensor]:
    """Merge the edits that matter, each weighted by its curvature.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i, fine-tuned from it.
        moments: one mapping of v by tensor name an expert, from `training.fit(moments=...)`. A tensor that is in none
            of them gets the weighted mean of the experts.
        density: share of each expert's edits that is kept, over its whole model; 1 masks nothing (OTA without FFG).
        power: p, exponent of the curvature; 0 gives all surviving edits the same say.
        scale: λ, what multiplies the joined edits; the paper's rule has none (1).
        epsilon: added to v^p; must lie far below it.
        importance: what ranks the edits: v Δ² ("fisher", the paper), |Δ| or v.
        curvature: v as it is, or as restored from a rank-1 or a truncated-SVD compression, before masking.
        rank: directions kept by "svd".
        aggregate: weighted mean ("precond", the paper), plain mean over all experts, or mean of those with the elected
            sign.
        fallback: what stands where every mask is 0: the base, or the mean of the experts.
        rescale: bring each tensor's masked edits back to their old norm (matrix: spectral; embedding: longest column;
            vector: RMS).
        normalize_moments: divide each v^p by its mean in the tensor.
        weights: one factor an expert on P (on the edits for "linear" and "ties", divided by their mean); None means 1.
        trim: from `statistics`, when the model is merged in parts; None computes it.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ, of experts or moments.
        ValueError: NaN or Inf in a tensor, a negative moment, weights that are negative or all 0.

    Source:
        Mahdavinia et al., 2025, arXiv 2509.11167, sections 3 to 5; pmahdavi/ota-merge, merge_methods/ota.py.
    """
    check(base, experts)
    factors = torch.tensor(expert_weights(weights, len(experts)))
    if factors.min() < 0 or factors.sum() == 0:
        raise ValueError(f"weights must be at least 0 and not all 0, got {factors.tolist()} (ota)")
    if trim is None:
        settings = {"density": density, "importance": importance, "curvature": curvature, "rank": rank}
        trim = statistics(base, experts, moments=moments, **settings)["trim"]
    moments = compressed(base, moments, curvature, rank)
    share = factors / factors.mean()

    def prepare(name: str) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor] | None:
        v = find(name, base, moments, len(experts), "moments", source=MADE_BY)
        if v is None:
            return None
        masks, stretch = [], []
        for expert, one, rule in zip(experts, v, trim, strict=True):
            delta = at_least_float32(expert[name]) - at_least_float32(base[name])
            m = mask_of(name, base, delta, one, rule, density, importance)
            stretch.append(_to_old_norm(name, delta * m, delta) if rescale else 1.0)
            masks.append(m.reshape(-1))
        means = [one.pow(power).mean() + epsilon if normalize_moments else 1.0 for one in v]
        return [one.reshape(-1) for one in v], masks, _column(stretch), _column(means)

    pieces = Pieces(prepare)

    def merge(name: str, theta_0: Tensor, thetas: list[Tensor]) -> Tensor:
        delta, by_expert = torch.stack(thetas) - theta_0, _column(share).to(theta_0)
        ready, here = pieces.next(name, len(theta_0))
        if ready is None:
            return theta_0 + (by_expert * delta).mean(dim=0)
        v, masks, stretch, means = ready
        m = torch.stack([mask[here] for mask in masks])
        P = torch.stack([one[here] for one in v]).to(theta_0).pow(power) / means.to(theta_0)
        P = (P + epsilon) * m * by_expert
        kept = delta * m * stretch.to(theta_0)
        merged = scale * combine(kept if aggregate == "precond" else kept * by_expert, P, aggregate)
        if fallback == "mean":
            merged = torch.where((P > 0).any(dim=0), merged, (by_expert * delta).mean(dim=0))
        return theta_0 + merged

    return tensor_by_tensor(base, experts, merge, elementwise=True)


def _column(numbers) -> Float[Tensor, "experts 1"]:
    return torch.tensor([float(number) for number in numbers])[:, None]


def _to_old_norm(name: str, kept: Tensor, delta: Tensor) -> float:
    """What brings an edit back to its norm; one of which next to nothing survived is dropped, as in official code."""
    old, new = (_norm(name, tensor) for tensor in (delta, kept))
    return float(old / new) if new > 1e-6 * old else 0.0


def _norm(name: str, tensor: Tensor) -> Tensor:
    # Only the ratio of two such norms is used, so that the factors of size (√(n/m), 1/√m) fall out.
    if tensor.ndim < 2 or tensor.numel() == 0:
        return tensor.norm()
    matrix = tensor.reshape(len(tensor), -1)
    return matrix.norm(dim=0).max() if EMBEDDING.search(name) else torch.linalg.matrix_norm(matrix, ord=2)
