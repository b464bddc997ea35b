"""The k-th largest magnitude of a task vector, exactly, in one pass over memory.

A sample brackets the threshold; one pass counts what lies above the bracket and keeps what lies inside; the answer is
selected among those few. The task vector itself, as large as the model, never exists.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from notebook_kit.weights import Weights, at_least_float32, float_keys

CHUNK = 1 << 17  # elements: a few such buffers stay in a core's cache
SAMPLE = 1 << 16
EVERYTHING = (-float("inf"), float("inf"))


@dataclass(frozen=True)
class Trim:
    """What to keep of one expert: magnitudes from `threshold` up.

    Where more entries than wanted have exactly the threshold's magnitude, the first ones go: `drop[name]` says how many
    of them tensor `name` loses.
    """

    threshold: float
    drop: dict[str, int] = field(default_factory=dict)

    def just_under(self, dtype: torch.dtype) -> float:
        """The number next below the threshold: a strict comparison with it keeps the threshold itself."""
        kind = np.float64 if dtype == torch.float64 else np.float32
        return float(np.nextafter(kind(self.threshold), kind(-1)))


def trims(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: float,
    scope: str,
    count: Callable[[int], int] | None = None,
) -> list[dict[str, Trim]]:
    """For each expert and tensor, what the ⌊density · d⌋ largest magnitudes are.

    Args:
        base: state dict θ₀; may be lazy, one tensor is read at a time.
        experts: state dicts θ_i.
        density: share kept.
        scope: "model": d counts the whole model and layers compete; "tensor": each tensor keeps its share.
        count: how many of d are kept, where that is not ⌊density · d⌋.
    """
    count = count or (lambda d: int(density * d))
    names = without_tied(base)
    found = []
    for expert in experts:
        groups = [names] if scope == "model" else [[name] for name in names]
        trim_of = {}
        for group in groups:
            trim = _select(base, expert, group, count)
            trim_of |= dict.fromkeys(group, trim)
        found.append({name: _of_copy(trim_of, _first_of(base, trim_of, name), name) for name in float_keys(base)})
    return found


def chunks(name: str, base: Weights, experts: Sequence[Weights]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Walk one tensor in pieces: (where, θ₀ there [n], task vectors there [experts, n]); the buffer is reused."""
    whole = base[name].reshape(-1)
    thetas = [expert[name].reshape(-1) for expert in experts]
    kind = at_least_float32(whole[:0]).dtype
    buffer = torch.empty(len(experts), min(CHUNK, len(whole)), dtype=kind)
    for start in range(0, len(whole), CHUNK):
        where = slice(start, min(start + CHUNK, len(whole)))
        tau, theta_0 = buffer[:, : where.stop - start], whole[where].to(kind)
        for row, theta in zip(tau, thetas, strict=True):
            torch.sub(theta[where].to(kind), theta_0, out=row)
        yield where, theta_0, tau


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
        brackets = [_around(sample, k / d) for k in ks]
    counted = _count(pieces, brackets)
    return [_kth(pieces, k, *counted[i if len(brackets) > 1 else 0])[0] for i, k in enumerate(ks)]


def _select(base: Weights, expert: Weights, names: list[str], count: Callable[[int], int]) -> Trim:
    sizes = {name: base[name].numel() for name in names}
    d = sum(sizes.values())
    k = count(d)
    if k == 0:
        return Trim(float("inf"))
    if k == d:
        return Trim(0.0)
    bracket = _bracket(base, expert, sizes, k / d) if d > 4 * SAMPLE else EVERYTHING

    def magnitudes():
        return _magnitudes(base, expert, names)

    threshold, above, inside = _kth(magnitudes, k, *_count(magnitudes, [bracket])[0])
    at_least = above + int((inside >= threshold).sum())
    if at_least == k or threshold == 0:
        return Trim(threshold)
    return Trim(threshold, _drop_first(base, expert, names, threshold, surplus=at_least - k))


def _kth(pieces: Callable[[], Iterable[Tensor]], k: int, above: int, inside: Tensor) -> tuple[float, int, Tensor]:
    if not above < k <= above + len(inside):  # the sample misled us: look at everything
        above, inside = _count(pieces, [EVERYTHING])[0]
    return float(inside.kthvalue(len(inside) - (k - above) + 1).values), above, inside


def _bracket(base: Weights, expert: Weights, sizes: dict[str, int], density: float) -> tuple[float, float]:
    """Two magnitudes that enclose the threshold with near certainty: sample quantiles, six standard errors apart."""
    generator = torch.Generator().manual_seed(0)
    total, parts = sum(sizes.values()), []
    for name, size in sizes.items():
        if size == 0:
            continue
        take = torch.randint(size, (SAMPLE * size // total + 1,), generator=generator)
        theta_0, theta = (at_least_float32(weights[name]).reshape(-1)[take] for weights in (base, expert))
        parts.append((theta - theta_0).abs())
    return _around(torch.cat(parts), density)


def _around(sample: Tensor, share: float) -> tuple[float, float]:
    sample = sample.sort(descending=True).values
    n = len(sample)
    slack = 6 * (share * (1 - share) / n) ** 0.5
    first, last = int((share - slack) * n), int((share + slack) * n) + 1
    low, high = EVERYTHING
    return (
        float(sample[last]) if last < n else low,
        float(sample[min(first, n - 1)]) if first > 0 else high,
    )


def _magnitudes(base: Weights, expert: Weights, names: list[str]) -> Iterator[Tensor]:
    for name in names:
        for _, _, tau in chunks(name, base, [expert]):
            yield tau[0].abs_()


def _count(pieces: Callable[[], Iterable[Tensor]], brackets: Sequence[tuple[float, float]]) -> list[tuple[int, Tensor]]:
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


def _drop_first(base: Weights, expert: Weights, names: list[str], threshold: float, surplus: int) -> dict[str, int]:
    """Spread the surplus over the first tied entries, by name: how a dict or a file orders its tensors is no matter."""
    drop = {}
    for name in sorted(names):
        if surplus == 0:
            break
        tied = sum(int((m == threshold).sum()) for m in _magnitudes(base, expert, [name]))
        if tied:
            drop[name] = min(surplus, tied)
            surplus -= drop[name]
    return drop


def _identity(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def without_tied(base: Weights) -> list[str]:
    """Tied tensors (embedding and head) count once."""
    first: dict[tuple, str] = {}
    for name in float_keys(base):
        # Only a dict holds its tensors: of a lazy mapping, two that were read in turn may share an address.
        held = isinstance(base, dict) and base[name].numel()
        first.setdefault(_identity(base[name]) if held else (name,), name)
    return list(first.values())


def _first_of(base: Weights, names: Iterable[str], name: str) -> str:
    if name in names:
        return name
    return next(other for other in names if _identity(base[other]) == _identity(base[name]))


def _of_copy(trim_of: dict[str, Trim], first: str, name: str) -> Trim:
    """A tied copy is trimmed as the first of its kind, so that both stay equal."""
    trim = trim_of[first]
    return trim if name == first or first not in trim.drop else Trim(trim.threshold, {name: trim.drop[first]})
