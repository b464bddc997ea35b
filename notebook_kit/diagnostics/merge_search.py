"""What merges by search did: a path of coefficients, a pool that grows, an archive that evolves; cheap to look at."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from notebook_kit.data import digit_labelings
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging import (
    AdaMergingPath,
    FrankWolfePath,
    NicheArchive,
    average,
    frank_wolfe_path,
    task_arithmetic,
)
from notebook_kit.merging.niche_archive import Birth
from notebook_kit.merging.niches import fitness
from notebook_kit.weights import Weights

POINTS_SHOWN = 480


def label_heads() -> dict[str, slice]:
    """Where each labeling of the digits finds its classes among the logits of `zoo.digit_labels().model`."""
    heads, start = {}, 0
    for name, labeling in digit_labelings().items():
        heads[name] = slice(start, start + labeling.n_classes)
        start += labeling.n_classes
    return heads


# ---------------------------------------------------------------- AdaMerging
@dataclass(frozen=True)
class CoefficientRecord:
    """A path of coefficients with what the merges along it score.

    Args:
        path: from `adamerging_path`.
        steps: at which it was scored, Int[n].
        scores: Float[n].
        names: of the experts.
        loss: what was made small, with its unit.
    """

    path: AdaMergingPath = field(repr=False)
    steps: np.ndarray = field(repr=False)
    scores: np.ndarray = field(repr=False)
    names: tuple[str, ...]
    loss: str


def record_coefficients(
    path: AdaMergingPath,
    score: Callable[[dict], float],
    *,
    names: Sequence[str],
    every: int = 5,
    loss: str = "entropy (nats)",
) -> CoefficientRecord:
    """Score the merges along a path.

    Args:
        path: from `adamerging_path`.
        score: of a state dict, higher is better.
        names: of the experts.
        every: steps between scores; the last step is scored too.
        loss: what was made small, with its unit.
    """
    last = len(path.coefficients) - 1
    steps = np.unique([*range(0, last + 1, every), last])
    scores = np.array([float(score(path.merged(int(step)))) for step in steps])
    return CoefficientRecord(path, steps, scores, tuple(names), loss)


@dataclass(frozen=True)
class CoefficientView:
    """One moment of a record: the step, its name, and the record itself."""

    record: CoefficientRecord = field(repr=False)
    step: int
    run: str


def adamerging_view(
    records: Mapping[str, CoefficientRecord],
    *,
    run: Annotated[str, Choice("entropy", "cross_entropy")] = "entropy",
    step: Annotated[int, Range(0, 10_000)] = 0,
) -> CoefficientView:
    """Look at one step of one of several stored paths.

    Args:
        records: name to `record_coefficients`.
        run: which of them.
        step: of Adam; a path that is shorter shows its end.

    Raises:
        ValueError: no such record.
    """
    if run not in records:
        raise ValueError(f"no record is called {run!r}, only {', '.join(records)} (adamerging_view)")
    return CoefficientView(records[run], min(step, len(records[run].path.coefficients) - 1), run)


# ---------------------------------------------------------------- Frank-Wolfe
def pool_growth(
    base: Weights,
    experts: Sequence[Weights],
    merges: Mapping[str, Callable[[Weights, Sequence[Weights]], Weights]],
    score: Callable[[dict], float],
    *,
    sizes: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Score merges of pools that grow: the first two experts, the first three, and so on.

    Args:
        base: state dict θ₀.
        experts: in the order they join.
        merges: name to (base, experts) -> state dict.
        score: of a state dict, higher is better.
        sizes: of the pools; None is 2, 3, ..., all.

    Returns:
        DataFrame: method, pool, score.
    """
    sizes = range(2, len(experts) + 1) if sizes is None else sizes
    rows = [(name, n, float(score(merge(base, experts[:n])))) for name, merge in merges.items() for n in sizes]
    return pd.DataFrame(rows, columns=["method", "pool", "score"])


@dataclass(frozen=True)
class FrankWolfeView:
    """One run of Frank-Wolfe, beside pools of other sizes.

    Args:
        path: the run.
        names: of the start, then of the experts in the pool.
        pool: models in it.
        score: of its result.
        curve: from `pool_growth`.
    """

    path: FrankWolfePath = field(repr=False)
    names: tuple[str, ...]
    pool: int
    score: float
    curve: pd.DataFrame = field(repr=False)


def frank_wolfe_view(
    base: Weights,
    experts: Sequence[Weights],
    *,
    names: Sequence[str],
    measure: Callable[[dict], float],
    curve: pd.DataFrame,
    model: Any,
    batches: Mapping[str, Any],
    pool: Annotated[int, Range(1, 4096)] = 4,
    granularity: Annotated[str, Choice("task", "layer")] = "task",
    oracle: Annotated[str, Choice("inner", "cos_checkpoint", "cos_delta")] = "inner",
    steps: Annotated[int, Range(1, 100)] = 10,
    scale: Annotated[float, Range(0.05, 1)] = 1.0,
    **more,
) -> FrankWolfeView:
    """Run Frank-Wolfe on the first models of a pool and look at it.

    Args:
        base: state dict θ₀.
        experts: the pool.
        names: of the experts.
        measure: of a state dict, higher is better; `explore` has its own use for the word score.
        curve: from `pool_growth`, drawn beside the run.
        model: as `frank_wolfe`.
        batches: of the target tasks, as `frank_wolfe`.
        pool: how many of the experts are in it.
        granularity: pick whole models, or one for each tensor.
        oracle: how vertices are ranked.
        steps: at most.
        scale: of each move.
        more: other arguments of `frank_wolfe`.
    """
    chosen = experts[: min(pool, len(experts))]
    settings = {"granularity": granularity, "oracle": oracle, "steps": steps, "scale": scale}
    path = frank_wolfe_path(base, chosen, model=model, batches=batches, **settings, **more)
    return FrankWolfeView(path, ("start", *names[: len(chosen)]), len(chosen), float(measure(path.merged)), curve)


