"""Numbers behind merges of checkpoints and runs: weights and losses, Model Stock's geometry, lengths on an arc."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging import average, checkpoint_weights, karcher, metrics_weighted, select_checkpoints, slerp
from notebook_kit.merging.geometry import mean_cosine
from notebook_kit.merging.model_stock import interpolation
from notebook_kit.weights import Weights, at_least_float32, check, float_keys

Group = tuple[Weights, Sequence[Weights]]


@dataclass(frozen=True)
class PenaltyView:
    """One way to weigh a run's checkpoints, and what comes of it.

    Args:
        steps: of the checkpoints, Int[n].
        losses: mean training loss before each, Float[n].
        weights: of each, 0 for those not used, Float[n].
        penalties: where the curve was measured, Float[points].
        curve: the measure of the merged model there, Float[points].
        penalty: the one chosen.
        value: the measure there.
        references: name to the measure of other choices: the last checkpoint, the uniform average.
    """

    steps: np.ndarray
    losses: np.ndarray
    weights: np.ndarray
    penalties: np.ndarray
    curve: np.ndarray
    penalty: float
    value: float
    references: dict[str, float]


def penalty_view(
    checkpoints: Sequence[Weights],
    losses: Sequence[float],
    steps: Sequence[int],
    measure: Callable[[dict[str, Tensor]], float],
    *,
    metric: Annotated[str, Choice("loss", "steps")] = "loss",
    form: Annotated[str, Choice("linear", "power", "softmax")] = "linear",
    penalty: Annotated[float, Range(0, 10)] = 1.0,
    n_last: Annotated[int, Range(1, 100)] = 10,
    stride: Annotated[int, Range(1, 20)] = 1,
    space: Annotated[str, Choice("factors", "product")] = "factors",
    points: int = 7,
) -> PenaltyView:
    """Look at one way to weigh a run's checkpoints.

    Args:
        checkpoints: in the order of training.
        losses: mean training loss before each.
        steps: of each.
        measure: of a merged model, such as its loss on test data.
        metric: as `metrics_weighted`.
        form: as `metrics_weighted`.
        penalty: as `metrics_weighted`.
        n_last: as `metrics_weighted`.
        stride: as `metrics_weighted`.
        space: as `metrics_weighted`.
        points: of the curve.
    """
    metrics = losses if metric == "loss" else steps
    how = {"metrics": metrics, "metric": metric, "form": form, "n_last": n_last, "stride": stride, "space": space}

    def at(p):
        return float(measure(metrics_weighted(checkpoints[-1], checkpoints, penalty=float(p), **how)))

    chosen = select_checkpoints(len(checkpoints), n_last=n_last, stride=stride)
    weights = np.zeros(len(checkpoints))
    weights[chosen] = checkpoint_weights([metrics[c] for c in chosen], metric=metric, form=form, penalty=penalty)
    penalties = np.linspace(0, max(penalty, 2.0 if form == "linear" else 6.0), points)
    curve = np.array([at(p) for p in penalties])
    references = {"last checkpoint": float(measure(dict(checkpoints[-1]))), "uniform average": curve[0]}
    return PenaltyView(
        np.asarray(steps), np.asarray(losses), weights, penalties, curve, penalty, at(penalty), references
    )


def task_grams(base: Weights, experts: Sequence[Weights]) -> dict[str, Tensor]:
    """Inner products of the experts' task vectors, Float[K, K] for each floating tensor with more than one entry."""
    check(base, experts)
    found = {}
    for name in float_keys(base):
        if base[name].numel() > 1:
            tau = torch.stack([at_least_float32(e[name]) - at_least_float32(base[name]) for e in experts]).flatten(1)
            found[name] = (tau @ tau.T).double()
    return found


def stock_table(base: Weights, experts: Sequence[Weights]) -> pd.DataFrame:
    """How far Model Stock goes in each tensor.

    Args:
        base: state dict.
        experts: two or more.

    Returns:
        DataFrame: tensor, cosine (mean over pairs of task vectors), t (share of the mean).
    """
    rows = []
    for name, gram in task_grams(base, experts).items():
        cosine = float(mean_cosine(gram))
        rows.append({"tensor": name, "cosine": cosine, "t": float(interpolation(cosine, len(experts)))})
    return pd.DataFrame(rows, columns=["tensor", "cosine", "t"])


@dataclass(frozen=True)
class StockView:
    """One tensor's experts, seen from the line between base and mean.

    Args:
        tensor: its name.
        experts: along the line and away from it, Float[n, 2], in units of the mean's length.
        centre: of all other experts, likewise, or None where there is none.
        t: Model Stock's place on the line; the mean is at 1.
        cosines: cos θ of every tensor.
        shares: t of every tensor.
        tensors: their names.
    """

    tensor: str
    experts: np.ndarray
    centre: np.ndarray | None
    t: float
    cosines: np.ndarray
    shares: np.ndarray
    tensors: tuple[str, ...]


