"""How alike the units of two networks are by their weights: the matrix that weight matching assigns on."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.alignment.permutations import Permutations, apply_part, permute_tensor
from notebook_kit.alignment.spec import Part, PermutationSpec
from notebook_kit.weights import Weights, at_least_float32


def similarity(
    spec: PermutationSpec, perm: str, a: Weights, b: Weights, others: Permutations, *, signs: bool = False
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"] | None]:
    """How alike entry i of a and entry j of b are under one permutation, with all others applied to b.

    Args:
        spec: which axes carry the permutation.
        perm: its name.
        a: state dict.
        b: state dict.
        others: current permutations; an entry for `perm` itself is not used.
        signs: keep what a free sign acts on apart.

    Returns:
        (C, D): C the sum of inner products, in float32 at least; D the part that a free sign multiplies, or None.
    """
    n = spec.sizes[perm]
    first = at_least_float32(a[spec.uses[perm][0][0]])
    plain = first.new_zeros(n, n)
    free = first.new_zeros(n, n) if signs else None
    for name, axis, part in spec.uses[perm]:
        if name in spec.passive:
            continue
        if any(other.slice and spec.inside.get(other.perm, ("",))[0] == perm for _, other in spec.parts(name)):
            continue  # experts as wholes are compared by `match_experts`
        w_a, w_b = at_least_float32(a[name]), at_least_float32(b[name])
        parts = [entry for entry in spec.parts(name) if entry != (axis, part)]
        if part.slice is not None:  # one expert: only its slice is read
            outer, source = spec.inside.get(perm, (None, 0))[0], part.slice[1]
            if outer in others:  # which of b's experts sits there
                source = int(others[outer][source])
            w_a, w_b = w_a.narrow(*part.slice, 1), w_b.narrow(part.slice[0], source, 1)
            parts = [
                (x, _first(other)) for x, other in parts if other.slice in (None, part.slice) and other.perm != outer
            ]
            part = _first(part)
        parts = [(x, other) for x, other in parts if other.perm != perm]
        later = [other for x, other in parts if x == axis and spec.inside.get(other.perm, ("",))[0] == perm]
        w_b = permute_tensor(spec, others, w_b, [entry for entry in parts if entry[1] not in later])
        # A permutation that comes after this one on the same axis is undone in a instead: ⟨w_A, q(p(w_B))⟩.
        for other in later:
            if other.perm in others:
                w_a = w_a.clone()
                apply_part(other, axis, spec.sizes[other.perm], w_a, torch.argsort(others[other.perm]), None)
        for repeat, sign in enumerate(part.signs):
            rows_a, rows_b = (
                part.view(w, axis, n).select(axis, repeat).movedim(axis, 0).reshape(n, -1) for w in (w_a, w_b)
            )
            (free if sign and free is not None else plain).addmm_(rows_a, rows_b.T)
    return plain, free


def _first(part: Part) -> Part:
    return part if part.slice is None else replace(part, slice=(part.slice[0], 0))


def value_of(spec, perm: str, a: Weights, b: Weights, found: Permutations, active: Permutations, signed: set) -> float:
    """What one permutation adds to the objective as it stands."""
    plain, free = similarity(spec, perm, a, b, active, signs=perm in signed)
    places, index = torch.arange(len(plain)), found[perm]
    value = plain[places, index].double().sum()
    if free is not None:
        value += (free[places, index] * found.signs.get(perm, torch.ones(len(index))).to(free)).double().sum()
    return value.item()
