"""Fast Fisher Grafting: undo the edits that curvature says do not matter, and keep the rest as they are.

    s = v ⊙ Δ²                        twice what undoing one edit alone would cost, to second order
    m = 1{s ≥ T}                      T: ONE threshold for the whole model, so that a share `density` is kept
    θ = θ₀ + m ⊙ Δ                    the grafted expert

Δ = θ_i − θ₀: what expert i changed; v ≥ 0: its curvature, such as Adam's second moment (`training.fit(moments=...)`) or
a diagonal Fisher, of the same shape. At the expert the gradient is near 0, so the loss rises by about ½ v Δ² where an
edit is undone. Layers compete for the budget: the densities that they end with say where the task lives. Mahdavinia et
al., 2025, section 5.

Tensors in no `moments` (buffers, frozen heads) stay as the expert has them, and do not count. Of the others, exactly
⌊density · d⌋ edits are kept, but none whose score is 0, unless the density is 1. Where scores tie, the first go.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Bool
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range, hyperparameters, validate
from notebook_kit.merging.contract import tensor_by_tensor
from notebook_kit.merging.importance import MADE_BY, compressed, mask_of, thresholds
from notebook_kit.merging.per_parameter import find
from notebook_kit.merging.selection import Trim
from notebook_kit.weights import Weights, at_least_float32, check, float_keys


def statistics(
    base: Weights,
    experts: Sequence[Weights],
    *,
    moments: Sequence[Weights],
    density: float = 0.4,
    importance: str = "fisher",
    curvature: str = "full",
    rank: int = 4,
    **_,
) -> dict[str, object]:
    """What must be known of the whole model before one tensor can be masked: a threshold for each expert."""
    moments = compressed(base, moments, curvature, rank)
    return {"trim": thresholds(base, experts, moments, density=density, importance=importance)}


def graft_masks(
    base: Weights,
    experts: Sequence[Weights],
    *,
    moments: Sequence[Weights],
    density: float = 0.4,
    importance: str = "fisher",
    curvature: str = "full",
    rank: int = 4,
) -> list[dict[str, Bool[Tensor, "..."]]]:
    """Say which edits of each expert are kept.

    Args:
        base, experts, moments, density, importance, curvature, rank: as in `fast_fisher_graft`, for any number of
            experts.

    Returns:
        list: for each expert, tensor name -> mask of the tensor's shape; tensors without a moment are left out.
    """
    settings = {"density": density, "importance": importance, "curvature": curvature, "rank": rank}
    validate(hyperparameters(fast_fisher_graft), settings)
    check(base, experts)
    trim = statistics(base, experts, moments=moments, **settings)["trim"]
    moments = compressed(base, moments, curvature, rank)
    masks: list[dict[str, Tensor]] = [{} for _ in experts]
    for name in float_keys(base):
        v = find(name, base, moments, len(experts), "moments", source=MADE_BY)
        if v is None:
            continue
        for mask, expert, one, rule in zip(masks, experts, v, trim, strict=True):
            delta = at_least_float32(expert[name]) - at_least_float32(base[name])
            mask[name] = mask_of(name, base, delta, one, rule, density, importance)
    return masks


@method(family="merging", paper="ota-ffg", statistics=statistics)
def fast_fisher_graft(
    base: Weights,
    experts: Sequence[Weights],
    *,
    moments: Sequence[Weights],
    density: Annotated[float, Range(0, 1)] = 0.4,
    importance: Annotated[str, Choice("fisher", "magnitude", "curvature")] = "fisher",
    curvature: Annotated[str, Choice("full", "rank1", "svd")] = "full",
    rank: Annotated[int, Range(1, 256, log=True)] = 4,
    scale: Annotated[float, Range(0, 3)] = 1.0,
    trim: Sequence[dict[str, Trim]] | None = None,
) -> dict[str, Tensor]:
    """Graft the edits of one expert that matter onto the base, and leave the rest.

    Args:
        base: state dict θ₀.
        experts: exactly one state dict θ₁; `ota` joins several.
        moments: one mapping of v by tensor name, from `training.fit(moments=...)`.
        density: share of the edits that is kept, over the whole model; 1 gives the expert.
        importance: what ranks the edits: v Δ² ("fisher", the paper), |Δ| ("magnitude") or v ("curvature").
        curvature: v as it is, or as restored from a rank-1 or a truncated-SVD compression.
        rank: directions kept by "svd".
        scale: what multiplies the kept edits.
        trim: from `statistics`, when the model is grafted in parts; None computes it.

    Returns:
        dict: the grafted expert's state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ, of the expert or its moments.
        ValueError: NaN or Inf in a tensor, a negative moment, or not exactly one expert.

    Source:
        Mahdavinia et al., 2025, arXiv 2509.11167, section 5; pmahdavi/ota-merge, merge_methods/ota.py.
    """
    check(base, experts)
    if len(experts) != 1:
        raise ValueError(f"fast_fisher_graft takes exactly one expert, got {len(experts)}; `ota` joins several")
    if trim is None:
        settings = {"density": density, "importance": importance, "curvature": curvature, "rank": rank}
        trim = statistics(base, experts, moments=moments, **settings)["trim"]
    moments = compressed(base, moments, curvature, rank)

    def graft(name: str, theta_0: Tensor, thetas: list[Tensor]) -> Tensor:
        (v,) = find(name, base, moments, 1, "moments", source=MADE_BY) or [None]
        mask = mask_of(name, base, thetas[0] - theta_0, v, trim[0], density, importance)
        if scale == 1:
            return torch.where(mask, thetas[0], theta_0)  # kept entries are the expert's bit for bit
        return theta_0 + scale * mask * (thetas[0] - theta_0)

    return tensor_by_tensor(base, experts, graft)
