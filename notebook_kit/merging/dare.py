"""DARE: most of a task vector is redundant; drop entries at random, rescale the rest, and the expectation stays.

    τ̃_i = m_i ⊙ τ_i / density,   m_i ~ Bernoulli(density)        E[τ̃_i] = τ_i
    θ    = θ₀ + λ Σ_i τ̃_i         (or TIES' sign election on the τ̃_i)

τ_i = θ_i − θ₀; density = 1 − p, where p is the paper's drop rate; λ: `scale`. Yu et al., 2023, section 3.2.
mergekit rescales each tensor to its old L1 norm instead of by 1/density: `rescale="norm"` does that.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.contract import tensor_by_tensor, tensor_generator
from notebook_kit.merging.election import disjoint_merge, elect_sign
from notebook_kit.weights import Weights, expert_weights


def drop_and_rescale(tau: Tensor, density: float, rescale: str, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability `density`, and make up for the rest."""
    mask = torch.rand(tau.shape, generator=generator).to(tau.device) < density
    kept = tau * mask
    if rescale == "inverse" and density > 0:
        kept /= density
    elif rescale == "norm":
        left = kept.abs().sum()
        if left > 0:
            kept *= tau.abs().sum() / left
    return kept


@method(family="merging", paper="dare")
def dare(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: Annotated[float, Range(0, 1)] = 0.5,
    scale: Annotated[float, Range(0, 3)] = 0.3,
    rescale: Annotated[str, Choice("inverse", "norm", "none")] = "inverse",
    elect: Annotated[str, Choice("none", "mass", "count")] = "none",
    weights: Sequence[float] | None = None,
    seed: Annotated[int, Range(0, 999)] = 0,
) -> dict[str, Tensor]:
    """Merge task vectors of which a random part was dropped and the rest rescaled.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i, fine-tuned from it.
        density: share of entries kept, 1 − p.
        scale: λ, what multiplies the merged task vector.
        rescale: by 1/density (paper), to the old L1 norm (mergekit), or not at all.
        elect: "none" sums the task vectors; "mass" or "count" elects signs and averages those that agree (DARE-TIES);
            where the vote is even, the base stays.
        weights: one factor an expert; None means 1 for each.
        seed: of the random masks; a tensor's mask depends on its name, not on its place.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor.

    Source:
        Yu et al., 2023, arXiv 2311.03099, section 3.2.
    """
    factors = expert_weights(weights, len(experts))

    generators: dict[str, list[torch.Generator]] = {}

    def merge(name: str, theta_0: Tensor, thetas: list[Tensor]) -> Tensor:
        if name not in generators:
            generators[name] = [tensor_generator(seed, name, i) for i in range(len(thetas))]
        tau = torch.stack(
            [
                factor * drop_and_rescale(theta - theta_0, density, rescale, generator)
                for factor, theta, generator in zip(factors, thetas, generators[name], strict=True)
            ]
        ).reshape(len(thetas), -1)
        merged = tau.sum(dim=0) if elect == "none" else disjoint_merge(tau, elect_sign(tau, elect), factors, "mean")
        return theta_0 + scale * merged.reshape(theta_0.shape)

    # The old norm is the whole tensor's; otherwise each entry is treated alone.
    return tensor_by_tensor(base, experts, merge, elementwise=rescale != "norm")
