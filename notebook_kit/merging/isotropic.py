"""Isotropic merging: a sum of task vectors is loud in a few directions; make it equally loud in all of them.

    Iso-C     Σ_i τ_i = U Σ Vᵀ,   τ* = σ̄ U Vᵀ,   σ̄ = the mean of all min(m, n) singular values

    Iso-CTS   keep the s leading directions of the sum, U_c and V_c: what tasks have in common;
              each task adds the d leading directions of (I − U_c U_cᵀ) τ_i, with s + K d = min(m, n);
              Û = [task parts, U_c], V̂ likewise;   τ* = σ̄ polar(Û) polar(V̂)ᵀ,   σ̄ the mean of all kept values

    θ = θ₀ + λ τ*

τ_i = θ_i − θ₀ [m, n]; K: experts; λ: `scale`, the paper's α, to be tuned (1 is the official default); s: `common` ·
min(m, n), then fitted so that the rest divides by K; polar: the nearest orthonormal matrix. Tensors that are no
matrices get the mean of the τ_i. Marczak et al., 2025.

Where the sum lacks directions (low-rank task vectors), the official code fills U Vᵀ up with arbitrary ones; here they
stay out, and σ̄ is still the mean over all min(m, n).
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.contract import tensor_by_tensor
from notebook_kit.merging.matrices import each_matrix, matrix_names, mean_of, polar, thin_svd
from notebook_kit.weights import Weights

Matrix = Float[Tensor, "m n"]


def split_of(r: int, n_experts: int, common: float) -> tuple[int, int]:
    """s directions in common, d more for each expert: s + K d = r, s near common · r.

    Args:
        r: min(m, n).
        n_experts: K.
        common: share of the directions that the sum keeps.
    """
    d = min(round((r - int(r * common)) / n_experts), r // n_experts)
    return r - n_experts * d, d


def iso_c(total: Matrix) -> Matrix:
    """τ* of one matrix: the sum's directions, all with its mean singular value.

    Args:
        total: Σ_i τ_i.
    """
    directions, sigma = polar(total)
    return directions.mul_(sigma.mean())


def iso_cts(taus: Sequence[Matrix], n_common: int, d: int) -> Matrix:
    """τ* of one matrix: the sum's leading directions, and d of each task outside them, all equally long.

    Args:
        taus: τ_i.
        n_common: s, how many directions the sum keeps.
        d: how many each task adds.
    """
    u, s, vh = thin_svd(sum(taus))
    u_c, s_c, v_c, rest = u[:, :n_common], s[:n_common], vh[:n_common], u[:, n_common:]
    # What is orthogonal to U_c: for a wide matrix the rest of U spans it, and the task's part is a small matrix there.
    wide = u.shape[0] == u.shape[1]
    parts = []
    for tau in taus:
        u_i, s_i, v_i = thin_svd(rest.T @ tau if wide else tau - u_c @ (u_c.T @ tau), d)
        parts.append((rest @ u_i if wide else u_i, s_i, v_i))
    u_t, s_t, v_t = (list(group) for group in zip(*parts, strict=True))
    v, _ = polar(torch.cat([*v_t, v_c]))
    # The task parts are orthogonal to U_c already: only among themselves do they have to be turned.
    tasks, _ = polar(torch.cat(u_t, dim=1))
    n_tasks = tasks.shape[1]
    return torch.cat([*s_t, s_c]).mean() * (tasks @ v[:n_tasks] + u_c @ v[n_tasks:])


def sum_of(theta_0: Matrix, thetas: Sequence[Matrix]) -> Matrix:
    """Σ_i (θ_i − θ₀), with one buffer."""
    total = thetas[0] - theta_0
    tau = torch.empty_like(total)
    for theta in thetas[1:]:
        total += torch.sub(theta, theta_0, out=tau)
    return total


@method(family="merging", paper="isotropic-merging")
def isotropic(
    base: Weights,
    experts: Sequence[Weights],
    *,
    scale: Annotated[float, Range(0, 5)] = 1.0,
    common: Annotated[float, Range(0, 1)] = 1.0,
    matrices: Annotated[str, Choice("all", "linear")] = "all",
) -> dict[str, Tensor]:
    """Merge with a flat spectrum: all directions of the merged task vector equally long.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i, fine-tuned from it.
        scale: λ, what multiplies the merged task vector.
        common: share of the directions that the sum keeps; 1 is Iso-C, less leaves room for single tasks (Iso-CTS,
            whose authors take 0.8).
        matrices: "all" takes embeddings for matrices, as the official code does; "linear" does not.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor.

    Source:
        Marczak et al., 2025, arXiv 2502.04959; danielm1405/iso-merging.
    """
    treated = matrix_names(base, matrices)

    def merge(start: Matrix, *ends: Matrix) -> Matrix:
        n_common, d = split_of(min(start.shape), len(ends), common)
        star = iso_cts([end - start for end in ends], n_common, d) if d else iso_c(sum_of(start, ends))
        return start.add(star, alpha=scale)

    def rule(name: str, theta_0: Tensor, thetas: list[Tensor]) -> Tensor:
        if name in treated:
            return each_matrix(merge, theta_0, *thetas)
        return theta_0 + scale * mean_of([theta - theta_0 for theta in thetas])

    return tensor_by_tensor(base, experts, rule)
