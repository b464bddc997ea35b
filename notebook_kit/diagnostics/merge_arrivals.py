"""Numbers about experts that arrive one after another: what tasks keep, and what is projected away."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
from jaxtyping import Float

from notebook_kit.diagnostics.merge_subspaces import matrix_of
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging import Opcm, continual
from notebook_kit.merging.matrices import thin_svd
from notebook_kit.merging.opcm import order_of
from notebook_kit.merging.opcm_project import split_rank
from notebook_kit.weights import Weights, at_least_float32

Score = Callable[[Weights], float]
ORDER_SEEDS = 1000


def arrivals(base: Weights, experts: Sequence[Weights], *, how: str = "opcm", **settings) -> Iterator[dict]:
    """Yield the merge after each expert: by OPCM, or by a continual baseline.

    Args:
        base: state dict θ₀.
        experts: in the order of their arrival.
        how: "opcm", or a rule of `merging.continual`.
        settings: of `Opcm` or `continual`.
    """
    if how != "opcm":
        yield from continual(base, experts, rule=how, **settings)
        return
    merge = Opcm(base, **settings)
    for expert in experts:
        merge.add(expert)
        yield merge.merged


def arrival_table(
    base: Weights, experts: Sequence[Weights], names: Sequence[str], score: Score, **settings
) -> pd.DataFrame:
    """Each task's score after each arrival.

    Args:
        base: state dict θ₀.
        experts: in the order of their arrival.
        names: their tasks, keys of `score(weights).tasks`.
        score: state dict to a `Score` with one figure a task; higher is better.
        settings: of `arrivals`.

    Returns:
        DataFrame: one row a task, in the order of arrival; columns 1, 2, ...: the number of experts merged.
    """
    columns = {t: score(merged).tasks for t, merged in enumerate(arrivals(base, experts, **settings), 1)}
    return pd.DataFrame({t: [tasks[name] for name in names] for t, tasks in columns.items()}, index=list(names))


def seen_mean(table: pd.DataFrame) -> np.ndarray:
    """The mean over the tasks seen so far, after each arrival; `table` from `arrival_table`."""
    return np.array([table.iloc[:t, t - 1].mean() for t in range(1, len(table) + 1)])


def backward_transfer(table: pd.DataFrame) -> float:
    """How much tasks lost to those that came later: the mean of (score at the end − score on arrival); 0 for one task.

    Args:
        table: from `arrival_table`; the last task, which nothing followed, does not count.
    """
    values = table.to_numpy()
    earlier = len(values) - 1
    return float(np.mean(values[:earlier, -1] - values.diagonal()[:earlier])) if earlier else 0.0


def order_study(
    base: Weights,
    experts: Sequence[Weights],
    names: Sequence[str],
    score: Score,
    variants: Mapping[str, Mapping[str, object]],
    *,
    orders: int = 5,
) -> pd.DataFrame:
    """Merge the same experts in several orders.

    Args:
        base: state dict θ₀.
        experts: state dicts.
        names: their tasks.
        score: as `arrival_table`.
        variants: label to settings of `arrivals`.
        orders: how many; the first is the given one.

    Returns:
        DataFrame: variant, order, mean (over all tasks, at the end), backward_transfer.
    """
    rows = []
    for label, settings in variants.items():
        for order in range(orders):
            places = order_of(len(experts), order > 0, order)
            table = arrival_table(base, [experts[i] for i in places], [names[i] for i in places], score, **settings)
            rows.append((label, order, float(table.iloc[:, -1].mean()), backward_transfer(table)))
    return pd.DataFrame(rows, columns=["variant", "order", "mean", "backward_transfer"])


@dataclass(frozen=True)
class ArrivalView:
    """One look at experts that arrive: scores of tasks x steps, and λ_t."""

    table: pd.DataFrame
    lambdas: Float[np.ndarray, " steps"]


def arrival_view(
    base: Weights,
    experts: Sequence[Weights],
    names: Sequence[str],
    score: Score,
    *,
    alpha: Annotated[float, Range(0, 1)] = 0.5,
    block: Annotated[str, Choice("corner", "cross")] = "corner",
    project: bool = True,
    rescale: bool = True,
    order: Annotated[int, Range(0, ORDER_SEEDS)] = 0,
) -> ArrivalView:
    """Merge experts one after another by OPCM and keep every step's scores.

    Args:
        base: state dict θ₀.
        experts: state dicts.
        names: their tasks.
        score: as `arrival_table`.
        alpha: share of the merge's spectrum that is protected.
        block: what is protected.
        project: off is a running sum.
        rescale: adaptive scale.
        order: 0 is the given order, others are shuffled.
    """
    places = order_of(len(experts), order > 0, order)
    merge, columns, lambdas = Opcm(base, alpha=alpha, block=block, project=project, rescale=rescale), {}, []
    for t, i in enumerate(places, 1):
        lambdas.append(merge.add(experts[i]).lambda_t)
        tasks = score(merge.merged).tasks
        columns[t] = [tasks[names[i]] for i in places]
    return ArrivalView(pd.DataFrame(columns, index=[names[i] for i in places]), np.array(lambdas))


@dataclass(frozen=True)
class ProjectionView:
    """P = UᵀDV of one matrix and one arrival: magnitudes, what stays, the split rank, the energy removed."""

    magnitudes: Float[np.ndarray, "r r"]
    rank: int
    removed: float
    block: str
    title: str


def projection_view(
    base: Weights,
    experts: Sequence[Weights],
    *,
    alpha: Annotated[float, Range(0, 1)] = 0.5,
    block: Annotated[str, Choice("corner", "cross")] = "corner",
    arrival: Annotated[int, Range(2, 64)] = 2,
    tensor: Annotated[str | None, Choice(None)] = None,
) -> ProjectionView:
    """Write an arriving expert's update in the merge's own directions.

    Args:
        base: state dict θ₀.
        experts: in the order of their arrival, at least two.
        alpha: share of the merge's spectrum that is protected.
        block: what is protected.
        arrival: which expert arrives; 2 is the first that finds a merge.
        tensor: name of a matrix; None for the largest.

    Raises:
        ValueError: no such matrix, or fewer experts than `arrival`.
    """
    if arrival > len(experts):
        raise ValueError(f"arrival must be at most the number of experts, {len(experts)}, got {arrival}")
    tensor = matrix_of(base, tensor)
    one = {tensor: base[tensor]}
    merge = Opcm(one, alpha=alpha, block=block, matrices="all")
    for expert in experts[: arrival - 1]:
        merge.add({tensor: expert[tensor]})
    u, s, vh = thin_svd(merge.total[tensor])
    d = at_least_float32(experts[arrival - 1][tensor]) - at_least_float32(base[tensor])
    step = merge.add({tensor: experts[arrival - 1][tensor]})
    p = (u.T @ d @ vh.T).abs().numpy()
    return ProjectionView(p, split_rank(s, alpha), step.removed[tensor], block, f"{tensor}, expert {arrival} arrives")
