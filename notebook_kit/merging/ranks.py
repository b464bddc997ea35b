"""The k-th largest of values that come in pieces, exactly, in two walks over them.

A sample brackets the answer; one walk counts what lies above the bracket and keeps what lies inside; the answer is
selected among those few.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

SAMPLE = 1 << 16
EVERYTHING = (-float("inf"), float("inf"))


def kth_largest(pieces: Callable[[], Iterable[Tensor]], d: int, ks: Sequence[int]) -> list[float]:
    """The k-th largest of d values that come in pieces, for each k: exact, in two walks, a few of them in memory.

    Args:
        pieces: starts a walk over the values; asked again for each walk, so each walk must give the same.
        d: number of values, at least 1.
        ks: ranks, 1 is the largest.
    """
    brackets = [EVERYTHING]
    if d > 4 * SAMPLE:
        generator = torch.Generator().manual_seed(0)

        def take(m):
            return m[torch.randint(len(m), (SAMPLE * len(m) // d + 1,), generator=generator)]

        sample = torch.cat([take(m) for m in pieces() if len(m)])
        brackets = [bracket_of(sample, k / d) for k in ks]
    counted = tally(pieces, brackets)
    return [settle(pieces, k, *counted[i if len(brackets) > 1 else 0])[0] for i, k in enumerate(ks)]


def settle(pieces: Callable[[], Iterable[Tensor]], k: int, above: int, inside: Tensor) -> tuple[float, int, Tensor]:
    """The k-th largest, given how many exceed the bracket and those inside it; both again as they are at the end."""
    if not above < k <= above + len(inside):  # the sample misled us: look at everything
        above, inside = tally(pieces, [EVERYTHING])[0]
    return float(inside.kthvalue(len(inside) - (k - above) + 1).values), above, inside


def bracket_of(sample: Tensor, share: float) -> tuple[float, float]:
    """Two values that enclose the quantile with near certainty: of a sample, six standard errors apart."""
    sample = sample.sort(descending=True).values
    n = len(sample)
    slack = 6 * (share * (1 - share) / n) ** 0.5
    first, last = int((share - slack) * n), int((share + slack) * n) + 1
    low, high = EVERYTHING
    return (
        float(sample[last]) if last < n else low,
        float(sample[min(first, n - 1)]) if first > 0 else high,
    )


def tally(pieces: Callable[[], Iterable[Tensor]], brackets: Sequence[tuple[float, float]]) -> list[tuple[int, Tensor]]:
    """For each bracket: how many values exceed it, and those inside, both ends included."""
    above, inside = [0] * len(brackets), [[] for _ in brackets]
    for m in pieces():
        for i, (low, high) in enumerate(brackets):
            if (low, high) == EVERYTHING:
                inside[i].append(m.clone())
                continue
            above[i] += int(torch.count_nonzero(m > high))
            inside[i].append(m[(m >= low).logical_and_(m <= high)])
    return [(count, torch.cat(parts)) for count, parts in zip(above, inside, strict=True)]
