"""What PLeaS keeps apart: units paired, the worst pairs found, and a compute budget shared out over the layers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment, minimize
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.alignment.architectures import permutation_spec
from notebook_kit.alignment.conv_nets import STATISTICS, children_of
from notebook_kit.alignment.spec import Permutations, PermutationSpec, permute
from notebook_kit.alignment.split_layer import Split
from notebook_kit.alignment.weight_matching import weight_matching
from notebook_kit.models import MLP
from notebook_kit.weights import IncompatibleWeights

Layer = nn.Linear | nn.Conv2d


@dataclass
class Pair:
    """Two networks of one architecture as chains of layers, and what the layers see.

    Args:
        model_a: one network; sets the order of units.
        model_b: the other.
        spec: which axes move together.
        layers: names of the layers with weights, first to last.
        norms: name of a batch norm to the name of the layer whose units it stands on.
        spots: multiply-adds of each layer per weight (the number of places where a kernel is applied; 1 if linear).
        inputs: layer to (a's, b's) inputs, Float[rows, columns], convolutions as patches; empty without batches.
        outputs: layer to (a's, b's) outputs before the nonlinearity, Float[rows, units].
    """

    model_a: nn.Module
    model_b: nn.Module
    spec: PermutationSpec
    layers: list[str]
    norms: dict[str, str]
    spots: dict[str, int]
    inputs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    outputs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def sizes(self, name: str) -> tuple[int, int]:
        """(outputs, input columns) of a layer, a kernel's places left out."""
        return tuple(self.model_a.get_submodule(name).weight.shape[:2])

    def before(self, name: str) -> str | None:
        """The layer whose units this one reads."""
        place = self.layers.index(name)
        return self.layers[place - 1] if place else None


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


@torch.no_grad()
def read_pair(model_a: nn.Module, model_b: nn.Module, batches: Iterable | None, *, heads: str = "shared") -> Pair:
    """Check that two networks can be joined, and record what their layers see on the same inputs.

    Args:
        model_a: an MLP or nn.Sequential of linear and convolutional layers.
        model_b: of the same architecture.
        batches: inputs to both, or None.
        heads: "separate" lets the last layers differ in their number of outputs.

    Raises:
        IncompatibleWeights: different architectures.
        ValueError: an architecture without rules; NaN or Inf; no inputs where they are needed.
    """
    spec = permutation_spec(model_a)
    chain = _chain(model_a)
    layers = [name for name, layer in chain if isinstance(layer, Layer)]
    _check(model_a, model_b, layers, heads)
    norms, last = {}, ""
    for name, layer in chain:
        last = name if isinstance(layer, Layer) else last
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            norms[name] = last
        elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, whose mean over units changes with the width"
            )
    pair = Pair(model_a, model_b, spec, layers, norms, dict.fromkeys(layers, 1))
    if batches is not None:
        _record(pair, list(batches))
    elif any(isinstance(layer, nn.Conv2d) for _, layer in chain):
        raise ValueError("convolutions need batches: their multiply-adds depend on the size of the images (pleas)")
    return pair


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


# ---------------------------------------------------------------- reading the networks
def _chain(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if isinstance(model, MLP):
        return [(f"layers.{i}", layer) for i, layer in enumerate(model.layers)]
    if isinstance(model, nn.Sequential):
        return children_of(model)
    raise ValueError(
        f"pleas knows MLP and nn.Sequential of linear and convolutional layers, got {type(model).__name__}"
    )


def _check(model_a: nn.Module, model_b: nn.Module, layers: list[str], heads: str) -> None:
    if type(model_a) is not type(model_b):
        raise IncompatibleWeights(
            f"cannot join {type(model_a).__name__} and {type(model_b).__name__}: both must be of one architecture"
        )
    a, b = model_a.state_dict(), model_b.state_dict()
    odd = sorted(a.keys() ^ b.keys())
    if odd:
        raise IncompatibleWeights(f"{odd[0]!r} is only in {'model_a' if odd[0] in a else 'model_b'}")
    for key in a:
        heads_differ = (
            heads == "separate" and key.rpartition(".")[0] == layers[-1] and a[key].shape[1:] == b[key].shape[1:]
        )
        if a[key].shape != b[key].shape and not heads_differ:
            raise IncompatibleWeights(
                f"{key!r} has shape {list(a[key].shape)} in model_a and {list(b[key].shape)} in model_b: PLeaS pairs "
                "units one to one; networks of different width are for ot_fusion"
            )
        for owner, weights in (("model_a", a), ("model_b", b)):
            if weights[key].is_floating_point() and not torch.isfinite(weights[key]).all():
                raise ValueError(f"tensor {key!r} of {owner} holds NaN or Inf")


def _record(pair: Pair, batches: list) -> None:
    if not batches:
        raise ValueError("pleas needs at least one batch, got none (was a generator already used up?)")
    seen: list[dict[str, list]] = []
    for model in (pair.model_a, pair.model_b):
        rows: dict[str, list] = {name: [] for name in pair.layers}
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda layer, args, out, name=name, rows=rows: rows[name].append(_rows(layer, args[0], out))
            )
            for name in pair.layers
        ]
        was_training = model.training
        try:
            model.eval()
            for batch in batches:
                model(batch)
        finally:
            model.train(was_training)
            for handle in handles:
                handle.remove()
        seen.append({name: [torch.cat(parts) for parts in zip(*rows[name], strict=True)] for name in pair.layers})
    for name in pair.layers:
        (x_a, y_a), (x_b, y_b) = (one[name] for one in seen)
        for rows, owner in ((y_a, "model_a"), (y_b, "model_b")):
            if not torch.isfinite(rows).all():
                raise ValueError(f"the outputs of {name!r} of {owner} hold NaN or Inf on these batches")
        pair.inputs[name], pair.outputs[name] = (x_a, x_b), (y_a, y_b)
        pair.spots[name] = len(y_a) // sum(len(batch) for batch in batches)


def _rows(layer: Layer, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outputs as a linear layer would see them."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(f"{layer} is not understood: only zero padding given as numbers, and one group")
    shape = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
    patches = F.unfold(x, layer.kernel_size, **shape)
    return patches.movedim(1, 2).flatten(0, 1), out.movedim(1, -1).reshape(-1, out.shape[1])
