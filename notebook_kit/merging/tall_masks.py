"""TALL-masks: all experts in one vector; a mask of one bit a weight takes each of them out again.

    m_t = 1{ |τ_t| > threshold_t · |τ_MTL − τ_t| }          θ̂_t = θ₀ + m_t ⊙ τ_MTL

τ_t = θ_t − θ₀; τ_MTL: the multi-task vector (`multitask`). At threshold 1, m_t is of all masks the one that brings
θ̂_t nearest to θ_t (L1); smaller thresholds keep more, and are often better. So K experts cost two models and K bits a
weight, instead of K + 1 models. Wang et al., 2024, sections 4.1 and 4.2, equations 4 and 5; nik-dim/tall_masks, where
the threshold is called `tall_mask_lambda`. It is no merge: there is still one network a task. `consensus` is the merge.
"""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.masked_experts import MaskedExperts, pack
from notebook_kit.merging.multitask import claimed, per_expert, statistics, vectors
from notebook_kit.merging.scored import scored
from notebook_kit.merging.selection import Trim, trims
from notebook_kit.merging.ties import keep_largest
from notebook_kit.weights import Weights, check, float_keys

GRID = (0.2, 0.3, 0.4, 0.5, 0.6)


@method(family="merging", paper="tall-masks")
def tall_masks(
    base: Weights,
    experts: Sequence[Weights],
    *,
    threshold: Annotated[float, Range(0, 2)] = 0.4,
    base_merge: Annotated[str, Choice("sum", "ties")] = "sum",
    density: Annotated[float, Range(0, 1)] = 0.2,
    thresholds: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
) -> MaskedExperts:
    """Compress experts into one multi-task vector and a mask of bits for each.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_t, fine-tuned from it.
        threshold: how much a task must outweigh the others to claim a weight; larger claims fewer, 0 claims each
            weight that the task changed.
        base_merge: τ_MTL as the sum of the task vectors, or as TIES' disjoint sum.
        density: share of each task vector that TIES keeps.
        thresholds: one an expert, from `choose_thresholds`; None takes `threshold` for all.
        names: of the experts; None: "0", "1", ...

    Returns:
        MaskedExperts: `.expert(i)` is expert i again, `.claims()` counts the tasks that claim a weight, `.sizes()`
        says what it costs, `.save(path)` and `MaskedExperts.load(path)` keep it.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor; thresholds or names that do not fit the experts.

    Source:
        Wang et al., 2024, arXiv 2405.07813, section 4; nik-dim/tall_masks.
    """
    levels = per_expert(threshold, thresholds, len(experts))
    return _masked(base, experts, lambda tau, multitask: claimed(tau, multitask, levels), base_merge, density, names)


def magnitude_masks(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: Annotated[float, Range(0, 1)] = 0.1,
    names: Sequence[str] | None = None,
) -> MaskedExperts:
    """Mask by magnitude alone, the baseline: m_t marks the largest |τ_t| of the whole model, whatever the others did.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_t.
        density: share of the weights in each mask.
        names: of the experts.

    Returns:
        MaskedExperts: as `tall_masks`, with τ_MTL the sum.

    Raises:
        IncompatibleWeights, ValueError: as `tall_masks`.
    """
    check(base, experts)
    trim = trims(base, experts, density=density, scope="model")
    return _masked(base, experts, trim, "sum", density, names)


def choose_thresholds(
    base: Weights,
    experts: Sequence[Weights],
    score: Callable[[dict[str, Tensor], int], float],
    *,
    grid: Sequence[float] = GRID,
    base_merge: str = "sum",
    density: float = 0.2,
) -> tuple[list[float], list[list[float]]]:
    """Choose each expert's threshold by how well its reconstruction does.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_t.
        score: `score(weights, i)` of expert i's reconstruction on its own task, higher is better; use validation data.
        grid: thresholds to try; of equally good ones the first is taken.
        base_merge: as in `tall_masks`.
        density: as in `tall_masks`.

    Returns:
        One threshold an expert, and the scores [grid, experts].

    Raises:
        ValueError: an empty grid, or a score that is NaN.
        IncompatibleWeights: as `tall_masks`.
    """
    if not grid:
        raise ValueError("grid must hold at least one threshold, got none (choose_thresholds)")
    table = []
    for threshold in grid:
        masked = tall_masks(base, experts, threshold=threshold, base_merge=base_merge, density=density)
        table.append([scored(score, masked.expert(i), i) for i in range(len(experts))])
    best = [max(range(len(grid)), key=lambda row, i=i: table[row][i]) for i in range(len(experts))]
    return [grid[row] for row in best], table


def _masked(base, experts, rule: Callable | list[dict[str, Trim]], base_merge, density, names) -> MaskedExperts:
    check(base, experts, names=names)
    if names is not None and len(set(names)) < len(names):
        raise ValueError(f"names must differ, got {', '.join(names)}")
    seen = statistics(base, experts, base_merge=base_merge, density=density)
    merged, bits = {}, [{} for _ in experts]
    for name in float_keys(base):
        tensor = base[name]
        out = tensor.new_empty(tensor.numel())
        masks = tensor.new_empty(len(experts), tensor.numel(), dtype=torch.bool)
        drop = None if callable(rule) else [of_expert[name].drop.get(name, 0) for of_expert in rule]
        for where, _, tau, multitask in vectors(name, base, experts, **seen):
            out[where] = multitask
            if callable(rule):
                masks[:, where] = rule(tau, multitask)
            else:
                masks[:, where] = keep_largest(tau, [of_expert[name] for of_expert in rule], drop) != 0
        merged[name] = out.reshape(tensor.shape)
        for of_expert, mask in zip(bits, masks, strict=True):
            of_expert[name] = pack(mask)
    kept = {name: tensor.clone() for name, tensor in base.items()}
    return MaskedExperts(kept, merged, bits, list(names or map(str, range(len(experts)))))
