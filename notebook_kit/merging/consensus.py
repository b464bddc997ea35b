"""Consensus merging: delete from a merged task vector what no task claims, and what only one task claims.

    m_t = 1{ |τ_t| > threshold_t · |τ_MTL − τ_t| }
    θ   = θ₀ + λ · 1{ Σ_t m_t ≥ k } ⊙ τ_MTL

m_t: TALL masks (`multitask`); τ_MTL: the sum of the task vectors, or TIES' disjoint sum. k = 0 keeps all and is task
arithmetic or TIES; k = 1 drops catastrophic weights, which no task claims; k = 2 drops selfish ones too, which exactly
one task claims; k > the number of experts gives θ₀. λ: `scale`, by validation. One model for all tasks, no cost when it
runs. Wang et al., 2024, section 4.3; official code nik-dim/tall_masks, where k is `prun_thre_k`, threshold is
`tall_mask_lambda`, and `thresholds` are chosen task by task (`choose_thresholds`).
"""

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.multitask import claimed, per_expert, statistics, vectors
from notebook_kit.merging.selection import Trim
from notebook_kit.weights import Weights, check


@method(family="merging", paper="tall-masks", statistics=statistics)
def consensus(
    base: Weights,
    experts: Sequence[Weights],
    *,
    k: Annotated[int, Range(0, 64)] = 2,
    scale: Annotated[float, Range(0, 3)] = 0.3,
    threshold: Annotated[float, Range(0, 2)] = 0.4,
    base_merge: Annotated[str, Choice("sum", "ties")] = "sum",
    density: Annotated[float, Range(0, 1)] = 0.2,
    thresholds: Sequence[float] | None = None,
    trim: Sequence[dict[str, Trim]] | None = None,
    tie_sign: float | None = None,
) -> dict[str, Tensor]:
    """Merge the weights that at least `k` tasks claim, and leave the others at the base.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_t, fine-tuned from it.
        k: how many tasks must claim a weight.
        scale: λ, what multiplies the merged task vector.
        threshold: how much a task must outweigh the others to claim a weight; larger claims fewer.
        base_merge: τ_MTL as the sum of the task vectors, or as TIES' disjoint sum.
        density: share of each task vector that TIES keeps.
        thresholds: one an expert, from `choose_thresholds`; None takes `threshold` for all.
        trim: from `statistics`, when the model is merged in parts; None computes it.
        tie_sign: from `statistics`; None computes it.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor; thresholds that do not fit the experts.

    Source:
        Wang et al., 2024, arXiv 2405.07813, section 4.3; nik-dim/tall_masks.
    """
    check(base, experts)
    levels = per_expert(threshold, thresholds, len(experts))
    seen = {"trim": trim, "tie_sign": tie_sign}
    if trim is None:
        seen = statistics(base, experts, base_merge=base_merge, density=density)
    result = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            result[name] = tensor.clone()
            continue
        out = tensor.new_empty(tensor.numel())
        for where, theta_0, tau, multitask in vectors(name, base, experts, **seen):
            agreed = claimed(tau, multitask, levels).sum(dim=0) >= k
            out[where] = theta_0 + scale * agreed * multitask
        result[name] = out.reshape(tensor.shape)
    return result
