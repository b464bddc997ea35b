"""Weight matching: bring one network's hidden units into the order of another's, looking at weights alone."""

from typing import Annotated

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from notebook_kit.alignment.expert_order import experts_inside, match_experts
from notebook_kit.alignment.permutations import Permutations, permute, signed_permutations
from notebook_kit.alignment.spec import PermutationSpec
from notebook_kit.alignment.weight_similarity import similarity, value_of
from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.weights import Weights, at_least_float32, check

TOLERANCE = 1e-12


@method(family="alignment", paper="git-re-basin")
@torch.no_grad()
def weight_matching(
    spec: PermutationSpec,
    a: Weights,
    b: Weights,
    *,
    max_iter: Annotated[int, Range(1, 100)] = 100,
    signs: bool = True,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
    start: Permutations | None = None,
) -> Permutations:
    """Find the permutations of b's hidden units that make its weights most alike to a's.

    Maximise Σ_w ⟨w_A, π(w_B)⟩ over all tensors, one permutation at a time. With every other permutation held fixed,
    the objective is linear in p: it is Σ_i C[i, p[i]] with

        C = Σ_(w, axis) unfold_axis(w_A) · unfold_axis(π_others(w_B))ᵀ        [n, n]

    over the axes that carry p (biases included), so the best p is a linear assignment. Units of gated layers have a
    free sign, (up_j, down_j) → (−up_j, −down_j): there C = gate_A gate_Bᵀ + |up_A up_Bᵀ + down_Aᵀ down_B|, and the
    sign is read off at the chosen entry.

    Args:
        spec: what may move together, from `permutation_spec`.
        a: state dict whose order is kept.
        b: state dict to be reordered, of the same keys and shapes.
        max_iter: sweeps over all permutations. One hidden layer is solved exactly by the first.
        signs: use the free sign of gated units, where the spec has them.
        seed: of the visiting order.
        start: permutations to begin with; the identity when None.

    Returns:
        Permutations: name to index vector, so that `permute(spec, result, b)` lies near a. `.objective` is the
        objective at the start and after each improvement; it never falls. `.signs` holds the signs.

    Raises:
        IncompatibleWeights: keys or shapes of a and b differ, or are not those of the spec.
        ValueError: NaN or Inf in a tensor.

    Limits: coordinate ascent finds a local optimum; it depends on the visiting order where several hidden layers
        follow each other.

    Source: Ainsworth, Hayase and Srinivasa (2022), algorithm 1; samuela/git-re-basin, `src/weight_matching.py`,
        whose sweeps recompute C for every permutation. Here one is visited again only if a permutation that shares
        a tensor with it has changed. The sign rule is this kit's.
    """
    check(a, [b], names=["b"])
    spec.check(a, "a")
    generator = torch.Generator().manual_seed(seed)
    signed = set(signed_permutations(spec)) if signs else set()
    found = Permutations({perm: torch.arange(n) for perm, n in spec.sizes.items()})
    active = Permutations()  # those that are not the identity: applying them costs a copy
    if start is not None:
        spec.check_permutations(start)
        for one in (found, active):
            one.update(start)
            one.signs.update({perm: sign for perm, sign in start.signs.items() if perm in signed})
    moved = b if start is None else permute(spec, active, b)
    found.objective.append(sum(_dot(a[name], moved[name]) for name in spec.axes if name not in spec.passive))
    neighbours, nested = _neighbours(spec), experts_inside(spec)
    stale, names = set(spec.sizes), list(spec.sizes)
    for _ in range(max_iter):
        order = [names[i] for i in torch.randperm(len(names), generator=generator)]
        for perm in order:
            if perm not in stale:
                continue
            stale.discard(perm)
            plain, free = similarity(spec, perm, a, b, active, signs=perm in signed)
            places, old, pairs, negative = torch.arange(len(plain)), found[perm], [], None
            old_value, total = plain[places, old], plain
            if free is not None:
                old_value = old_value + free[places, old] * found.signs.get(perm, torch.ones(len(old))).to(free)
                negative = free < 0
                total = free.abs_().add_(plain)  # in place: n² entries are many
            del plain, free
            if perm in nested:
                value, pairs = match_experts(spec, nested[perm], a, b, active, signed)
                total = total + value.to(total.device)
            # Negated here: with maximize=True scipy would hold one more copy, in float64.
            index = torch.from_numpy(linear_sum_assignment(total.neg_().cpu().numpy())[1])
            new_value, old_value = -total[places, index].double().sum(), old_value.double().sum()
            if pairs:
                old_value += sum(value_of(spec, unit, a, b, found, active, signed) for unit in nested[perm])
            gain = (new_value - old_value).item()
            if gain <= TOLERANCE * max(1.0, abs(old_value.item())):
                continue
            found[perm] = active[perm] = index
            for e, unit in enumerate(nested.get(perm, ())):
                order, sign = pairs[e][int(index[e])]
                found[unit] = active[unit] = order
                if sign is not None:
                    found.signs[unit] = active.signs[unit] = sign
            if negative is not None:
                sign = torch.where(negative[places, index], -1.0, 1.0).cpu()
                found.signs[perm] = active.signs[perm] = sign
            found.objective.append(found.objective[-1] + gain)
            stale |= neighbours[perm]
        if not stale:
            break
    return found


def _neighbours(spec: PermutationSpec) -> dict[str, set[str]]:
    """Which similarities change when a permutation does: those that share an entry of a tensor with it."""
    table = {perm: set() for perm in spec.sizes}
    for name in spec.axes:  # a passive tensor has one axis, so it relates no two permutations
        parts = [part for _, part in spec.parts(name)]
        for one in parts:
            table[one.perm] |= {
                two.perm
                for two in parts
                if two.perm != one.perm and (not one.slice or not two.slice or one.slice == two.slice)
            }
    return table


def _dot(w_a: Tensor, w_b: Tensor) -> float:
    return torch.dot(at_least_float32(w_a).reshape(-1), at_least_float32(w_b).reshape(-1)).item()
