"""What PLeaS keeps apart: units paired, the worst pairs found, and a compute budget shared out over the layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment, minimize
from torch import Tensor

from notebook_kit.alignment.conv_nets import STATISTICS
from notebook_kit.alignment.permutations import Permutations, permute
from notebook_kit.alignment.pleas_pair import Pair
from notebook_kit.alignment.split_layer import Split
from notebook_kit.alignment.weight_matching import weight_matching


@dataclass(frozen=True)
class PleasPlan:
    """Which units are merged in pairs and which are kept of both networks.

    Args:
        permutations: layer to index vector: unit i of a and unit p[i] of b are a pair.
        merged: layer to the pairs that are merged, as places in a's order.
        separate: layer to the pairs of which both units are kept.
        cost: multiply-adds of the result over those of one network; in [1, 2].
    """

    permutations: Permutations
    merged: dict[str, Int[Tensor, " k"]]
    separate: dict[str, Int[Tensor, " s"]]
    cost: float

    @property
    def widths(self) -> dict[str, Split]:
        """Layer to its numbers of units."""
        return {
            name: Split(len(k), len(self.separate[name]), len(self.separate[name])) for name, k in self.merged.items()
        }


def plan_pleas(
    pair: Pair,
    *,
    budget: float,
    align: str,
    allocation: str,
    heads: str,
    score: Callable[[PleasPlan], float] | None = None,
) -> PleasPlan:
    """Pair the units, rank the pairs, and keep the worst apart as far as the budget goes.

    Args:
        pair: from `read_pair`.
        budget: multiply-adds of the result over those of one network, 1 to 2.
        align: "activation", "weight" or "none".
        allocation: "uniform", "late" or "score".
        heads: "separate" leaves the last layer out of the budget.
        score: of a plan, for "score".
    """
    permutations, likeness = _match(pair, align)
    hidden = pair.layers[:-1]

    def cost(shares: Sequence[float]) -> float:
        return cost_of(pair, heads, dict(zip(hidden, shares, strict=True)))

    def plan(shares: Sequence[float]) -> PleasPlan:
        sizes = [len(likeness[name]) for name in hidden]
        kept = [int(share * n + 1e-9) for share, n in zip(shares, sizes, strict=True)]
        # Whole units: down, and then up again where the budget has room.
        for i in sorted(range(len(hidden)), key=lambda i: kept[i] - shares[i] * sizes[i]):
            more = [k + (i == j) for j, k in enumerate(kept)]
            if kept[i] < shares[i] * sizes[i] and cost([k / n for k, n in zip(more, sizes, strict=True)]) <= budget:
                kept = more
        merged, separate = {}, {}
        for name, n, s in zip(hidden, sizes, kept, strict=True):
            order = torch.argsort(likeness[name], descending=True, stable=True)
            merged[name], separate[name] = order[: n - s].sort().values, order[n - s :].sort().values
        return PleasPlan(permutations, merged, separate, cost([s / n for s, n in zip(kept, sizes, strict=True)]))

    n = len(hidden)
    if budget >= 2:
        return plan([1.0] * n)
    if allocation == "score":
        return plan(_by_score(score, plan, cost, budget, n))

    def path(t: float) -> list[float]:
        """From all merged (0) to all apart (1): everywhere alike, or the last layer first."""
        return [min(max(t * n - (n - 1 - i), 0.0), 1.0) if allocation == "late" else t for i in range(n)]

    return plan(path(_largest(lambda t: cost(path(t)), budget)))


def cost_of(pair: Pair, heads: str, shares: dict[str, float]) -> float:
    """Multiply-adds over those of one network: a layer's own times (1 + r_in)(1 + r_out) − 2·r_in·r_out, added up.

    Args:
        pair: gives the layers.
        heads: "separate" leaves the last layer out.
        shares: hidden layer to the share r of its pairs that is kept apart.
    """
    total = base = 0.0
    for name in pair.layers[:-1] if heads == "separate" else pair.layers:
        r_in, r_out = shares.get(pair.before(name), 0.0), shares.get(name, 0.0)
        own = pair.model_a.get_submodule(name).weight.numel() * pair.spots[name]
        total, base = total + own * ((1 + r_in) * (1 + r_out) - 2 * r_in * r_out), base + own
    return total / base


# ---------------------------------------------------------------- matching
def _match(pair: Pair, align: str) -> tuple[Permutations, dict[str, Float[Tensor, " n"]]]:
    """Pairs, and minus the distance of each."""
    a, b = pair.model_a.state_dict(), pair.model_b.state_dict()
    found, likeness = Permutations(), {}
    if align == "activation":
        for name, reader in zip(pair.layers[:-1], pair.layers[1:], strict=True):
            n = pair.sizes(name)[0]
            # What the next layer reads; a channel's patches count as more samples of it.
            z_a, z_b = (x.unflatten(1, (n, -1)).movedim(2, 1).flatten(0, 1).double() for x in pair.inputs[reader])
            distance = torch.cdist(z_a.T, z_b.T).cpu()
            index = torch.from_numpy(linear_sum_assignment(distance.numpy())[1])
            found[name], likeness[name] = index, -distance[torch.arange(n), index]
        return found, likeness
    found = Permutations({name: torch.arange(pair.sizes(name)[0]) for name in pair.layers[:-1]})
    if align == "weight":
        found = weight_matching(pair.spec, a, {**b, **{k: a[k] for k in a if a[k].shape != b[k].shape}})
    moved = permute(pair.spec, {name: found[name] for name in pair.layers[:-1]}, b)
    for name in pair.layers[:-1]:
        n, total = pair.sizes(name)[0], 0.0
        for key, axis, part in pair.spec.uses[name]:
            if a[key].shape == moved[key].shape and not key.endswith(STATISTICS):
                d = part.view((a[key] - moved[key]).double(), axis, n).movedim(axis + 1, 0)
                total = total + d.reshape(n, -1).square().sum(1)
        likeness[name] = -total.sqrt().cpu()
    return found, likeness


# ---------------------------------------------------------------- the budget
def _largest(cost: Callable[[float], float], budget: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def _by_score(score, plan, cost, budget: float, n: int) -> list[float]:
    """Maximise Σ w_i r_i within the budget; w_i says what keeping layer i apart brings."""

    def rate(shares: np.ndarray) -> float:
        return score(plan(shares.tolist()))

    one = np.eye(n)
    alone = np.array([rate(one[i]) for i in range(n)]) - rate(np.zeros(n))  # only layer i apart
    without = np.array([rate(1 - one[i]) for i in range(n)]) - rate(np.ones(n))  # only layer i merged
    w = np.maximum(alone * (2 - budget) - without * (budget - 1), 1e-6)  # what is left is spent, too
    start = np.full(n, _largest(lambda t: cost([t] * n), budget))
    found = minimize(
        lambda r: -(w @ r) / w.sum(),
        start,
        jac=lambda r: -w / w.sum(),
        bounds=[(0, 1)] * n,
        constraints={"type": "ineq", "fun": lambda r: budget - cost(np.clip(r, 0, 1).tolist())},
        method="SLSQP",
    )
    shares = np.clip(found.x, 0, 1)
    # The solver stays within its tolerance of the budget; the result stays within the budget.
    return (shares * _largest(lambda t: cost((shares * t).tolist()), budget)).tolist()
