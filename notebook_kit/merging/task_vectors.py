"""Task vectors with coefficients: θ_l(λ) = θ₀,l + Σ_i λ_il τ_il, differentiable in λ; trimmed as TIES does if asked."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.merging.ties import ties
from notebook_kit.weights import Weights, at_least_float32, float_keys

Coefficients = Float[Tensor, "experts layers"]


class TaskVectors:
    """θ₀ and its task vectors, stacked for each tensor, and θ(λ) of them.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i.
        owners: each floating key with the key of the parameter that it is tied to (or itself).
        density: share kept by trimming, entries against the elected sign dropped; None leaves them whole.
    """

    def __init__(self, base: Weights, experts: Sequence[Weights], owners: Mapping[str, str], density: float | None):
        self.owners, self.layers = dict(owners), [name for name in owners if owners[name] == name]
        self.theta_0 = {name: at_least_float32(base[name]) for name in self.layers}
        self.like = {name: tensor.clone() for name, tensor in base.items()}
        if density is not None:
            base, experts = _trimmed(base, experts, density)
        self.tau = {  # τ_l  [K, *shape]
            name: torch.stack([at_least_float32(e[name]) - at_least_float32(base[name]) for e in experts])
            for name in self.layers
        }

    def combine(self, coefficients: Coefficients) -> dict[str, Tensor]:
        """θ(λ): floating tensors only, in float32 at least, with a gradient to λ."""
        lambdas = coefficients.expand(-1, len(self.layers)).unbind(1)
        theta = {
            name: self.theta_0[name] + torch.tensordot(each.to(self.tau[name]), self.tau[name], 1)
            for name, each in zip(self.layers, lambdas, strict=True)
        }
        return {name: theta[owner] for name, owner in self.owners.items()}

    def state_dict(self, coefficients: Coefficients) -> dict[str, Tensor]:
        """θ(λ) with base's keys and dtypes."""
        theta = self.combine(coefficients)
        return {k: theta[k].to(t.dtype).clone() if k in theta else t.clone() for k, t in self.like.items()}


def _trimmed(base: Weights, experts: Sequence[Weights], density: float) -> tuple[dict, list[dict]]:
    """Task vectors, trimmed and without entries against the elected sign, on a base of zeros."""
    keys = float_keys(base)
    theta_0 = {k: at_least_float32(base[k]) for k in keys}
    zero = {k: torch.zeros_like(t) for k, t in theta_0.items()}
    taus = []
    for expert in experts:
        tau = {k: at_least_float32(expert[k]) - theta_0[k] for k in keys}
        taus.append(ties(zero, [tau], density=density, scale=1.0, elect="none", combine="sum"))
    sums = {k: sum(tau[k] for tau in taus).sign() for k in keys}
    majority = -1.0 if sum(float(sign.sum()) for sign in sums.values()) < 0 else 1.0
    for k, sign in sums.items():
        gamma = torch.where(sign == 0, majority, sign)
        for tau in taus:
            tau[k] = torch.where(tau[k].sign() == gamma, tau[k], 0)
    return zero, taus
