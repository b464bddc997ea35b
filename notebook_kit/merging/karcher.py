"""Karcher mean: the centre of models on a sphere, where the ways to all of them, along great circles, cancel out.

    u_i = θ_i / ‖θ_i‖
    m ← exp_m( Σ_i w_i log_m(u_i) )          until the step is shorter than `tolerance`
        log_m(u) = φ / sin φ · (u − cos φ · m),   cos φ = ⟨m, u⟩
        exp_m(v) = cos ‖v‖ · m + sin ‖v‖ · v / ‖v‖
    θ   = (Σ_i w_i ‖θ_i‖) · m

θ_i: the experts' tensors, flattened; w_i: weights that sum to 1; m starts at the direction of Σ w_i u_i. With two
experts of equal length it is SLERP at t = w_2. The plain mean of models that differ is shorter than each of them; this
one has their mean length.

Karcher, 1977, Riemannian center of mass; the iteration is algorithm A1 of Buss and Fillmore, 2001 (Spherical averages,
ACM Transactions on Graphics 20). Lengths, start and stopping are mergekit's. Every m lies in the span of the u_i, so
the iteration runs on K coefficients and the K x K inner products: the tensors are read twice, however many steps it
takes. A zero tensor has no direction: it counts for the length only. An expert opposite to m has no single shortest way
to it and gets no say in that step; two opposite experts give the direction of the first.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.merging.combination import combine
from notebook_kit.merging.geometry import inner_products, pieces
from notebook_kit.weights import Weights, expert_weights


def karcher_coefficients(
    gram: Float[Tensor, "k k"], weights: Float[Tensor, " k"], *, n_iterations: int = 10, tolerance: float = 1e-5
) -> Float[Tensor, " k"]:
    """Find c with m = Σ c_i u_i, the centre of unit vectors.

    Args:
        gram: ⟨u_i, u_j⟩, in float64.
        weights: w_i, sum 1.
        n_iterations: steps, at most.
        tolerance: radians; a shorter step ends the iteration, and a vector nearer than this asks for no step.
    """

    def length(c):
        return float((c @ gram @ c).clamp(min=0).sqrt())

    first = length(weights)
    m = weights / first if first >= tolerance else torch.eye(len(weights), dtype=weights.dtype)[0]
    for _ in range(n_iterations):
        cos = (gram @ m).clamp(-1, 1)
        phi = torch.acos(cos)
        asks = (phi >= tolerance) & (torch.pi - phi >= tolerance)
        pull = torch.where(asks, weights * phi / torch.where(asks, torch.sin(phi), 1.0), 0.0)
        v = pull - (pull @ cos) * m
        step = length(v)
        if step < tolerance:
            break
        m = math.cos(step) * m + math.sin(step) / step * v
        m = m / length(m)
    return m


@method(family="merging", paper="karcher")
def karcher(
    base: Weights,
    experts: Sequence[Weights],
    *,
    weights: Sequence[float] | None = None,
    n_iterations: Annotated[int, Range(0, 100)] = 10,
    tolerance: Annotated[float, Range(1e-9, 1e-2, log=True)] = 1e-5,
) -> dict[str, Tensor]:
    """Average the experts' directions on the sphere and their lengths on the line, tensor by tensor.

    Args:
        base: state dict that sets keys, shapes and dtypes.
        experts: state dicts of the same architecture.
        weights: one factor an expert, at least 0; None means equal ones. They are divided by their sum.
        n_iterations: steps, at most; 0 leaves the plain mean's direction.
        tolerance: radians; the iteration ends with a step shorter than this.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: a factor below 0, or none above; NaN or Inf in a tensor.

    Source:
        Karcher, 1977, doi 10.1002/cpa.3160300502; applied to tensors as in mergekit.
    """
    w = torch.tensor(expert_weights(weights, len(experts)), dtype=torch.float64)
    if len(w) and (float(w.min()) < 0 or float(w.sum()) <= 0):
        raise ValueError(f"weights must be at least 0, and one above, got {w.tolist()} (karcher)")

    def centre(name: str) -> tuple[float, list[float]]:
        gram = inner_products(pieces(name, experts), len(experts))
        return 0.0, _factors(gram, w / w.sum(), n_iterations, tolerance)

    return combine(base, experts, centre)


def _factors(gram: Tensor, w: Tensor, n_iterations: int, tolerance: float) -> list[float]:
    """What each expert's tensor is multiplied with: (Σ w ‖θ‖) c_i / ‖θ_i‖, from the inner products ⟨θ_i, θ_j⟩."""
    lengths = gram.diagonal().sqrt()
    there = (lengths > 0) & (w > 0)
    if not there.any():
        return [0.0] * len(w)
    units = gram[there][:, there] / (lengths[there][:, None] * lengths[there])
    share = w[there] / w[there].sum()
    c = karcher_coefficients(units, share, n_iterations=n_iterations, tolerance=tolerance)
    result = torch.zeros_like(w)
    result[there] = float(w @ lengths) * c / lengths[there]
    return result.tolist()
