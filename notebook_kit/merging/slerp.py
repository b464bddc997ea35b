"""SLERP: walk from one model to the other along the arc, not along the chord, so that the norm does not sag.

    Ω = arccos ⟨a/‖a‖, b/‖b‖⟩
    θ = sin((1−t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b

a, b: the two experts' tensors (or whole models, `scope`), flattened for Ω only; a and b themselves keep their norms.
Where they are nearly parallel or opposite (|cos Ω| > 0.9995) sin Ω vanishes and the straight line is taken, as
mergekit does. Shoemake, 1985, section 3.3.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.combination import combine
from notebook_kit.merging.contract import PIECE
from notebook_kit.weights import Weights, at_least_float32, check, float_keys

PARALLEL = 0.9995


def cosine(a: Tensor, b: Tensor) -> float:
    """cos Ω of two tensors, flattened; 1 where one of them is zero, so that the straight line is taken."""
    return _ratio(*_products(a, b))


def model_cosine(base: Weights, experts: Sequence[Weights], *, scope: str = "tensor", **_) -> dict[str, float]:
    """The statistic of `scope="model"`: cos Ω over all floating tensors, read one at a time."""
    if scope != "model":
        return {}
    _two(experts)
    sums = [0.0, 0.0, 0.0]
    for name in float_keys(base):
        parts = _products(*(expert[name] for expert in experts))
        sums = [total + part for total, part in zip(sums, parts, strict=True)]
    return {"cos_omega": _ratio(*sums)}


@method(family="merging", paper="slerp", statistics=model_cosine)
def slerp(
    base: Weights,
    experts: Sequence[Weights],
    *,
    t: Annotated[float, Range(0, 1)] = 0.5,
    scope: Annotated[str, Choice("tensor", "model")] = "tensor",
    cos_omega: float | None = None,
) -> dict[str, Tensor]:
    """Interpolate two models along the great circle between them.

    Args:
        base: state dict that sets keys, shapes and dtypes.
        experts: exactly two state dicts.
        t: 0 gives the first expert, 1 the second.
        scope: one angle for each tensor, or one for the whole model.
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
        cos_omega = model_cosine(base, experts, scope=scope)["cos_omega"]

    def arc(name: str) -> tuple[float, list[float]]:
        cos = cosine(*(expert[name] for expert in experts)) if scope == "tensor" else cos_omega
        if not abs(cos) <= PARALLEL:
            return 0.0, [1 - t, t]
        omega = math.acos(cos)
        return 0.0, [math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)]

    return combine(base, experts, arc)


def _two(experts: Sequence[Weights]) -> None:
    if len(experts) != 2 and not isinstance(experts, Mapping):  # `check` says what is wrong with a mapping
        raise ValueError(f"slerp needs exactly two experts, got {len(experts)}")


def _products(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    a, b = a.reshape(-1), b.reshape(-1)
    ab = aa = bb = 0.0
    for start in range(0, len(a), PIECE):
        x, y = (at_least_float32(tensor[start : start + PIECE]) for tensor in (a, b))
        ab, aa, bb = ab + float(x @ y), aa + float(x @ x), bb + float(y @ y)
    return ab, aa, bb


def _ratio(ab: float, aa: float, bb: float) -> float:
    return max(-1.0, min(1.0, ab / math.sqrt(aa * bb))) if aa > 0 and bb > 0 else 1.0
