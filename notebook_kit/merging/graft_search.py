"""How few edits of an expert will do? Graft fewer and fewer, and ask a validation score."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from notebook_kit.merging.graft import fast_fisher_graft
from notebook_kit.merging.scored import scored
from notebook_kit.weights import Weights


class GraftSearch(NamedTuple):
    """The smallest density that keeps the expert's score, the grafted score there, and all (density, score) tried."""

    density: float
    score: float
    trials: list[tuple[float, float]]


def graft_density(
    base: Weights,
    expert: Weights,
    *,
    moments: Weights,
    score: Callable[[dict], float],
    tolerance: float = 0.01,
    densities: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.85),
    **settings,
) -> GraftSearch:
    """Search the smallest density at which a grafted expert still does what the expert does.

    Args:
        base: state dict θ₀.
        expert: state dict θ₁.
        moments: v of this expert.
        score: of a state dict on the expert's own task, higher is better; use validation data.
        tolerance: how much of the expert's score may be lost, in the score's unit.
        densities: tried from the smallest up; the search stops at the first that will do. 1, the expert itself, always
            will.
        settings: more arguments of `fast_fisher_graft`.

    Returns:
        GraftSearch: density, its score, and the trials up to it.

    Raises:
        ValueError: a score is NaN, or as `fast_fisher_graft`.
    """
    whole = scored(score, expert)
    trials = []
    for density in sorted(densities):
        grafted = fast_fisher_graft(base, [expert], moments=[moments], density=density, **settings)
        trials.append((density, scored(score, grafted)))
        if trials[-1][1] >= whole - tolerance:
            return GraftSearch(*trials[-1], trials)
    trials.append((1.0, whole))
    return GraftSearch(*trials[-1], trials)
