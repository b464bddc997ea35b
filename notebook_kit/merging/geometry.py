"""Lengths of models and angles between them, in one pass over memory."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.merging import selection
from notebook_kit.weights import Weights, at_least_float32


def pieces(name: str, experts: Sequence[Weights]) -> Iterator[Float[Tensor, "experts n"]]:
    """Walk one tensor of all experts in pieces, side by side in float32 at least; the buffer is reused."""
    thetas = [expert[name].reshape(-1) for expert in experts]
    n = len(thetas[0])
    buffer = at_least_float32(thetas[0][:0]).new_empty(len(experts), min(selection.CHUNK, n))
    for start in range(0, n, selection.CHUNK):
        stop = min(start + selection.CHUNK, n)
        side_by_side = buffer[:, : stop - start]
        for row, theta in zip(side_by_side, thetas, strict=True):
            row.copy_(theta[start:stop])
        yield side_by_side


def inner_products(walk: Iterator[Float[Tensor, "experts n"]], n_experts: int) -> Float[Tensor, "experts experts"]:
    """Sum ⟨a_i, a_j⟩ over the pieces of a walk, in float64, on the CPU: there are only K² of them."""
    total = torch.zeros(n_experts, n_experts, dtype=torch.float64)
    for a in walk:
        total += (a @ a.T).cpu()
    return total


def mean_cosine(gram: Float[Tensor, "*rows experts experts"], of: str = "cosines") -> Float[Tensor, "*rows"]:
    """The mean over all pairs of cos θ_ij, or the cosine of the mean angle; a zero vector is at right angles to all.

    Args:
        gram: inner products of two vectors or more.
        of: "cosines" or "angles".
    """
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    products = lengths[..., :, None] * lengths[..., None, :]
    cosines = torch.where(products > 0, gram / products, 0.0).clamp(-1, 1)
    i, j = torch.triu_indices(gram.shape[-1], gram.shape[-1], offset=1)
    pairs = cosines[..., i, j]
    return pairs.mean(dim=-1) if of == "cosines" else torch.cos(torch.acos(pairs).mean(dim=-1))
