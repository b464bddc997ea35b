"""Adapters of equal size: the rank that a budget of parameters pays for, so that comparisons are fair."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from notebook_kit.adapters._adapter import Adapter
from notebook_kit.adapters._attach import Target, build_all
from notebook_kit.adapters._place import own_parameters


def rank_for(
    model: nn.Module, adapter: type[Adapter], *, targets: Target | Sequence[Target], parameters: int, **values: Any
) -> int:
    """Find the largest rank with which an adapter at these places has no more parameters than a budget.

    Args:
        model: not changed.
        adapter: the adapter's class, such as `LoRA`; its size must be proportional to its rank.
        targets: as in `attach`.
        parameters: the budget, over all places together.
        values: other hyperparameters of the adapter.

    Returns:
        The rank, to be given to `attach`. The rest of the budget is smaller than one more rank.

    Raises:
        ValueError: the budget does not even pay for rank 1 (the text says what that costs), or it pays for a rank that
            the smallest host cannot have; or as `attach`.
        TypeError: as `attach`.
    """
    each = _size(model, adapter, targets, values | {"rank": 1})
    rank = int(parameters) // each
    if rank < 1:
        raise ValueError(f"parameters must be at least {each}, the size of {adapter.__name__} with rank 1 here, "
                         f"got {parameters}")  # fmt: skip
    size = _size(model, adapter, targets, values | {"rank": rank})
    if size != rank * each:
        raise ValueError(f"{adapter.__name__} has {size} parameters with rank {rank} and {each} with rank 1: not "
                         "proportional, so that no rank can be computed")  # fmt: skip
    return rank


def _size(model: nn.Module, adapter: type[Adapter], targets: Target | Sequence[Target], values: dict[str, Any]) -> int:
    built = build_all(model, adapter, targets=targets, seed=0, values=values)
    return sum(p.numel() for each in built.values() for p in own_parameters(each).values())
