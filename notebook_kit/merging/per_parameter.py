"""Numbers that come with each parameter of each expert (Fishers, second moments): held against the models."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from notebook_kit.weights import IncompatibleWeights, Weights, at_least_float32, float_keys


def find(
    name: str, base: Weights, tables: Sequence[Weights], n_experts: int, kind: str, *, source: str
) -> list[Tensor] | None:
    """Return one tensor of each table for `name`, in float32 at least; None if no table has it.

    Args:
        name: of the parameter in `base`.
        base: state dict; where it holds a tied weight under two names, either finds it.
        tables: one mapping an expert.
        n_experts: how many there should be.
        kind: what they are called in errors, such as "fishers".
        source: the call that makes them.

    Raises:
        TypeError, ValueError: not one mapping an expert, some have the tensor and some have not, another shape, or a
            negative or non-finite entry; the text names it.
    """
    if isinstance(tables, Mapping) or not all(isinstance(table, Mapping) for table in tables):
        raise TypeError(f"{kind} must be a sequence of mappings, one an expert, each made by {source}")
    if len(tables) != n_experts:
        raise ValueError(f"{kind} must have one mapping per expert, {n_experts}, got {len(tables)}: {source}")
    has = [alias(name, base, table) for table in tables]
    if not any(has):
        return None
    if not all(has):
        raise ValueError(f"{name!r} is in {kind}[{_index(has, True)}] but not in {kind}[{_index(has, False)}]")
    found = []
    for i, (table, key) in enumerate(zip(tables, has, strict=True)):
        tensor = at_least_float32(table[key])
        if tensor.shape != base[name].shape:
            shapes = f"{list(base[name].shape)} in base, {list(tensor.shape)} in {kind}[{i}]"
            raise IncompatibleWeights(f"{name!r}: shape {shapes}; make it anew with {source}")
        if tensor.numel() and not (tensor.min() >= 0 and torch.isfinite(tensor).all()):
            raise ValueError(f"{name!r} of {kind}[{i}] must be finite and at least 0: squares of gradients are")
        found.append(tensor)
    return found


def check_overlap(base: Weights, tables: Sequence[Weights], kind: str, *, source: str) -> None:
    """Refuse tables that have none of the model's names; a call for a whole model asks this, a streamed one cannot."""
    names = float_keys(base)
    for i, table in enumerate(tables if not isinstance(tables, Mapping) else ()):
        if names and not any(alias(name, base, table) for name in names):
            has = ", ".join(map(repr, list(table)[:3])) or "nothing"
            raise ValueError(f"{kind}[{i}] has none of the model's tensors, such as {names[0]!r}, but {has}: {source}")


def alias(name: str, base: Weights, table: Weights) -> str | None:
    """Under which name a table has a parameter: its own, or that of a weight it is tied to; None: not at all."""
    if name in table:
        return name
    if not isinstance(base, dict) or not base[name].numel():
        return None
    here = place(base[name])
    return next((other for other in base if other in table and place(base[other]) == here), None)


def place(tensor: Tensor) -> tuple:
    """Where a tensor lies in memory: tied weights lie at the same place."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _index(has: list, wanted: bool) -> int:
    return next(i for i, key in enumerate(has) if bool(key) == wanted)


class Pieces:
    """Follow tensors that are merged in pieces, one after another: prepare once a tensor, and know where a piece lies.

    Args:
        prepare: tensor name -> whatever its pieces need.
    """

    def __init__(self, prepare: Callable[[str], Any]):
        self.prepare = prepare
        self.name: str | None = None
        self.start, self.ready = 0, None

    def next(self, name: str, length: int) -> tuple[Any, slice]:
        """What was prepared for the tensor, and the place of its next piece in it."""
        if name != self.name:
            self.ready = None  # the last tensor's goes before this one's comes
            self.name, self.start, self.ready = name, 0, self.prepare(name)
        where = slice(self.start, self.start + length)
        self.start = where.stop
        return self.ready, where
