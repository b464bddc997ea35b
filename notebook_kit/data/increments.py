"""The digits as a stream: their classes arrive a few at a time, and never come back."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from notebook_kit.data.digits import digits


def class_increments(
    split: str, *, n_tasks: int = 5, seed: int | None = None
) -> list[tuple[Float[Tensor, "n 1 8 8"], Int[Tensor, " n"]]]:
    """Cut the digits into tasks of 10 / n_tasks classes each.

    Args:
        split: "train", "val" or "test" of `digits`, whose own seed stays 0.
        n_tasks: 1, 2, 5 or 10.
        seed: of the order in which classes arrive; None is 0 to 9.

    Returns:
        One pair a task: images as a vision model takes them, pixels in [0, 1], and the digit.

    Raises:
        ValueError: the split is unknown, or n_tasks does not divide 10.
    """
    x, y = digits(split)
    if n_tasks not in (1, 2, 5, 10):
        raise ValueError(f"n_tasks must be 1, 2, 5 or 10, so that tasks have as many classes, got {n_tasks}")
    order = torch.arange(10) if seed is None else torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    members = [torch.isin(y, classes) for classes in order.chunk(n_tasks)]
    return [(x[rows].reshape(-1, 1, 8, 8), y[rows]) for rows in members]
