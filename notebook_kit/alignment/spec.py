"""Permutation specs: which axes of which tensors must be reordered together so that a network computes the same.

A permutation is an index vector p of length n. Applying it takes entry p[i] to place i, on every axis that carries
it; the rows that make a hidden unit and the columns that read it move together, so the function does not change.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from notebook_kit.weights import IncompatibleWeights, Weights


@dataclass(frozen=True)
class Part:
    """What one permutation of n entries does to one axis.

    The permuted stretch begins at `start` and is read as [repeats, n, block]: entry i is a block of neighbouring
    rows, and the same order is used in each repeat. An axis may carry several parts; they are applied in order.

    Args:
        perm: name of the permutation.
        block: rows that move as one, such as the head_dim rows of an attention head.
        start: first row of the stretch.
        signs: one flag a repeat: does a unit's free sign act here? (False, True) is a fused gate and up.
        partial: rows after the stretch stay where they are; otherwise there may be none.
        slice: (axis, index) when only one slice of the tensor is concerned, such as one expert of a fused tensor.
    """

    perm: str
    block: int = 1
    start: int = 0
    signs: tuple[bool, ...] = (False,)
    partial: bool = False
    slice: tuple[int, int] | None = None

    def view(self, tensor: Shaped[Tensor, "..."], axis: int, n: int) -> Shaped[Tensor, "..."]:
        """A view of the stretch with `axis` cut into [repeats, n, block]; writing to it writes to the tensor."""
        if self.slice is not None:
            # One slice is cut out as an axis of length 1, so that `axis` keeps its number.
            tensor = tensor.narrow(*self.slice, 1)
        repeats = len(self.signs)
        return tensor.narrow(axis, self.start, repeats * n * self.block).unflatten(axis, (repeats, n, self.block))


Axis = None | str | Part | tuple[Part, ...]


class PermutationSpec:
    """The permutations that leave a network's function alone, as a table: parameter to what moves on each axis.

    Args:
        axes: parameter name to one entry per axis: None (never moves), a permutation's name, a `Part`, or a tuple
            of parts applied in order. Parameters that are not named never move.
        sizes: permutation name to its number of entries n.
        inside: permutation name to (outer permutation, place) for one that acts within one entry of another, as
            query heads do within their key-value group, and units within an expert; parts of the outer one come first
            on an axis.
        passive: tensors that move along but say nothing about which units are alike, such as the running statistics
            of batch norm: matching by weights does not look at them.
        description: what it was made for, shown by repr.

    Raises:
        ValueError: a permutation without size, or on two axes of one tensor.
    """

    def __init__(
        self,
        axes: Mapping[str, Sequence[Axis]],
        sizes: Mapping[str, int],
        *,
        inside: Mapping[str, tuple[str, int]] | None = None,
        passive: Iterable[str] = (),
        description: str = "",
    ):
        self.sizes, self.inside, self.description = dict(sizes), dict(inside or {}), description
        self.passive = frozenset(passive)
        self.axes: dict[str, tuple[tuple[Part, ...], ...]] = {
            name: tuple(_parts(entry) for entry in entries) for name, entries in axes.items()
        }
        self.uses: dict[str, list[tuple[str, int, Part]]] = {perm: [] for perm in self.sizes}
        for name, entries in self.axes.items():
            for axis, parts in enumerate(entries):
                for part in parts:
                    if part.perm not in self.sizes:
                        raise ValueError(f"permutation {part.perm!r} on axis {axis} of {name!r} has no size in `sizes`")
                    self.uses[part.perm].append((name, axis, part))
            # Two axes under one permutation would make matching a quadratic assignment.
            seen = [{part.perm for part in parts} for parts in entries]
            twice = set.union(*seen) if sum(map(len, seen)) > len(set.union(*seen)) else set()
            for perm in sorted(twice):
                if sum(perm in names for names in seen) > 1:
                    raise ValueError(f"permutation {perm!r} stands on two axes of {name!r}")

    def __repr__(self):
        moved = sum(any(entries) for entries in self.axes.values())
        return f"PermutationSpec({self.description or 'custom'}: {len(self.sizes)} permutations on {moved} tensors)"

    def parts(self, name: str) -> list[tuple[int, Part]]:
        """Every (axis, part) of one tensor, in the order in which they are applied."""
        return [(axis, part) for axis, parts in enumerate(self.axes[name]) for part in parts]

    def check(self, weights: Weights, owner: str = "weights") -> None:
        """Refuse weights that the spec was not made for.

        Raises:
            IncompatibleWeights: a tensor is missing, or an axis is not as long as its permutations need.
        """
        for name, entries in self.axes.items():
            if name not in weights:
                raise IncompatibleWeights(f"{owner} has no tensor {name!r}, which {self!r} permutes")
            shape = tuple(weights[name].shape)
            if len(shape) != len(entries):
                raise IncompatibleWeights(
                    f"{name!r} of {owner} has shape {shape}; {self!r} expects {len(entries)} axes"
                )
            for axis, parts in enumerate(entries):
                for part in parts:
                    if part.slice is not None and shape[part.slice[0]] <= part.slice[1]:
                        raise IncompatibleWeights(f"{name!r} of {owner} has shape {shape}; it lacks slice {part.slice}")
                    end = part.start + len(part.signs) * self.sizes[part.perm] * part.block
                    whole = not part.partial and part.perm not in self.inside
                    if shape[axis] < end or (whole and shape[axis] != end):
                        raise IncompatibleWeights(
                            f"{name!r} of {owner} has shape {shape}; permutation {part.perm!r} of "
                            f"{self.sizes[part.perm]} entries needs {end} on axis {axis}: is the spec of another model?"
                        )

    def check_permutations(self, permutations: Mapping[str, Tensor]) -> None:
        """Refuse what are not permutations of this spec; a permutation left out stands for the identity.

        Raises:
            ValueError: an unknown name, or an entry that is not a reordering of 0..n-1.
        """
        for perm, index in permutations.items():
            if perm not in self.sizes:
                raise ValueError(
                    f"no permutation is called {perm!r}; the spec has {', '.join(list(self.sizes)[:8])} ..."
                )
            whole = not (index.is_floating_point() or index.dtype == torch.bool)
            if not whole or not torch.equal(index.sort().values.cpu(), torch.arange(self.sizes[perm])):
                raise ValueError(f"{perm!r} must reorder 0..{self.sizes[perm] - 1}, got {index.tolist()[:12]}")


def _parts(entry: Axis) -> tuple[Part, ...]:
    if entry is None:
        return ()
    if isinstance(entry, str):
        return (Part(entry),)
    return (entry,) if isinstance(entry, Part) else tuple(entry)
