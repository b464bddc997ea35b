"""Second moments as curvature: Adam's v ≈ E[g²] ≈ diagonal Fisher, and ways to store it in a fraction of the space.

    rank1   v ≈ R C / Σv      R: row sums [m, 1], C: column sums [1, n]     m + n numbers (Adafactor)
    svd     v ≈ relu(U_r S_r V_rᵀ)                                           r (m + n) numbers

v: [m, n], second moment of one weight matrix, v ≥ 0. Rank 1 keeps the row and column sums, is exact for outer products
and never negative; the SVD is the nearest of its rank, and what it makes negative is cut off. Vectors stay whole.
Shazeer and Stern, 2018 (Adafactor); Mahdavinia et al., 2025, section 4.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from notebook_kit.weights import at_least_float32

EMBEDDING = re.compile(r"embed|lm_head|\bw[tp]e\b")


def compress_moment(v: Tensor, *, curvature: str = "rank1", rank: int = 4, name: str = "") -> tuple[Tensor, ...]:
    """Factor a second moment into what is stored.

    Args:
        v: second moment, any shape; only matrices are factored.
        curvature: "full", "rank1" or "svd".
        rank: directions kept by "svd".
        name: of the tensor; "svd" leaves embeddings whole, as the official code does.

    Returns:
        tuple: (v,), or left [m, r] and right [r, n]. `restore_moment` puts them together; the storage is the sum of
        their `numel`.
    """
    v = at_least_float32(v)
    if v.ndim != 2 or curvature == "full" or v.numel() == 0:
        return (v,)
    if curvature == "rank1":
        total = v.sum()
        columns = v.sum(dim=0, keepdim=True)
        return v.sum(dim=1, keepdim=True), columns / total if total > 0 else columns
    if EMBEDDING.search(name) or rank >= min(v.shape):
        return (v,)
    u, s, vh = torch.linalg.svd(v, full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def restore_moment(factors: tuple[Tensor, ...]) -> Tensor:
    """Put a compressed second moment together; never negative."""
    return factors[0] if len(factors) == 1 else (factors[0] @ factors[1]).relu_()


def stored_numbers(moments: Mapping[str, Tensor], *, curvature: str = "full", rank: int = 4) -> int:
    """Count the numbers that a model's second moments take when they are compressed.

    Args:
        moments: tensor name -> v.
        curvature: "full", "rank1" or "svd".
        rank: of "svd".
    """
    kept = (compress_moment(v, curvature=curvature, rank=rank, name=name) for name, v in moments.items())
    return sum(factor.numel() for factors in kept for factor in factors)


def squared_gradients(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    """Measure second moments after the fact, for a model whose optimiser is gone: the mean squared batch gradient.

    Args:
        model: any module; run in evaluation mode and left as it was.
        batches: minibatches of the size used in training. The mean gradient over more examples is smaller, so that
            experts must be measured with equal sizes.
        loss: (model, batch) -> scalar, as in training.

    Returns:
        dict: E[g²] by parameter name (a tied weight once), in the parameter's shape.

    Raises:
        ValueError: no batch, or nothing requires a gradient.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient (squared_gradients)")
    total = {name: torch.zeros_like(at_least_float32(p.detach())) for name, p in parameters.items()}
    modes, n = {module: module.training for module in model.modules()}, 0
    model.eval()
    try:
        for batch in batches:
            gradients = torch.autograd.grad(loss(model, batch), list(parameters.values()), allow_unused=True)
            for square, g in zip(total.values(), gradients, strict=True):
                if g is not None:
                    square += at_least_float32(g).square()
            n += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
    if n == 0:
        raise ValueError("batches hold no batch (squared_gradients)")
    return {name: square / n for name, square in total.items()}
