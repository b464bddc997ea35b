"""Task arithmetic: what fine-tuning changed is a vector; vectors can be added, and subtracted to forget.

    τ_i = θ_i − θ₀        θ = θ₀ + λ Σ_i w_i τ_i

θ₀: base, θ_i: experts, λ: `scale`. λ = 1/K is plain averaging; a negative factor forgets a task.
Ilharco et al., 2022 (Editing Models with Task Arithmetic, equation 1).
"""

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.merging.combination import combine
from notebook_kit.weights import Weights, expert_weights


@method(family="merging", paper="task-arithmetic")
def task_arithmetic(
    base: Weights,
    experts: Sequence[Weights],
    *,
    scale: Annotated[float, Range(-2, 3)] = 0.3,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Add the experts' task vectors to the base.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i, fine-tuned from it.
        scale: λ, what multiplies the summed task vector.
        weights: one factor an expert; None means 1 for each. Negative ones subtract a task.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor.

    Source:
        Ilharco et al., 2022, arXiv 2212.04089, section 3.
    """
    factors = expert_weights(weights, len(experts))

    # θ₀ + λ Σ w τ = (1 − λ Σ w) θ₀ + λ Σ w θ: one pass for each model, no task vector in memory.
    of_base, of_experts = 1 - scale * sum(factors), [scale * factor for factor in factors]
    return combine(base, experts, lambda name: (of_base, of_experts))
