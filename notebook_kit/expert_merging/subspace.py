"""Merging matrices inside the subspace that they share: one joint SVD, then an average of its V blocks."""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.weights import at_least_float32


@method(family="expert_merging", paper="sub-moe")
@torch.no_grad()
def merge_in_subspace(
    matrices: Sequence[Float[Tensor, "out in"]],
    weights: Sequence[float],
    *,
    rank: Annotated[int | None, Range(1, 1024, log=True)] = None,
    axis: Annotated[str, Choice("output", "input")] = "output",
    whitening: Sequence[Float[Tensor, "in in"]] | None = None,
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
    """Merge matrices through one shared basis: decompose them side by side, average what differs, rebuild.

        [W_1 ... W_n] = U Σ [V_1; ...; V_n]ᵀ      U [out, ρ], V_i [in, ρ], so W_i = U Σ V_iᵀ
        V = Σ_i f_i V_i,   W = U_r Σ_r V_rᵀ

    UΣ is common and the mean is linear, so at full rank W is exactly the weighted average Σ_i f_i W_i; at rank r it
    is U_r U_rᵀ times that average: its projection on the r output directions in which the matrices are largest.
    With whitening S_i the decomposed matrices are W_i S_i, and V_i S_i⁻¹ is averaged: directions count as much as
    the inputs use them. With axis="input" the matrices are stacked, V is shared and the U blocks are averaged.

    Args:
        matrices: W_i, of one shape.
        weights: f_i, which sum to 1.
        rank: r, at most the dimensions of the shared side; None for all of them.
        axis: what the shared basis spans: outputs (as equation 6 reads), or inputs.
        whitening: S_i, invertible, with S_i S_iᵀ the second moment of the inputs of W_i (axis="output" only).

    Returns:
        (L, R), W = L R: U_r and Σ_r V_rᵀ.

    Raises:
        ValueError: shapes, weights or whitening do not fit, or the rank is above what W can have.

    Source: Li et al. (2025), equations 6 to 11, read second-hand; no official code was to be had. That full rank
        equals averaging is not said there.
    """
    w = [at_least_float32(matrix) for matrix in matrices]
    if len({matrix.shape for matrix in w}) != 1 or len(weights) != len(w) or abs(sum(weights) - 1) > 1e-6:
        shapes = [tuple(matrix.shape) for matrix in w]
        raise ValueError(f"matrices must have one shape and weights that sum to 1, got {shapes} and {[*weights]}")
    most = w[0].shape[0 if axis == "output" else 1]
    if rank is not None and rank > most:
        raise ValueError(f"rank must be in [1, {most}] for matrices of {tuple(w[0].shape)}, got {rank}")
    r = rank or most
    if axis == "input":
        if whitening is not None:
            raise ValueError('whitening needs axis="output": it reweighs inputs, which axis="input" shares')
        right, left = merge_in_subspace([matrix.T for matrix in w], weights, rank=r)
        return left.T, right.T
    if whitening is not None and len(whitening) != len(w):
        raise ValueError(f"whitening must have one matrix for each of the {len(w)}, got {len(whitening)}")
    s = [None] * len(w) if whitening is None else [matrix.to(w[0].dtype) for matrix in whitening]
    union = torch.cat([matrix if one is None else matrix @ one for matrix, one in zip(w, s, strict=True)], 1)
    # The basis of a long row of matrices is that of its small Gram matrix; Σ Vᵀ = Uᵀ [W_1 ... W_n].
    u = torch.linalg.eigh((union @ union.T).double()).eigenvectors.flip(1)[:, :r].to(union.dtype)
    blocks = (u.T @ union).split(w[0].shape[1], 1)
    merged = torch.zeros_like(blocks[0])
    for f, block, one in zip(weights, blocks, s, strict=True):
        merged += f * (block if one is None else torch.linalg.solve(one, block, left=False))
    return u, merged


def union_spectrum(matrices: Sequence[Float[Tensor, "out in"]]) -> Float[Tensor, " rho"]:
    """The singular values of [W_1 ... W_n], falling: how many directions a group of matrices shares."""
    return torch.linalg.svdvals(torch.cat([at_least_float32(matrix) for matrix in matrices], 1))


def whitening_of(
    x: Float[Tensor, "tokens in"], kind: str, *, ridge: float = 1e-3, scale: float = 0.0
) -> Float[Tensor, "in in"]:
    """S with S Sᵀ = XᵀX + λ I: the Cholesky factor, or the diagonal alone.

    Args:
        x: inputs of one matrix.
        kind: "full" or "diagonal".
        ridge: λ as a share of the mean diagonal.
        scale: added to the mean diagonal before that, for an expert without inputs.
    """
    x = at_least_float32(x)
    moment = x.T @ x
    if kind == "diagonal":
        moment = torch.diag(moment.diagonal())
    level = ridge * max(moment.diagonal().mean().item(), scale, 1e-12)
    return torch.linalg.cholesky(moment + level * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))
