"""PCB: parameters compete; score each parameter of each task, drop the losers, and weigh the rest by their score.

    θ = θ₀ + λ · Σ_i w_i S_i ⊙ τc_i / Σ_i S_i

S [experts, d]: scores in [0, 1] from balances inside a task and between tasks, 0 for all but the best `density` of each
task (`pcb_balance` has the formulas, `pcb_scores` shows them); τc_i: the task vector with its outliers clipped; w_i:
`weights`, one λ a task, which `pcb_search` finds with validation data; λ: `scale`. What no task keeps stays at θ₀.
Du et al., 2024, section 3; defaults follow the official code (duguodong7/pcb-merging), where `density` is the ratio r.
Few parameters: as the official code counts them, the largest magnitude of a tensor is clipped to the second largest
unless clip=0, and of 1/density entries or fewer none is kept; scope="model" is the default.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.contract import tensor_by_tensor
from notebook_kit.merging.pcb_balance import Levels, Scoring, levels_of
from notebook_kit.weights import Weights, check, expert_weights


def statistics(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: float = 0.1,
    clip: float = 1e-4,
    intra: str = "exp",
    inter: str = "sum",
    power: float | None = None,
    scope: str = "model",
    **_,
) -> dict[str, dict[str, list[Levels]]]:
    """What PCB must know of the whole model: quantiles of each task vector and of its scores."""
    scoring = Scoring(intra, inter, len(experts) if power is None else power)
    return {"levels": levels_of(base, experts, scoring, density=density, clip=clip, scope=scope)}


@method(family="merging", paper="pcb-merging", statistics=statistics)
def pcb(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: Annotated[float, Range(0, 1)] = 0.1,
    scale: Annotated[float, Range(0, 3)] = 1.0,
    clip: Annotated[float, Range(0, 0.05)] = 1e-4,
    intra: Annotated[str, Choice("exp", "softmax", "none")] = "exp",
    inter: Annotated[str, Choice("sum", "votes", "pairwise_softmax", "none")] = "sum",
    power: Annotated[float | None, Range(0, 64)] = None,
    scope: Annotated[str, Choice("model", "tensor")] = "model",
    weights: Sequence[float] | None = None,
    levels: dict[str, list[Levels]] | None = None,
) -> dict[str, Tensor]:
    """Merge by competition: each parameter of each task has its own score, and its own share.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i, fine-tuned from it.
        density: share of each task's parameters that is kept, the best by score.
        scale: λ, what multiplies the merged task vector.
        clip: magnitudes are clipped to this quantile and to 1 minus it.
        intra: importance inside the task: official code, paper's text, or off.
        inter: agreement with the other tasks: with their sum (official), with scale-free votes (official, vision), pair
            by pair (paper's text), or off. With both scores off nothing is dropped: a plain average.
        power: K in intra, how much a large entry outweighs a small one; None takes the number of experts.
        scope: where parameters compete: in the whole model (official) or in each tensor.
        weights: one λ a task; None means 1 for each.
        levels: from `statistics`, when the model is merged in parts or again with other weights; None computes them.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor.

    Source:
        Du et al., 2024, arXiv 2410.02396, section 3; duguodong7/pcb-merging.
    """
    check(base, experts)
    factors = expert_weights(weights, len(experts))
    scoring = Scoring(intra, inter, len(experts) if power is None else power)
    if levels is None:
        levels = levels_of(base, experts, scoring, density=density, clip=clip, scope=scope)

    def compete(name: str, theta_0: Tensor, thetas: list[Tensor]) -> Tensor:
        tau = torch.stack([theta - theta_0 for theta in thetas])
        merged, total = torch.zeros_like(theta_0), torch.zeros_like(theta_0)
        for i, (factor, at) in enumerate(zip(factors, levels[name], strict=True)):
            s = scoring.kept(tau, i, levels[name])
            clipped = tau[i].sign() * tau[i].abs().clamp_(at.low, at.high)
            merged += factor * s * clipped
            total += s
        return theta_0 + scale * merged / total.clamp_(min=1e-12)

    return tensor_by_tensor(base, experts, compete, elementwise=True)
