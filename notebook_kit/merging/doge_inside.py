"""A look inside DOGE: what it learned for each matrix, and the adjusted experts before they are added; see `doge`."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from notebook_kit.hyperparameters import hyperparameters, validate
from notebook_kit.merging.doge import doge
from notebook_kit.merging.doge_descent import Descent
from notebook_kit.merging.doge_parts import adjusted_taus, each_treated, statistics
from notebook_kit.merging.matrices import matrix_names
from notebook_kit.weights import Weights, at_least_float32, check


def _settings(given: Mapping[str, object]) -> dict[str, object]:
    schema = hyperparameters(doge)
    validate(schema, {name: value for name, value in given.items() if name != "transposed"})
    return {"transposed": None} | {name: row.default for name, row in schema.items()} | given


@torch.no_grad()
def doge_details(base: Weights, experts: Sequence[Weights], **settings) -> dict[str, list[Descent]]:
    """What DOGE does inside: for each treated tensor its Δ, loss trace, λ_i and shared subspace.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i.
        settings: as `doge`.

    Returns:
        dict: tensor name to one Descent a matrix (one, or one for each of the fused experts).

    Raises:
        IncompatibleWeights, ValueError: as `doge`.
    """
    check(base, experts)
    settings = _settings(settings)
    settings.pop("density")
    treated = matrix_names(base, settings.pop("matrices"))
    return {name: found for name, _, found, _ in each_treated(base, experts, treated, **settings)}


@torch.no_grad()
def doge_experts(base: Weights, experts: Sequence[Weights], **settings) -> list[dict[str, Tensor]]:
    """The adjusted experts θ₀ + m_i ⊙ (τ_i + Δ_i), for a method that finds their coefficients, such as AdaMerging.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i.
        settings: as `doge`; the paper's variant has shared_delta=False and subspace=len(experts).

    Returns:
        list: one state dict an expert; parameters that are no matrices are base's.

    Raises:
        IncompatibleWeights, ValueError: as `doge`.
    """
    check(base, experts)
    settings = _settings(settings)
    density, matrices = settings.pop("density"), settings.pop("matrices")
    trim = statistics(base, experts, density=density, matrices=matrices)["trim"] if density < 1 else None
    adjusted = [{name: tensor.clone() for name, tensor in base.items()} for _ in experts]
    for name, taus, _, delta in each_treated(base, experts, matrix_names(base, matrices), **settings):
        for weights, moved in zip(adjusted, adjusted_taus(name, taus, delta, trim), strict=True):
            weights[name] = (at_least_float32(base[name]) + moved).to(base[name].dtype)
    return adjusted
