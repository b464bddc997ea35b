"""One number from a score that the user gave."""

import math
from collections.abc import Callable


def scored(score: Callable[..., float], *args) -> float:
    """Call a score and take its answer as a number; higher is better.

    Raises:
        ValueError: it is NaN, of which no one can say whether it is better.
    """
    value = float(score(*args))
    if math.isnan(value):
        raise ValueError(f"score ({getattr(score, '__name__', type(score).__name__)}) gave NaN for a merged model")
    return value
