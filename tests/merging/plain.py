"""TIES in a few lines, on the whole task vectors at once: what the chunked one must equal."""

import torch
from torch import Tensor


def trim(tau: Tensor, density: float) -> Tensor:
    """Keep the ⌊density · d⌋ largest; of equal ones at the edge, the last."""
    k = int(density * tau.numel())
    order = (tau.abs() * 1.0).flip(0).sort(descending=True, stable=True).indices
    kept = torch.zeros_like(tau)
    where = (len(tau) - 1 - order)[:k]
    kept[where] = tau[where]
    return kept


def ties(base, experts, *, density=0.2, scale=1.0, scope="model", elect="mass", combine="mean", weights=None):
    keys = list(base)
    sizes = [base[key].numel() for key in keys]

    def flat(weights):
        return torch.cat([weights[key].reshape(-1).double() for key in keys])

    theta_0 = flat({key: tensor.float() for key, tensor in base.items()})
    rows = []
    for expert in experts:
        tau = torch.cat([(expert[key].float() - base[key].float()).reshape(-1).double() for key in keys])
        parts = [tau] if scope == "model" else tau.split(sizes)
        rows.append(torch.cat([trim(part, density) for part in parts]))
    tau = torch.stack(rows)
    factors = torch.tensor(weights or [1.0] * len(experts), dtype=torch.float64)[:, None]
    tau = tau * factors
    if elect == "none":
        agrees = tau != 0
    else:
        gamma = (tau if elect == "mass" else tau.sign()).sum(dim=0).sign()
        gamma[gamma == 0] = -1.0 if gamma.sum() < 0 else 1.0
        agrees = tau.sign() == gamma
    chosen = tau * agrees
    if combine == "sum":
        merged = chosen.sum(dim=0)
    elif combine == "max":
        merged = chosen.gather(0, chosen.abs().argmax(dim=0, keepdim=True))[0]
    else:
        n = (agrees * factors.abs()).sum(dim=0)
        merged = chosen.sum(dim=0) / torch.where(n == 0, 1.0, n)
    pieces = (theta_0 + scale * merged).split(sizes)
    return {key: piece.reshape(base[key].shape).to(base[key].dtype) for key, piece in zip(keys, pieces, strict=True)}
