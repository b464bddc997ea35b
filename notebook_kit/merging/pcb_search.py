"""One λ for each task of PCB, found by evolution: CMA-ES proposes, a validation score decides.

CMA-ES draws candidates from a normal distribution around the best so far and learns its covariance (Hansen, 2016,
arXiv 1604.00772). Du et al., 2024, section 3.3, search with nevergrad, starting from 1: bounds 0.8 to 1.3 and 100
evaluations for vision, 0.5 to 3 and 200 for language (on the test split; use validation data).
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

from notebook_kit.hyperparameters import Range, hyperparameters, validate
from notebook_kit.merging.pcb import pcb, statistics
from notebook_kit.weights import Weights, check


class PcbSearch(NamedTuple):
    """What a search found: the best weights, their score, the best score after each evaluation, and every trial."""

    weights: list[float]
    score: float
    history: list[float]
    trials: list[tuple[list[float], float]]


def pcb_search(
    base: Weights,
    experts: Sequence[Weights],
    score: Callable[[dict], float],
    *,
    budget: Annotated[int, Range(1, 100_000)] = 100,
    bounds: tuple[float, float] = (0.5, 3.0),
    seed: Annotated[int, Range(0, 999)] = 0,
    **settings,
) -> PcbSearch:
    """Search `pcb`'s `weights`, one λ a task, for the best score of the merged model.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i.
        score: of a merged state dict, higher is better; use validation data.
        budget: how many merges are scored; the first has all weights 1.
        bounds: least and largest λ, on both sides of 1.
        seed: of the draws.
        settings: more arguments of `pcb`, such as `density`. Scores are computed once: they do not depend on λ.

    Returns:
        PcbSearch: the best weights, never worse than all ones; `history` never falls.

    Raises:
        ValueError: bounds that do not enclose 1, `weights` among the settings, or a setting out of range.

    Source:
        Du et al., 2024, arXiv 2410.02396, section 3.3.
    """
    import cma
    import numpy as np

    validate(hyperparameters(pcb_search), {"budget": budget, "seed": seed})
    low, high = bounds
    if not low < 1 < high:
        raise ValueError(f"bounds must enclose 1, where the search starts, got {bounds} (pcb_search)")
    if "weights" in settings:
        raise ValueError("weights is what pcb_search looks for: leave it out (pcb_search)")
    check(base, experts)
    schema = hyperparameters(pcb)
    validate(schema, {name: value for name, value in settings.items() if name in schema})
    settings |= statistics(base, experts, **settings)
    trials: list[tuple[list[float], float]] = []

    def cost(weights) -> float:
        found = float(score(pcb(base, experts, weights=weights, **settings)))
        trials.append((weights, found))
        return math.inf if math.isnan(found) else -found

    cost([1.0] * len(experts))
    # cma would seed numpy's global generator; its own draws, and no others, come from `draw`.
    draw = np.random.default_rng(seed).standard_normal
    options = {"bounds": [low, high], "seed": math.nan, "randn": lambda *shape: draw(shape), "verbose": -9}
    # cma fails in one dimension: a second one idles beside a lone expert.
    evolution = cma.CMAEvolutionStrategy([1.0] * max(2, len(experts)), (high - low) / 6, options)
    while len(trials) < budget and not evolution.stop():
        candidates = evolution.ask()
        costs = [cost([float(w) for w in x[: len(experts)]]) for x in candidates[: budget - len(trials)]]
        if len(costs) == len(candidates):
            evolution.tell(candidates, costs)

    scores = [found if found == found else -math.inf for _, found in trials]
    history = [max(scores[: i + 1]) for i in range(len(scores))]
    weights, best = trials[scores.index(history[-1])]
    return PcbSearch(weights, best, history, trials)
