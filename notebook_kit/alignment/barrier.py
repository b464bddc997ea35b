"""The barrier: how far the straight line between two networks dips below its ends."""

from collections.abc import Callable
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.weights import Weights, at_least_float32, check


def interpolate(a: Weights, b: Weights, t: float) -> dict[str, Tensor]:
    """(1 − t)·a + t·b, with a's dtypes; what is not floating point comes from a.

    Args:
        a: state dict at t = 0.
        b: state dict at t = 1, of the same keys and shapes.
        t: place on the line.
    """
    return {
        key: torch.lerp(at_least_float32(w), at_least_float32(b[key]), t).to(w.dtype) if w.is_floating_point() else w
        for key, w in a.items()
    }


def path_scores(
    score: Callable[[Weights], float], a: Weights, b: Weights, *, points: Annotated[int, Range(3, 101)] = 11
) -> tuple[Float[Tensor, " points"], Float[Tensor, " points"]]:
    """Score the networks on the straight line from a to b.

    Args:
        score: state dict to a number, higher is better (for a loss, its negative).
        a: state dict at t = 0.
        b: state dict at t = 1.
        points: places on the line, both ends included.

    Returns:
        (t, score at t).

    Raises:
        IncompatibleWeights: keys or shapes differ.
    """
    check(a, [b], names=["b"])
    places = torch.linspace(0, 1, points, dtype=torch.float64)
    values = [float(score(interpolate(a, b, float(t)))) for t in places]
    return places, torch.tensor(values, dtype=torch.float64)


@method(family="alignment", paper="git-re-basin")
def barrier(
    score: Callable[[Weights], float], a: Weights, b: Weights, *, points: Annotated[int, Range(3, 101)] = 11
) -> float:
    """Measure how much worse the straight line between two networks gets than its ends.

        barrier = max_t [ (1 − t)·s(a) + t·s(b) − s((1 − t)·a + t·b) ]

    With the log-likelihood as score s this is the paper's loss barrier.

    Args:
        score: state dict to a number, higher is better (for a loss, its negative).
        a: one state dict.
        b: the other, of the same keys and shapes.
        points: places on the line, both ends included.

    Returns:
        The barrier in units of the score; 0 when the line never dips below the chord.

    Raises:
        IncompatibleWeights: keys or shapes differ.

    Source: Ainsworth, Hayase and Srinivasa (2022), definition 2.1 (there with the mean of the ends as baseline in
        code, and the chord in Frankle et al. (2020); they agree at the midpoint).
    """
    t, values = path_scores(score, a, b, points=points)
    return float(((1 - t) * values[0] + t * values[-1] - values).max().clamp(min=0))
