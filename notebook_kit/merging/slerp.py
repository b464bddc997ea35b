"""SLERP: walk from one model to the other along the arc, not along the chord, so that the norm does not sag.

    Ω = arccos ⟨a/‖a‖, b/‖b‖⟩
    θ = sin((1−t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b

a, b: the two experts' tensors (or rows of them, or whole models, `scope`), flattened for Ω only; a and b themselves
keep their norms. space="task_vectors" walks between the changes τ = θ − θ₀ instead and adds θ₀ at the end, as
mergekit's nuslerp does with a base. Where the two are nearly parallel or opposite (|cos Ω| > 0.9995) sin Ω vanishes and
the straight line is taken, as in mergekit's slerp. Shoemake, 1985, section 3.3.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.combination import combine
from notebook_kit.merging.contract import PIECE, Rule, tensor_by_tensor
from notebook_kit.weights import Weights, at_least_float32, check, float_keys

PARALLEL = 0.9995


def cosine(a: Tensor, b: Tensor, origin: Tensor | None = None) -> float:
    """cos Ω of two tensors, flattened, seen from the origin; 1 where one is zero, so that the line is taken."""
    return _ratio(*_products(a, b, origin))


def model_cosine(
    base: Weights, experts: Sequence[Weights], *, scope: str = "tensor", space: str = "weights", **_
) -> dict[str, float]:
    """The statistic of `scope="model"`: cos Ω over all floating tensors, read one at a time."""
    if scope != "model":
        return {}
    _two(experts)
    sums = [0.0, 0.0, 0.0]
    for name in float_keys(base):
        parts = _products(*(expert[name] for expert in experts), base[name] if space == "task_vectors" else None)
        sums = [total + part for total, part in zip(sums, parts, strict=True)]
    return {"cos_omega": _ratio(*sums)}


@method(family="merging", paper="slerp", statistics=model_cosine)
def slerp(
    base: Weights,
    experts: Sequence[Weights],
    *,
    t: Annotated[float, Range(0, 1)] = 0.5,
    scope: Annotated[str, Choice("tensor", "row", "model")] = "tensor",
    space: Annotated[str, Choice("weights", "task_vectors")] = "weights",
    cos_omega: float | None = None,
) -> dict[str, Tensor]:
    """Interpolate two models along the great circle between them.

    Args:
        base: state dict that sets keys, shapes and dtypes; θ₀ for space="task_vectors".
        experts: exactly two state dicts.
        t: 0 gives the first expert, 1 the second.
        scope: one angle for each tensor, for each of its rows (output units), or for the whole model.
        space: between the weights, or between what the two changed in the base.
        cos_omega: the model's angle, from `model_cosine`; None computes it where `scope` needs it.

    Returns:
        dict: the merged state dict.

    Raises:
        ValueError: not two experts; NaN or Inf in a tensor.
        IncompatibleWeights: keys, shapes or dtypes differ.

    Source:
        Shoemake, 1985, doi 10.1145/325334.325242; applied to tensors as in mergekit.
    """
    _two(experts)
    if scope == "model" and cos_omega is None:
        check(base, experts)
        cos_omega = model_cosine(base, experts, scope=scope, space=space)["cos_omega"]
    from_base = space == "task_vectors"
    if scope == "row":
        return tensor_by_tensor(base, experts, _row_by_row(t, from_base))

    def arc(name: str) -> tuple[float, list[float]]:
        cos = cos_omega
        if scope == "tensor":
            cos = cosine(*(expert[name] for expert in experts), base[name] if from_base else None)
        factors = [float(factor) for factor in _factors(torch.tensor(cos, dtype=torch.float64), t)]
        return (1 - sum(factors) if from_base else 0.0), factors

    return combine(base, experts, arc)


def _factors(cos: Float[Tensor, "*rows"], t: float) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """What a and b are multiplied with: the arc, or the line where there is none."""
    there = cos.abs() <= PARALLEL
    omega = torch.acos(torch.where(there, cos, 0.0))
    sine = omega.sin()
    return torch.where(there, ((1 - t) * omega).sin() / sine, 1 - t), torch.where(there, (t * omega).sin() / sine, t)


def _row_by_row(t: float, from_base: bool) -> Rule:
    def rule(name: str, theta_0: Tensor, thetas: list[Tensor]) -> Tensor:
        origin = theta_0 if from_base else torch.zeros_like(theta_0)
        a, b = ((theta - origin).flatten(1) if theta.dim() > 1 else (theta - origin).reshape(1, -1) for theta in thetas)
        lengths = a.norm(dim=1) * b.norm(dim=1)
        cos = torch.where(lengths > 0, (a * b).sum(dim=1) / lengths, 1.0).clamp(-1, 1)
        first, second = _factors(cos.double(), t)
        merged = first.to(a)[:, None] * a + second.to(a)[:, None] * b
        return origin + merged.reshape(theta_0.shape)

    return rule


def _two(experts: Sequence[Weights]) -> None:
    if len(experts) != 2 and not isinstance(experts, Mapping):  # `check` says what is wrong with a mapping
        raise ValueError(f"slerp needs exactly two experts, got {len(experts)}")


def _products(a: Tensor, b: Tensor, origin: Tensor | None = None) -> tuple[float, float, float]:
    flat = [tensor.reshape(-1) for tensor in (a, b, *([] if origin is None else [origin]))]
    ab = aa = bb = 0.0
    for start in range(0, len(flat[0]), PIECE):
        x, y, *zero = (at_least_float32(tensor[start : start + PIECE]) for tensor in flat)
        if zero:
            x, y = x - zero[0], y - zero[0]
        ab, aa, bb = ab + float(x @ y), aa + float(x @ x), bb + float(y @ y)
    return ab, aa, bb


def _ratio(ab: float, aa: float, bb: float) -> float:
    return max(-1.0, min(1.0, ab / math.sqrt(aa * bb))) if aa > 0 and bb > 0 else 1.0