def stock_view(
    groups: Mapping[str, Group],
    *,
    group: Annotated[str, Choice("one task", "eight tasks")] = "one task",
    n_experts: Annotated[int, Range(2, 8)] = 2,
    layer: Annotated[int, Range(0, 99)] = 0,
) -> StockView:
    """Look at Model Stock in one tensor: where experts, their mean and the merged one lie.

    Args:
        groups: name to (base, experts).
        group: which of them.
        n_experts: how many experts are merged, the first ones; the others show where the centre is.
        layer: number of the tensor.

    Raises:
        ValueError: no such group, or fewer experts than asked for.
    """
    if group not in groups:
        raise ValueError(f"group must be one of {', '.join(groups)}, got {group!r} (stock_view)")
    base, experts = groups[group]
    if n_experts > len(experts):
        raise ValueError(f"{group!r} has {len(experts)} experts, n_experts is {n_experts} (stock_view)")
    table, grams = stock_table(base, experts[:n_experts]), task_grams(base, experts)
    row = table.iloc[min(layer, len(table) - 1)]
    gram = grams[row["tensor"]].numpy()
    inside = np.zeros(len(experts))
    inside[:n_experts] = 1 / n_experts
    length = np.sqrt(inside @ gram @ inside) or 1.0
    places = [_from_the_line(np.eye(len(experts))[i], inside, gram, length) for i in range(n_experts)]
    signs = np.array([(-1) ** i for i in range(n_experts)])
    places = np.array(places) * np.stack([np.ones(n_experts), signs], axis=1)
    others, centre = len(experts) - n_experts, None
    if others:
        outside = np.where(inside > 0, 0, 1 / others)
        centre = _from_the_line(outside, inside, gram, length)
    columns = [table[name].to_numpy() for name in ("cosine", "t")]
    return StockView(row["tensor"], places, centre, float(row["t"]), *columns, tuple(table["tensor"]))


def _from_the_line(combination: np.ndarray, line: np.ndarray, gram: np.ndarray, length: float) -> np.ndarray:
    """A combination of task vectors: how far along the line, how far from it; in units of the line's length."""
    along = combination @ gram @ line / length
    away = np.sqrt(max(0.0, combination @ gram @ combination - along**2))
    return np.array([along, away]) / length


def length_table(base: Weights, experts: Sequence[Weights]) -> pd.DataFrame:
    """How long merged tensors are, against the mean length of the experts' tensors.

    Args:
        base: state dict that sets keys and shapes.
        experts: state dicts.

    Returns:
        DataFrame: tensor, cosine (mean over pairs of experts), average, karcher (1 is the experts' mean length).
    """
    merged = {"average": average(base, experts), "karcher": karcher(base, experts)}
    rows = []
    for name in float_keys(base):
        flat = torch.stack([at_least_float32(expert[name]).reshape(-1) for expert in experts])
        mean = float(flat.norm(dim=1).mean())
        if flat.shape[1] > 1 and mean > 0:
            ratios = {how: float(at_least_float32(weights[name]).norm()) / mean for how, weights in merged.items()}
            cosine = float(mean_cosine((flat @ flat.T).double())) if len(experts) > 1 else 1.0
            rows.append({"tensor": name, "cosine": cosine, **ratios})
    return pd.DataFrame(rows, columns=["tensor", "cosine", "average", "karcher"])


@dataclass(frozen=True)
class LengthView:
    """Lengths on the way from one expert to another.

    Args:
        tensor: its name.
        t: places on the way, Float[points].
        lengths: rule to Float[points]; 1 is the mean length of the two.
        at: the place chosen.
        table: from `length_table`, all experts.
    """

    tensor: str
    t: np.ndarray
    lengths: dict[str, np.ndarray]
    at: float
    table: pd.DataFrame


def length_view(
    groups: Mapping[str, Group],
    *,
    group: Annotated[str, Choice("trained apart", "one base")] = "trained apart",
    t: Annotated[float, Range(0, 1)] = 0.5,
    layer: Annotated[int, Range(0, 99)] = 0,
) -> LengthView:
    """Walk from the first expert of a group to its second, straight, along the arc, and by weighted Karcher means.

    Args:
        groups: name to (base, experts).
        group: which of them.
        t: place on the way.
        layer: number of the tensor.

    Raises:
        ValueError: no such group.
    """
    if group not in groups:
        raise ValueError(f"group must be one of {', '.join(groups)}, got {group!r} (length_view)")
    base, experts = groups[group]
    table = length_table(base, experts)
    name = table["tensor"].iloc[min(layer, len(table) - 1)]
    one, two = ({name: weights[name]} for weights in (base, experts[0])), {name: experts[1][name]}
    base_of, first = one
    pair, places = [first, two], np.linspace(0, 1, 21)
    mean = float(sum(at_least_float32(weights[name]).norm() for weights in pair)) / 2
    rules = {
        "straight line": lambda s: average(base_of, pair, weights=[1 - s, s]),
        "SLERP": lambda s: slerp(base_of, pair, t=s),
        "Karcher": lambda s: karcher(base_of, pair, weights=[1 - s, s]),
    }
    lengths = {
        rule: np.array([float(at_least_float32(merge(float(s))[name]).norm()) / mean for s in places])
        for rule, merge in rules.items()
    }
    return LengthView(name, places, lengths, t, table)
