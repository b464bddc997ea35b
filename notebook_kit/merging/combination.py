"""Merges that are, tensor by tensor, one linear combination of the models: θ = c₀ θ₀ + Σ_i c_i θ_i."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from notebook_kit.weights import Weights, at_least_float32, check, check_structure

PIECE = 1 << 16  # elements: the result's piece stays in a core's cache while the models are added to it

Coefficients = Callable[[str], tuple[float, Sequence[float]]]


def combine(base: Weights, experts: Sequence[Weights], coefficients: Coefficients) -> dict[str, Tensor]:
    """Combine each floating tensor linearly, in float32 at least; other tensors are base's.

    Reading the models once is what this costs, so nothing is read twice to be checked: a finite sum of the result
    proves that what went into it was finite. Only where it is not are the models looked at one by one.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i.
        coefficients: name of a tensor -> c₀ and one c_i an expert; asked once a tensor.

    Raises:
        IncompatibleWeights, ValueError: as `weights.check`.
    """
    check_structure(base, experts, None)
    merged = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            merged[name] = tensor.clone()
            continue
        of_base, factors = coefficients(name)
        models = [(float(c), expert[name].reshape(-1)) for c, expert in zip(factors, experts, strict=True)]
        if of_base:
            models.insert(0, (float(of_base), tensor.reshape(-1)))
        elif not _finite(tensor):
            check(base, experts)
        result = tensor.new_empty(tensor.numel())
        if not _fill(result, models):
            check(base, experts)
            _fill(result, models, plain=True)  # finite models: differences overflowed, or the result itself does
        merged[name] = result.reshape(tensor.shape)
    return merged


def _fill(result: Tensor, models: Sequence[tuple[float, Tensor]], plain: bool = False) -> bool:
    """Write Σ c θ into `result`, piece by piece; says whether the sum of all of it is finite."""
    factors = [factor for factor, _ in models]
    total, wide = 0.0, at_least_float32(result[:PIECE])
    # A mean needs one operation less: each model is blended into the mean of those before it.
    blend = not plain and len(models) > 1 and min(factors) > 0 and math.isclose(sum(factors), 1)
    for start in range(0, len(result), PIECE):
        where = slice(start, start + PIECE)
        there = result[where]
        out = there if wide.dtype == result.dtype else wide[: len(there)]
        first, *others = (at_least_float32(theta[where]) for _, theta in models)
        if blend:
            so_far = factors[0]
            for factor, theta in zip(factors[1:], others, strict=True):
                so_far += factor
                first = torch.lerp(first, theta, factor / so_far, out=out)
        else:
            torch.mul(first, factors[0], out=out)
            for factor, theta in zip(factors[1:], others, strict=True):
                out.add_(theta, alpha=factor)
        total += float(out.sum())
        if out is not there:
            there.copy_(out)
    return math.isfinite(total)


def _finite(tensor: Tensor) -> bool:
    return math.isfinite(float((tensor.float() if tensor.dtype.itemsize == 1 else tensor).sum()))
