"""What is kept of each expert: the largest magnitudes of its task vector, of which exactly as many as were asked for.

The threshold is the k-th largest magnitude (`ranks`), found in one pass over memory. The task vector itself, as
large as the model, never exists.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from notebook_kit.merging import ranks
from notebook_kit.weights import Weights, at_least_float32, float_keys

CHUNK = 1 << 17  # elements: a few such buffers stay in a core's cache


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
    buffer = at_least_float32(whole[:0]).new_empty(len(experts), min(CHUNK, len(whole)))
    for start in range(0, len(whole), CHUNK):
        where = slice(start, min(start + CHUNK, len(whole)))
        tau, theta_0 = buffer[:, : where.stop - start], whole[where].to(buffer.dtype)
        for row, theta in zip(tau, thetas, strict=True):
            torch.sub(theta[where].to(buffer.dtype), theta_0, out=row)
        yield where, theta_0, tau


def _select(base: Weights, expert: Weights, names: list[str], count: Callable[[int], int]) -> Trim:
    sizes = {name: base[name].numel() for name in names}
    d = sum(sizes.values())
    k = count(d)
    if k == 0:
        return Trim(float("inf"))
    if k == d:
        return Trim(0.0)
    bracket = _bracket(base, expert, sizes, k / d) if d > 4 * ranks.SAMPLE else ranks.EVERYTHING

    def magnitudes():
        return _magnitudes(base, expert, names)

    threshold, above, inside = ranks.settle(magnitudes, k, *ranks.tally(magnitudes, [bracket])[0])
    at_least = above + int((inside >= threshold).sum())
    if at_least == k or threshold == 0:
        return Trim(threshold)
    return Trim(threshold, _drop_first(base, expert, names, threshold, surplus=at_least - k))


def _bracket(base: Weights, expert: Weights, sizes: dict[str, int], density: float) -> tuple[float, float]:
    """Two magnitudes that enclose the threshold with near certainty: sample quantiles, six standard errors apart."""
    generator = torch.Generator().manual_seed(0)
    total, parts = sum(sizes.values()), []
    for name, size in sizes.items():
        if size == 0:
            continue
        take = torch.randint(size, (ranks.SAMPLE * size // total + 1,), generator=generator)
        theta_0, theta = (at_least_float32(weights[name]).reshape(-1)[take] for weights in (base, expert))
        parts.append((theta - theta_0).abs())
    return ranks.bracket_of(torch.cat(parts), density)


def _magnitudes(base: Weights, expert: Weights, names: list[str]) -> Iterator[Tensor]:
    for name in names:
        for _, _, tau in chunks(name, base, [expert]):
            yield tau[0].abs_()


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
