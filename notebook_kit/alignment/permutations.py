"""Permutations of a network's units, and what can be done with them: apply, draw, invert, compose.

Index vectors and signs live on the CPU, wherever the weights do: assignments are solved there.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from notebook_kit.alignment.spec import Part, PermutationSpec
from notebook_kit.weights import Weights


class Permutations(dict[str, Tensor]):
    """Permutation name to index vector Int[n], with what came along: free signs, and how matching went.

    Attributes:
        signs: permutation name to ±1 per entry; a name left out stands for +1.
        objective: the matching objective after each step, first the value at the start.
    """

    def __init__(self, indices=(), *, signs: Mapping[str, Tensor] | None = None, objective: Sequence[float] = ()):
        super().__init__(indices)
        self.signs: dict[str, Tensor] = dict(signs or {})
        self.objective = list(objective)

    def moved(self) -> dict[str, float]:
        """Share of the entries of each permutation that changed place."""
        return {perm: (index.cpu() != torch.arange(len(index))).float().mean().item() for perm, index in self.items()}


def permute(spec: PermutationSpec, permutations: Mapping[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    """Reorder the hidden units of a network; its function stays the same.

    Args:
        spec: which axes move together.
        permutations: name to index vector p (entry i of the result is entry p[i] of the input); `Permutations` may
            carry signs. Names left out stay as they are.
        weights: state dict; not modified.

    Returns:
        A new state dict of the same keys, shapes and dtypes. Tensors that do not move are shared with the input.

    Raises:
        IncompatibleWeights: the weights are not of the network that the spec was made for.
        ValueError: an unknown name, or no permutation of 0..n-1.
    """
    spec.check(weights)
    spec.check_permutations(permutations)
    return {
        name: permute_tensor(spec, permutations, tensor, spec.parts(name)) if name in spec.axes else tensor
        for name, tensor in weights.items()
    }


def permute_tensor(
    spec: PermutationSpec, permutations: Mapping[str, Tensor], tensor: Tensor, parts: Sequence[tuple[int, Part]]
) -> Tensor:
    """Apply parts of a spec to one tensor; a copy, or the tensor itself if nothing moves."""
    signs = getattr(permutations, "signs", {})
    result = None
    for axis, part in parts:
        if part.perm in permutations or part.perm in signs:
            result = tensor.clone() if result is None else result
            apply_part(part, axis, spec.sizes[part.perm], result, permutations.get(part.perm), signs.get(part.perm))
    return tensor if result is None else result


def apply_part(part: Part, axis: int, n: int, tensor: Tensor, index: Tensor | None, sign: Tensor | None) -> None:
    """Reorder one stretch of one axis in place."""
    view = part.view(tensor, axis, n)
    if index is not None:
        view.copy_(view.index_select(axis + 1, index.to(tensor.device)))
    if sign is not None:
        for repeat, signed in enumerate(part.signs):
            if signed:
                shape = [-1 if place == axis else 1 for place in range(view.dim() - 1)]
                view.select(axis, repeat).mul_(sign.to(tensor).reshape(shape))


def random_permutations(spec: PermutationSpec, seed: int = 0, *, signs: bool = False) -> Permutations:
    """Draw a random permutation for every name of a spec.

    Args:
        spec: which permutations there are.
        seed: of the draw.
        signs: draw free signs too, where the spec has them.

    Returns:
        Permutations: name to index vector.
    """
    generator = torch.Generator().manual_seed(seed)
    result = Permutations({perm: torch.randperm(n, generator=generator) for perm, n in spec.sizes.items()})
    if signs:
        for perm in signed_permutations(spec):
            result.signs[perm] = torch.randint(0, 2, (spec.sizes[perm],), generator=generator).float() * 2 - 1
    return result


def signed_permutations(spec: PermutationSpec) -> list[str]:
    """The permutations whose entries have a free sign: hidden units of gated feed-forward layers."""
    return [perm for perm, uses in spec.uses.items() if any(any(part.signs) for _, _, part in uses)]


def invert(spec: PermutationSpec, permutations: Mapping[str, Tensor]) -> Permutations:
    """The permutations that undo these.

    Args:
        spec: tells which permutations act inside an entry of another.
        permutations: name to index vector.

    Returns:
        Permutations q such that `permute(spec, q, permute(spec, p, w))` is w.
    """
    spec.check_permutations(permutations)
    signs = getattr(permutations, "signs", {})
    result = Permutations({perm: torch.argsort(index.cpu()) for perm, index in permutations.items()})
    # What sits in a place of an outer permutation came from another: its order, and its signs, are undone there.
    sources = dict(_inner(spec, result))
    for perm, source in sources.items():
        result[perm] = torch.argsort(_get(spec, permutations, source))
    for perm in spec.sizes:
        sign = signs.get(sources.get(perm, perm))
        if sign is not None:
            result.signs[perm] = sign.cpu()[_get(spec, result, perm)]
    return result


def compose(spec: PermutationSpec, outer: Mapping[str, Tensor], inner: Mapping[str, Tensor]) -> Permutations:
    """Two permutations one after the other as one.

    Args:
        spec: tells which permutations act inside an entry of another.
        outer: applied second.
        inner: applied first.

    Returns:
        Permutations r such that `permute(spec, r, w)` is `permute(spec, outer, permute(spec, inner, w))`.
    """
    spec.check_permutations(outer)
    spec.check_permutations(inner)
    names = [perm for perm in spec.sizes if perm in outer or perm in inner or perm in spec.inside]
    sources = dict(_inner(spec, outer))
    result = Permutations({perm: _get(spec, inner, sources.get(perm, perm))[_get(spec, outer, perm)] for perm in names})
    for perm in spec.sizes:
        first = getattr(inner, "signs", {}).get(sources.get(perm, perm))
        second = getattr(outer, "signs", {}).get(perm)
        if first is not None or second is not None:
            one = torch.ones(spec.sizes[perm])
            moved = (one if first is None else first.cpu())[_get(spec, outer, perm)]
            result.signs[perm] = moved * (one if second is None else second.cpu())
    return result


def _inner(spec: PermutationSpec, permutations: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """For each permutation inside a place of an outer one, the one whose place moves there."""
    at = {where: perm for perm, where in spec.inside.items()}
    for perm, (outer, place) in spec.inside.items():
        yield perm, at[outer, int(_get(spec, permutations, outer)[place])]


def _get(spec: PermutationSpec, permutations: Mapping[str, Tensor], perm: str) -> Tensor:
    return permutations[perm].cpu() if perm in permutations else torch.arange(spec.sizes[perm])
