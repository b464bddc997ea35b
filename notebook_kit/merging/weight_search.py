"""Which expert should have how much say? Try many answers, and ask a validation score."""

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import torch

from notebook_kit.hyperparameters import Range, hyperparameters, validate
from notebook_kit.merging.scored import scored
from notebook_kit.weights import Weights


class WeightSearch(NamedTuple):
    """What a search found: the best weights, their score, and every (weights, score) that was tried, in order."""

    weights: list[float]
    score: float
    trials: list[tuple[list[float], float]]


def search_weights(
    merge: Callable,
    base: Weights,
    experts: Sequence[Weights],
    *,
    score: Callable[[dict], float],
    n_points: Annotated[int, Range(2, 100_000)] = 51,
    seed: Annotated[int, Range(0, 999)] = 0,
    **settings,
) -> WeightSearch:
    """Search the experts' `weights` of a merge.

    Two experts: a grid (λ, 1 − λ) from λ = 1 down to 0. More: draws from a flat Dirichlet distribution, which is
    uniform over all shares that sum to 1.

    Args:
        merge: a merge that takes `weights`, such as `fisher` or `average`.
        base: state dict θ₀.
        experts: two or more state dicts.
        score: of a merged state dict, higher is better; use validation data.
        n_points: how many weights are tried.
        seed: of the draws.
        settings: more arguments of `merge`, such as `fishers`.

    Returns:
        WeightSearch: the best weights (of equally good ones the first), their score, and all trials.

    Raises:
        ValueError: fewer than two experts, a setting out of range, or a score that is NaN.

    Source:
        Matena and Raffel, 2021, arXiv 2111.09832, section 4; mmatena/model_merging, merging.py.
    """
    validate(hyperparameters(search_weights), {"n_points": n_points, "seed": seed})
    if len(experts) < 2:
        raise ValueError(f"there is nothing to weigh: search_weights needs two experts or more, got {len(experts)}")
    if len(experts) == 2:
        shares = [[1 - i / (n_points - 1), i / (n_points - 1)] for i in range(n_points)]
    else:
        generator = torch.Generator().manual_seed(seed)
        # Exponential draws, divided by their sum, are Dirichlet(1).
        draws = -torch.rand(n_points, len(experts), generator=generator, dtype=torch.float64).clamp(min=1e-300).log()
        shares = (draws / draws.sum(dim=1, keepdim=True)).tolist()
    trials = [(weights, scored(score, merge(base, experts, weights=weights, **settings))) for weights in shares]
    weights, best = max(trials, key=lambda trial: trial[1])
    return WeightSearch(weights, best, trials)
