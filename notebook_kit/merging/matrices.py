"""What methods in subspaces share: which tensors are matrices, thin singular vectors, the nearest orthonormal matrix.

Singular vectors come from the eigenvectors of the smaller Gram matrix A Aᵀ, in float64. Squaring costs half of the
digits, and float64 has twice as many as the weights: for float32 weights this is as exact as an SVD in float32, and for
a 768 x 3072 matrix several times as fast. Where only leading directions are asked for, or A is well-conditioned,
float32 will do.

A direction whose singular value is under 1e-6 of the largest is noise: which vector stands there is an accident. It
gets the singular value 0 and a zero row in Vh, so that no method builds on it. An SVD would return an arbitrary vector.
"""

import re
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.weights import Weights

NOISE = 1e-6
LOOKUPS = {"wte", "wpe", "shared", "relative_attention_bias"}


def matrix_names(base: Weights, matrices: str) -> set[str]:
    """Names of the tensors that a method treats as matrices; it treats the others entry by entry.

    Args:
        base: state dict.
        matrices: "all": every floating tensor with two axes, and fused experts [experts, m, n] as a batch of them.
            "linear": of these, not the embeddings, which look rows up and multiply nothing. They are known by their
            name: the module's holds "embed" or is wte, wpe, shared or relative_attention_bias; and a head that is tied
            to an embedding goes with it. Convolutions and vectors are never matrices.
    """
    names = {name for name, tensor in base.items() if _is_matrix(name, tensor)}
    if matrices == "all":
        return names
    lookups = {name for name in names if _is_lookup(name)}
    if isinstance(base, dict):  # a lazy mapping has no tied tensors: files hold them once
        places = {base[name].data_ptr() for name in lookups}
        lookups |= {name for name in names if base[name].data_ptr() in places}
    return names - lookups


def each_matrix(rule: Callable[..., Tensor], *tensors: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
    """Call `rule` on matrices as they are, on fused experts one expert after the other."""
    if tensors[0].dim() == 2:
        return rule(*tensors)
    return torch.stack([rule(*slices) for slices in zip(*tensors, strict=True)])


def thin_svd(
    a: Float[Tensor, "m n"], k: int | None = None
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    """The leading singular triplets: A ≈ U diag(S) Vh.

    Args:
        a: A, float32 or float64.
        k: how many; None for all min(m, n).

    Returns:
        U, S (falling; 0 where it is noise), Vh (zero rows there). The larger side's vectors are zero where S is.
    """
    m, n = a.shape
    if m > n:
        u, s, vh = thin_svd(a.T, k)
        return vh.T, s, u.T
    if a.dtype == torch.float64:
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        u, s, vh = u[:, :k], s[:k], vh[:k]
        alive = s > NOISE**2 * s[:1]
        return u, s * alive, vh * alive[:, None]
    few = k is not None and k < m
    values, vectors = _gram_eigh(a, m - k if few else 0, floor=1e-2 if few else 1.0)
    s, u = values.clamp(min=0).sqrt().flip(-1)[:k], vectors.flip(-1)[:, :k]
    inverse = torch.where(s > NOISE * s[:1], 1 / s, 0)
    vh = (u.T @ a.to(u.dtype)) * inverse[:, None]
    return u.to(a.dtype), (s * (inverse > 0)).to(a.dtype), vh.to(a.dtype)


def polar(a: Float[Tensor, "m n"]) -> tuple[Float[Tensor, "m n"], Float[Tensor, " k"]]:
    """The orthonormal matrix nearest to A: U Vh of its SVD, A (AᵀA)^(-1/2); directions that A lacks stay out.

    Args:
        a: A, float32 or float64.

    Returns:
        The matrix, and A's singular values, rising.

    Source: Higham 1986, "Computing the polar decomposition"; the answer to the orthogonal Procrustes problem.
    """
    m, n = a.shape
    wide = a if m <= n else a.T
    values, q = _gram_eigh(wide, 0, floor=1e-3 if max(m, n) >= 2 * min(m, n) else 1.0)
    root = torch.where(values > NOISE**2 * values[-1:], values.clamp(min=0).rsqrt(), 0)
    # The product's rounding grows with A's condition: up to 10,000 it stays in a direction or two, and small.
    exact = q.dtype if float(values[0]) < 1e-8 * float(values[-1]) else a.dtype
    q, root, wide = q.to(exact), root.to(exact), wide.to(exact)
    # (AAᵀ)^(-1/2) A, in the cheaper order
    nearest = ((q * root) @ q.T) @ wide if max(m, n) >= 2 * min(m, n) else q @ (root[:, None] * (q.T @ wide))
    nearest = nearest.to(a.dtype)
    return nearest if m <= n else nearest.T, values.clamp(min=0).sqrt().to(a.dtype)


def _gram_eigh(a: Float[Tensor, "m n"], last: int, floor: float) -> tuple[Float[Tensor, " m"], Float[Tensor, "m m"]]:
    """Eigenvalues, rising, and eigenvectors of A Aᵀ: in float32 if that is exact enough, else in float64.

    In float32 an eigenvector errs by rounding · largest / gap; so it is enough where the smallest eigenvalue that
    matters, number `last`, is above `floor` times the largest. 1 means: do not even try.
    """
    if a.dtype == torch.float32 and floor < 1:
        values, vectors = torch.linalg.eigh(a @ a.T)
        if float(values[last]) > floor * float(values[-1]):
            return values, vectors
    return torch.linalg.eigh(_gram(a))


def _gram(a: Float[Tensor, "m n"]) -> Float[Tensor, "m m"]:
    """A Aᵀ in float64; it is symmetric, so a quarter of it need not be computed."""
    wide = a.double()
    upper, lower = wide.split([len(a) // 2, len(a) - len(a) // 2])
    cross = upper @ lower.T
    return torch.cat([torch.cat([upper @ upper.T, cross], 1), torch.cat([cross.T, lower @ lower.T], 1)])


def mean_of(taus: list[Tensor]) -> Tensor:
    """The plain mean: what happens to vectors, and to matrices that a method does not treat."""
    return torch.stack(taus).mean(dim=0)


def _is_matrix(name: str, tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return False
    return tensor.dim() == 2 or (tensor.dim() == 3 and "expert" in name)


def _is_lookup(name: str) -> bool:
    parts = name.split(".")
    module = parts[-2] if len(parts) > 1 and parts[-1] == "weight" else parts[-1]
    return "embed" in module.lower() or module in LOOKUPS or bool(re.fullmatch(r"position\w*|pos_\w+", module))
