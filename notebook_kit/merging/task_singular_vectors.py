"""TSV-Merge: keep each task's leading singular vectors and turn them as little as possible until none overlap.

    τ_i = U_i S_i V_iᵀ                          keep the first k = ⌊min(m, n) / K⌋ of each
    Û = [U_1 ... U_K] [m, Kk], V̂ likewise [n, Kk], Ŝ = (S_1, ..., S_K)
    τ* = polar(Û) diag(Ŝ) polar(V̂)ᵀ             polar: the nearest orthonormal matrix
    θ  = θ₀ + λ τ*

τ_i = θ_i − θ₀ [m, n]; K: experts; λ: `scale`. Tensors that are no matrices get the mean of the τ_i.
Gargiulo et al., 2024, TSV-Merge.

Interference, what the turning removes: ‖(ÛᵀÛ − I) diag(Ŝ) (V̂ᵀV̂ − I)‖₁, the sum of magnitudes; see
`diagnostics.merge_subspaces.interference`.

Where k = 0 (more experts than min(m, n)) the mean is taken; the official code gives a zero update there. Where tasks
share a direction exactly, Û has no full rank: the nearest orthonormal matrix is then taken on its range, so that K
copies of one expert give its own k leading triplets; the official code fills up with arbitrary directions.
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
from notebook_kit.weights import Weights, expert_weights

Matrix = Float[Tensor, "m n"]


def leading_factors(taus: Sequence[Matrix], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Û [m, Kk], Ŝ [Kk], V̂ᵀ [Kk, n]: the k leading singular triplets of every task, side by side."""
    u, s, vh = zip(*(thin_svd(tau, k) for tau in taus), strict=True)
    s_hat = torch.cat(s)
    return torch.cat(u, dim=1) * (s_hat > 0), s_hat, torch.cat(vh)


@method(family="merging", paper="tsv-merge")
def task_singular_vectors(
    base: Weights,
    experts: Sequence[Weights],
    *,
    scale: Annotated[float, Range(0, 3)] = 1.0,
    rank_fraction: Annotated[float | None, Range(0, 1)] = None,
    matrices: Annotated[str, Choice("all", "linear")] = "all",
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Merge the leading singular vectors of all tasks, made orthogonal to each other.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i, fine-tuned from it.
        scale: λ, what multiplies the merged task vector.
        rank_fraction: share of min(m, n) that each task keeps; None means 1 / K, the paper's.
        matrices: "all" takes embeddings for matrices, as the official code does; "linear" does not.
        weights: one factor an expert, for its task vector; None means 1 for each.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor.

    Source:
        Gargiulo et al., 2024, arXiv 2412.00081; AntoAndGar/task_singular_vectors.
    """
    factors = expert_weights(weights, len(experts))
    treated = matrix_names(base, matrices)
    fraction = 1 / len(factors) if rank_fraction is None and factors else rank_fraction

    def merge(*taus: Matrix) -> Matrix:
        k = int(min(taus[0].shape) * fraction + 1e-9)  # 9 · (1/9) must not fall to 0.99...
        if k == 0:
            return mean_of(list(taus))
        u, s, vh = leading_factors(taus, k)
        return (polar(u)[0] * s) @ polar(vh)[0]

    def rule(name: str, theta_0: Tensor, thetas: list[Tensor]) -> Tensor:
        taus = [factor * (theta - theta_0) for factor, theta in zip(factors, thetas, strict=True)]
        star = each_matrix(merge, *taus) if name in treated else mean_of(taus)
        return theta_0 + scale * star

    return tensor_by_tensor(base, experts, rule)
