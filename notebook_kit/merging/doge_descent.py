"""DOGE for one matrix: the subspace the tasks share, the quadratic that Δ descends, and its gradient; see `doge`."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.merging.matrices import thin_svd

Taus = Float[Tensor, "experts m n"]
Matrix = Float[Tensor, "m n"]
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8  # Adam's


class Descent(NamedTuple):
    """What happened to one matrix.

    Args:
        delta: Δ [1 or K, m, n].
        losses: L before each step and at the end, [steps + 1].
        lambdas: λ_i [K].
        subspace: Q [m, k].
        spectrum: singular values of the K task bases side by side; √K where all tasks share a direction, 1 where one
            task alone has it.
    """

    delta: Float[Tensor, "d m n"]
    losses: Float[Tensor, " steps"]
    lambdas: Float[Tensor, " experts"]
    subspace: Float[Tensor, "m k"]
    spectrum: Float[Tensor, " r"]

    def energy_inside(self) -> float:
        """Share of ‖Δ‖² that lies in the shared subspace; NaN where Δ is zero."""
        return float((self.subspace.T @ self.delta).square().sum() / self.delta.square().sum())


def shared_subspace(taus: Taus, subspace: int) -> tuple[Float[Tensor, "m k"], Float[Tensor, " r"]]:
    """Q [m, k]: the directions that the tasks' leading left singular vectors have most in common.

    Args:
        taus: task vectors of one matrix [K, m, n].
        subspace: s; of r = min(m, n) directions, k = ⌊r / s⌋ are protected.

    Returns:
        Q, and the singular values of the concatenation. Empty where ⌊r / K⌋ or k is 0.
    """
    r = min(taus.shape[1:])
    each, k = r // len(taus), r // subspace
    if each == 0 or k == 0:
        return taus.new_zeros(taus.shape[1], 0), taus.new_zeros(0)
    u, spectrum, _ = thin_svd(torch.cat([thin_svd(tau, each)[0] for tau in taus], dim=1))
    alive = int((spectrum > 0).sum())
    # A row that no task touches is exactly 0 here: Adam would turn a rounding error into steps of full length.
    touched = taus.abs().amax(dim=(0, 2)) > 0
    return u[:, : min(k, alive)] * touched[:, None], spectrum


class Objective:
    """L(Δ) = Σ_j Σ_o r_jo²,  r_jo = ⟨τ_j[o], τ_j[o] − Σ_i λ_i τ_i[o]⟩ − ⟨τ_j[o], Σ_i λ_i Δ_i[o]⟩, and its gradient.

    Args:
        taus: τ [K, m, n].
        lambdas: λ [K].
    """

    def __init__(self, taus: Taus, lambdas: Float[Tensor, " experts"]):
        # Row by row: T[o] [K, n] holds row o of every task, so that one batched product serves all tasks.
        self.rows = taus.transpose(0, 1).contiguous()
        planned = torch.tensordot(lambdas, taus, dims=1)
        own = self.rows.square().sum(-1)
        self.target = own - torch.bmm(self.rows, planned[:, :, None])[:, :, 0]  # [m, K]

    def residual(self, moved: Matrix) -> Float[Tensor, "m experts"]:
        """r, with `moved` = Σ_i λ_i Δ_i."""
        return self.target - torch.bmm(self.rows, moved[:, :, None])[:, :, 0]

    def gradient(self, residual: Float[Tensor, "m experts"]) -> Matrix:
        """∂L / ∂(Σ_i λ_i Δ_i) = −2 Σ_j r_j τ_j."""
        return torch.bmm(residual[:, None, :], self.rows)[:, 0].mul_(-2)


def descend(
    taus: Taus,
    lambdas: Float[Tensor, " experts"],
    *,
    subspace: int,
    steps: int,
    lr: float,
    project: str,
    shared_delta: bool,
    optimizer: str,
) -> Descent:
    """Find Δ: `steps` projected steps down L, from zero.

    Args:
        taus: τ [K, m, n].
        lambdas: λ [K].
        subspace: divisor of the rank that is protected.
        steps: how many.
        lr: learning rate.
        project: "grad": the gradient loses its part in Q before Adam sees it; "step": Δ itself loses it after each
            step; "none".
        shared_delta: one Δ for all tasks, or one each.
        optimizer: "adam" or "sgd".
    """
    q, spectrum = shared_subspace(taus, subspace)
    protect = project != "none" and q.shape[1] > 0
    # How Σ_i λ_i Δ_i depends on each Δ.
    factors = lambdas.sum().reshape(1) if shared_delta else lambdas
    delta = taus.new_zeros(len(factors), *taus.shape[1:])
    first, second = torch.zeros_like(delta), torch.zeros_like(delta)
    objective, losses = Objective(taus, lambdas), []
    for step in range(1, steps + 1):
        residual = objective.residual(torch.tensordot(factors, delta, dims=1))
        losses.append(residual.square().sum())
        g = objective.gradient(residual)
        if protect and project == "grad":
            # Where all is protected, what rounding leaves is no gradient; Adam would walk along it all the same.
            g = g - q @ (q.T @ g) if q.shape[1] < len(g) else torch.zeros_like(g)
        g = factors[:, None, None] * g
        if optimizer == "sgd":
            delta.sub_(g, alpha=lr)
        else:
            first.lerp_(g, 1 - BETA_1)
            second.mul_(BETA_2).addcmul_(g, g, value=1 - BETA_2)
            size = (second / (1 - BETA_2**step)).sqrt_().add_(EPSILON)
            delta.addcdiv_(first, size, value=-lr / (1 - BETA_1**step))
        if protect and project == "step":
            delta -= q @ (q.T @ delta)
    losses.append(objective.residual(torch.tensordot(factors, delta, dims=1)).square().sum())
    return Descent(delta, torch.stack(losses), lambdas, q, spectrum)


def coefficients(taus: Taus, eta: float, norm_aware: bool) -> Float[Tensor, " experts"]:
    """λ_i = η / ‖τ_i‖ (0 for a task that left this matrix alone), or η for all."""
    norms = torch.linalg.matrix_norm(taus)
    return torch.where(norms > 0, eta / norms, 0) if norm_aware else torch.full_like(norms, eta)
