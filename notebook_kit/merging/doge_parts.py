"""What `doge` and `doge_inside` share: the treated tensors one by one, and what is kept of each expert."""

import re
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from notebook_kit.merging.doge_descent import coefficients, descend
from notebook_kit.merging.matrices import matrix_names
from notebook_kit.merging.selection import Trim, trims
from notebook_kit.weights import Weights, at_least_float32

Trims = Sequence[Mapping[str, Trim]]


class _Part(Mapping):
    """Some tensors of a state dict, read when they are asked for."""

    def __init__(self, weights: Weights, names: Sequence[str]):
        self.weights, self.names = weights, names

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def statistics(
    base: Weights, experts: Sequence[Weights], *, density: float = 0.3, matrices: str = "linear", **_
) -> dict[str, object]:
    """What must be known of the whole model: the magnitude from which each expert's entries are kept."""
    treated = matrix_names(base, matrices)
    names = [name for name in base if name in treated]
    parts = [{n: w[n] for n in names} if isinstance(w, dict) else _Part(w, names) for w in (base, *experts)]
    return {"trim": trims(parts[0], parts[1:], density=density, scope="model")}


def kept(tau: Tensor, trim: Trim, name: str) -> Bool[Tensor, "..."]:
    """m_i: the entries from the threshold up, less the surplus that ties with it."""
    mask = tau.abs() >= trim.threshold
    if trim.drop.get(name):
        tied = (tau.abs() == trim.threshold).reshape(-1).nonzero().squeeze(-1)[: trim.drop[name]]
        mask.view(-1)[tied] = False
    return mask


def each_treated(base: Weights, experts: Sequence[Weights], treated, *, transposed=None, eta, norm_aware, **descent):
    """For each treated tensor: its name, τ [K, ...], one Descent a matrix, and Δ in the tensor's own axes [d, ...]."""
    try:
        flipped = re.compile(transposed) if transposed else None
    except re.error as error:
        raise ValueError(f"transposed must be a regular expression, got {transposed!r}: {error}") from None
    for name in base:
        if name not in treated:
            continue
        theta_0 = at_least_float32(base[name])
        taus = torch.stack([at_least_float32(expert[name]) - theta_0 for expert in experts])
        flip = bool(flipped and flipped.search(name))
        slices = taus.mT if flip else taus
        batch = [slices] if taus.dim() == 3 else slices.unbind(dim=1)
        found = [descend(one, coefficients(one, eta, norm_aware), **descent) for one in batch]
        delta = torch.stack([one.delta.mT if flip else one.delta for one in found], dim=1)
        yield name, taus, found, delta.reshape(len(delta), *theta_0.shape)


def adjusted_taus(name: str, taus: Tensor, delta: Tensor, trim: Trims | None) -> Tensor:
    """m_i ⊙ (τ_i + Δ_i), stacked; all entries are kept without `trim`."""
    moved = taus + delta
    if trim is not None:
        moved *= torch.stack([kept(tau, rule[name], name) for tau, rule in zip(taus, trim, strict=True)])
    return moved
