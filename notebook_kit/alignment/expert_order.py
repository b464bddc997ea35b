"""Experts have no order either: which expert of b stands for which of a, their hidden units matched along the way."""

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from notebook_kit.alignment.permutations import Permutations
from notebook_kit.alignment.spec import PermutationSpec
from notebook_kit.alignment.weight_similarity import similarity
from notebook_kit.weights import Weights


def experts_inside(spec: PermutationSpec) -> dict[str, list[str]]:
    """Permutations of whole experts, to the permutations of units within each of their places."""
    nested: dict[str, list[str]] = {}
    for perm, (outer, _) in spec.inside.items():
        if any(part.slice for _, _, part in spec.uses[perm]):
            nested.setdefault(outer, []).append(perm)
    return nested


def match_experts(
    spec: PermutationSpec, units: list[str], a: Weights, b: Weights, others: Permutations, signed: set[str]
) -> tuple[Float[Tensor, "experts experts"], list[list[tuple[Int[Tensor, " f"], Float[Tensor, " f"] | None]]]]:
    """How alike expert e of a and expert j of b are once j's units stand in e's order, for every pair.

    Experts whose units are shuffled look like strangers until they are matched, so each pair is: E² assignments.

    Args:
        spec: of the network.
        units: the permutation of units within each place.
        a: state dict.
        b: state dict.
        others: current permutations; those of `units` are not used.
        signed: permutations whose free sign counts.

    Returns:
        (value of the best matching of each pair [E, E], for each pair its (index, sign)).
    """
    outer = spec.inside[units[0]][0]
    n = len(units)
    value = torch.zeros(n, n, dtype=torch.float64)
    best: list[list] = [[None] * n for _ in range(n)]
    for e, perm in enumerate(units):
        for j in range(n):
            trial = Permutations(others, signs=others.signs)
            trial[outer] = torch.full((n,), j)  # only place e is looked up
            plain, free = similarity(spec, perm, a, b, trial, signs=perm in signed)
            total = plain if free is None else plain + free.abs()
            rows, index = map(torch.from_numpy, linear_sum_assignment(total.cpu().numpy(), maximize=True))
            value[e, j], sign = plain[rows, index].double().sum().item(), None
            if free is not None:  # added up apart, as the objective does
                value[e, j] += free[rows, index].abs().double().sum().item()
                sign = torch.where(free[rows, index] < 0, -1.0, 1.0).cpu()
            best[e][j] = (index, sign)
    return value, best
