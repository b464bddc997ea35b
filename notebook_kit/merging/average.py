"""Weight averaging: the mean of models that share a beginning is often better than each of them.

    θ = Σ_i w_i θ_i,   Σ_i w_i = 1

θ_i: the experts' parameters. With w_i = 1/K and experts of one task this is the uniform soup of Wortsman et al.,
2022 (Model Soups, section 2); the base only sets names and dtypes.
"""

from collections.abc import Sequence

from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.merging.combination import combine
from notebook_kit.weights import Weights, expert_weights


@method(family="merging", paper="model-soups")
def average(
    base: Weights, experts: Sequence[Weights], *, weights: Sequence[float] | None = None, normalize: bool = True
) -> dict[str, Tensor]:
    """Average the experts' weights.

    Args:
        base: state dict that sets keys, shapes and dtypes.
        experts: state dicts of the same architecture.
        weights: one factor an expert; None means equal ones.
        normalize: divide the factors by their sum, so that they sum to 1.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor; factors that sum to 0 while `normalize` is on.

    Source:
        Wortsman et al., 2022, arXiv 2203.05482, section 2.
    """
    factors = expert_weights(weights, len(experts))
    if normalize:
        total = sum(factors)
        if experts and abs(total) < 1e-12:
            raise ValueError(f"weights sum to {total:g}, so they cannot be normalized (average)")
        factors = [factor / total for factor in factors]

    return combine(base, experts, lambda name: (0.0, factors))