def pool_merges(**options) -> dict[str, Callable]:
    """The three lines of the paper's picture: average, task arithmetic at 0.3, and Frank-Wolfe with `options`."""
    return {
        "average": average,
        "task arithmetic 0.3": lambda base, experts: task_arithmetic(base, experts, scale=0.3),
        "Frank-Wolfe": lambda base, experts: frank_wolfe_path(base, experts, **options).merged,
    }


def loss_triangle(
    corners: Sequence[Weights], loss: Callable[[dict], float], *, divisions: int = 14
) -> tuple[Float[np.ndarray, "points 3"], Float[np.ndarray, " points"]]:
    """Losses over the triangle between three models.

    Args:
        corners: three state dicts.
        loss: of a state dict.
        divisions: of each side.

    Returns:
        Shares of the corners at each point, and the losses there.

    Raises:
        ValueError: there are not three corners.
    """
    if len(corners) != 3:
        raise ValueError(f"a triangle has three corners, got {len(corners)} (loss_triangle)")
    n = divisions
    shares = np.array([(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)]) / n

    def blend(row):
        return average(corners[0], corners, weights=row.tolist())

    return shares, np.array([float(loss(blend(row))) for row in shares])


# ---------------------------------------------------------------- M2N2
@dataclass(frozen=True)
class Snapshot:
    """An archive at one moment: evaluations, scores of all members on the points shown, fitness, the last birth."""

    evaluations: int
    scores: np.ndarray = field(repr=False)
    fitness: np.ndarray = field(repr=False)
    birth: Birth | None


@dataclass(frozen=True)
class EvolutionRecord:
    """An archive's life.

    Args:
        snapshots: moments to look at, the first before any child.
        curves: DataFrame with a row a snapshot: evaluations, best, mean, coverage, diversity, and test where measured.
        points: which points the snapshots show, Int[m], sorted by label.
        labels: of these points, Int[m].
        layers: name to where it begins in the flat vector.
        d: length of the flat vector.
    """

    snapshots: list[Snapshot] = field(repr=False)
    curves: pd.DataFrame = field(repr=False)
    points: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    layers: dict[str, int]
    d: int


def record_evolution(
    archive: NicheArchive,
    evals: int,
    *,
    labels: Sequence[int] | torch.Tensor,
    every: int = 20,
    test: Callable[[dict], float] | None = None,
) -> EvolutionRecord:
    """Let a fresh archive evolve, and take pictures of it.

    Args:
        archive: evolves here.
        evals: evaluations, the experts' among them.
        labels: a class for each point, by which points are sorted into niches.
        every: evaluations between pictures.
        test: of a state dict, measured on each picture's best.

    Raises:
        ValueError: the number of labels is not the number of points.
    """
    labels = np.asarray(labels)
    if len(labels) != archive.scores.shape[1]:
        raise ValueError(f"labels must have one entry a point, {archive.scores.shape[1]}, got {len(labels)}")
    order = np.argsort(labels, kind="stable")
    points = order[np.linspace(0, len(order) - 1, min(len(order), POINTS_SHOWN)).round().astype(int)]
    snapshots, rows = [], []

    def note():
        birth = archive.births[-1] if archive.births else None
        scores = archive.scores[:, torch.as_tensor(points)].numpy()
        each = fitness(archive.scores, archive.alpha).numpy()
        snapshots.append(Snapshot(archive.evaluations, scores, each, birth))
        rows.append(dict(archive.history[-1]) | ({"test": float(test(archive.best()))} if test else {}))

    note()
    while archive.evaluations < evals:
        archive.run(min(archive.evaluations + every, evals))
        note()
    borders = np.cumsum([0, *archive.space.sizes[:-1]])
    layers = dict(zip(archive.space.names, borders.tolist(), strict=True))
    return EvolutionRecord(snapshots, pd.DataFrame(rows), points, labels[points], layers, len(archive.space))


@dataclass(frozen=True)
class NicheView:
    """One moment of one archive, beside the curves of all."""

    record: EvolutionRecord = field(repr=False)
    snapshot: Snapshot
    variant: str
    curves: dict[str, pd.DataFrame] = field(repr=False)


def niche_view(
    records: Mapping[str, EvolutionRecord],
    *,
    variant: Annotated[str, Choice("M2N2", "no split point", "no matchmaker", "plain GA")] = "M2N2",
    picture: Annotated[int, Range(0, 10_000)] = 0,
) -> NicheView:
    """Look at one moment of one of several recorded archives.

    Args:
        records: name to `record_evolution`.
        variant: which of them.
        picture: number of the snapshot; a shorter record shows its last.

    Raises:
        ValueError: no such record.
    """
    if variant not in records:
        raise ValueError(f"no record is called {variant!r}, only {', '.join(records)} (niche_view)")
    record = records[variant]
    snapshot = record.snapshots[min(picture, len(record.snapshots) - 1)]
    return NicheView(record, snapshot, variant, {name: other.curves for name, other in records.items()})
