"""What a learner knows while classes arrive: accuracy after every task, forgetting, and which adapter is asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from notebook_kit.expert_merging import ModelSurgery, Retrieval, refine_retrieval
from notebook_kit.hyperparameters import Choice, Range

USES = ("retrieval", "last adapter", "right adapter", "prototypes")


@dataclass(frozen=True)
class StreamRecord:
    """All logits of a stream's learner, after every task: any way to answer can be tried on them without the model.

    Args:
        classes: labels in the order of arrival; column c of all logits is classes[c].
        tasks: the task each class came with.
        labels: of the test images, Int[n].
        adapted: after each task, Float[tasks so far, n, classes so far].
        prototypes: after each task, Float[n, classes so far].
    """

    classes: tuple[int, ...]
    tasks: tuple[int, ...]
    labels: Tensor = field(repr=False)
    adapted: list[Tensor] = field(repr=False)
    prototypes: list[Tensor] = field(repr=False)

    def __len__(self) -> int:
        return len(self.adapted)

    @property
    def task_of(self) -> Tensor:
        """The task that each test image's class came with, Int[n]."""
        lookup = dict(zip(self.classes, self.tasks, strict=True))
        return torch.tensor([lookup[label] for label in self.labels.tolist()])

    def retrieve(self, after: int, *, rounds: int = 4, ensemble: bool = True) -> tuple[Retrieval, Tensor]:
        """Retrieve adapters as they stood after a task, for images of the classes seen by then.

        Args:
            after: number of the task, from 0.
            rounds: as `refine_retrieval`.
            ensemble: as `refine_retrieval`.

        Returns:
            The retrieval and the rows of its images, Int[m].

        Raises:
            ValueError: no such task.
        """
        rows, adapted, prototypes, tasks = self._seen(after)
        return refine_retrieval(adapted, prototypes, tasks, rounds=rounds, ensemble=ensemble), rows

    def predictions(
        self, after: int, *, use: str = "retrieval", rounds: int = 4, ensemble: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Name classes as the learner would have done after a task.

        Args:
            after: number of the task, from 0.
            use: "retrieval", "last adapter" (one adapter for all), "right adapter" (told which; no method can be)
                or "prototypes" (no adapter but the first).
            rounds: with retrieval, as `refine_retrieval`.
            ensemble: with retrieval, as `refine_retrieval`.

        Returns:
            Labels Int[m], and the rows of their images Int[m].

        Raises:
            ValueError: no such task, or another `use`.
        """
        rows, adapted, prototypes, _ = self._seen(after)
        if use == "retrieval":
            columns = self.retrieve(after, rounds=rounds, ensemble=ensemble)[0].column
        elif use == "prototypes":
            columns = prototypes.argmax(1)
        elif use == "last adapter":
            columns = adapted[-1].argmax(1)
        elif use == "right adapter":
            columns = adapted[self.task_of[rows], torch.arange(len(rows))].argmax(1)
        else:
            raise ValueError(f"use must be one of {', '.join(USES)}, got {use!r} (StreamRecord)")
        return torch.tensor(self.classes)[columns], rows

    def _seen(self, after: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not 0 <= after < len(self):
            raise ValueError(f"after must be in [0, {len(self) - 1}], got {after} (StreamRecord)")
        rows = torch.nonzero(self.task_of <= after).flatten()
        adapted, prototypes = self.adapted[after], self.prototypes[after]
        return rows, adapted[:, rows], prototypes[rows], torch.tensor(self.tasks[: prototypes.shape[1]])


def record_stream(
    surgery: ModelSurgery, train: Sequence[tuple[Tensor, Tensor]], test: Sequence[tuple[Tensor, Tensor]]
) -> StreamRecord:
    """Let a fresh learner go through a stream, and write down all its logits on test images after each task.

    Args:
        surgery: that has learnt nothing yet; it learns here.
        train: images and labels, one pair a task.
        test: likewise.

    Raises:
        ValueError: it has learnt something, there is no task, or the test images are of other classes.
    """
    if surgery.adapters or not train:
        raise ValueError(
            f"record_stream needs a fresh learner and at least one task, got {len(surgery.adapters)} tasks learnt "
            f"and {len(train)} to learn"
        )
    x, y = (torch.cat(parts) for parts in zip(*test, strict=True))
    taught = {int(label) for _, labels in train for label in labels.unique()}
    if taught != set(y.tolist()):
        raise ValueError(f"test images must be of the classes taught, {sorted(taught)}, got {sorted(set(y.tolist()))}")
    adapted, prototypes = [], []
    for images, labels in train:
        surgery.learn(images, labels)
        for kept, logits in zip((adapted, prototypes), surgery.logits(x), strict=True):
            kept.append(logits)
    return StreamRecord(tuple(surgery.classes), tuple(surgery.tasks), y, adapted, prototypes)


def accuracy_curve(record: StreamRecord, **how) -> np.ndarray:
    """Accuracy over all classes seen, after each task; `how` as `StreamRecord.predictions`. Float[tasks]."""
    curve = []
    for after in range(len(record)):
        predicted, rows = record.predictions(after, **how)
        curve.append((predicted == record.labels[rows]).float().mean().item())
    return np.array(curve)


def accuracy_matrix(record: StreamRecord, **how) -> np.ndarray:
    """Accuracy on each task's classes (columns) after each task (rows); NaN above the diagonal. Float[tasks, tasks]."""
    matrix = np.full((len(record), len(record)), np.nan)
    for after in range(len(record)):
        predicted, rows = record.predictions(after, **how)
        right, task = (predicted == record.labels[rows]).numpy(), record.task_of[rows].numpy()
        for j in range(after + 1):
            matrix[after, j] = right[task == j].mean()
    return matrix


def forgetting(matrix: np.ndarray) -> float:
    """How far tasks fell from their best: mean over all but the last of (best accuracy ever − accuracy at the end)."""
    if len(matrix) < 2:
        return 0.0
    return float(np.mean([np.nanmax(matrix[:, j]) - matrix[-1, j] for j in range(len(matrix) - 1)]))


def retrieval_matrix(record: StreamRecord, *, rounds: int = 4, after: int | None = None) -> np.ndarray:
    """Share of each task's images (rows) that ask each adapter (columns) for their answer. Float[tasks, tasks].

    Args:
        record: of a stream.
        rounds: of refinement; 1 is the prototypes' choice.
        after: number of the task; None is the last.
    """
    after = len(record) - 1 if after is None else after
    retrieval, rows = record.retrieve(after, rounds=rounds)
    matrix = np.zeros((after + 1, after + 1))
    np.add.at(matrix, (record.task_of[rows].numpy(), retrieval.adapter.numpy()), 1)
    return matrix / matrix.sum(1, keepdims=True)


def confusion_matrix(record: StreamRecord, *, after: int, **how) -> np.ndarray:
    """Share of each class's images (rows) that get each label (columns), in the order of arrival."""
    predicted, rows = record.predictions(after, **how)
    seen = [label for label, task in zip(record.classes, record.tasks, strict=True) if task <= after]
    place = {label: i for i, label in enumerate(seen)}
    matrix = np.zeros((len(seen), len(seen)))
    for true, said in zip(record.labels[rows].tolist(), predicted.tolist(), strict=True):
        matrix[place[true], place[said]] += 1
    return matrix / matrix.sum(1, keepdims=True)


def paths_frame(record: StreamRecord, *, rounds: int = 4) -> pd.DataFrame:
    """Follow each test image through the adapters it names, after the last task.

    Returns:
        DataFrame: image (row of the test images), label, task (the right adapter), path (adapters named, "3 → 1"),
        answer (the label it ends with).
    """
    retrieval, rows = record.retrieve(len(record) - 1, rounds=rounds)
    answers = torch.tensor(record.classes)[retrieval.column]
    paths = []
    for path in retrieval.path.tolist():
        short = [path[0], *(b for a, b in pairwise(path) if a != b)]
        paths.append(" → ".join(map(str, short)))
    columns = {"image": rows, "label": record.labels[rows], "task": record.task_of[rows], "answer": answers}
    frame = pd.DataFrame({name: tensor.numpy() for name, tensor in columns.items()})
    frame.insert(3, "path", paths)
    return frame


@dataclass(frozen=True)
class IncrementalView:
    """One look at a stream.

    Args:
        curve: accuracy over the classes seen, after each task.
        references: other curves to compare with, by name.
        after: number of the task looked at.
        matrix: what is drawn beside it, shares.
        names: of its rows and columns.
        show: "classes" (confusion), "adapters" (retrieval) or "tasks" (accuracy of each task after each task).
    """

    curve: np.ndarray = field(repr=False)
    references: Mapping[str, np.ndarray] = field(repr=False)
    after: int
    matrix: np.ndarray = field(repr=False)
    names: tuple[str, ...]
    show: str


def incremental_view(
    records: Mapping[float, StreamRecord],
    references: Mapping[str, np.ndarray] | None = None,
    *,
    adapter_momentum: Annotated[float, Choice(0.0, 0.02, 0.1, 0.5)] = 0.1,
    use: Annotated[str, Choice(*USES)] = "retrieval",
    rounds: Annotated[int, Range(1, 64)] = 4,
    ensemble: bool = True,
    tasks_seen: Annotated[int, Range(1, 512)] = 5,
    show: Annotated[str, Choice("classes", "adapters", "tasks")] = "classes",
) -> IncrementalView:
    """Look at a stream that was learnt with several merge strengths.

    Args:
        records: merge strength to `record_stream` of a learner that had it.
        references: more curves, Float[tasks], such as those of other baselines.
        adapter_momentum: how strongly adapters are merged while they train; one of `records`.
        use: what answers: retrieval, one adapter for all, the right adapter (told), or the prototypes.
        rounds: of refinement, at most; 1 is none (with retrieval).
        ensemble: add the prototypes' probabilities to the answer (with retrieval).
        tasks_seen: how far along the stream the matrix looks.
        show: confusion of classes, adapters asked by the images of each task, or accuracy of each task over time.

    Returns:
        IncrementalView.

    Raises:
        ValueError: no record with this merge strength, or fewer tasks.
    """
    if adapter_momentum not in records:
        raise ValueError(f"no record with adapter_momentum={adapter_momentum}, only {', '.join(map(str, records))}")
    record, after = records[adapter_momentum], tasks_seen - 1
    how = {"use": use, "rounds": rounds, "ensemble": ensemble}
    if after >= len(record):
        raise ValueError(f"tasks_seen must be in [1, {len(record)}], got {tasks_seen} (incremental_view)")
    if show == "classes":
        matrix = confusion_matrix(record, after=after, **how)
        names = tuple(map(str, record.classes[: len(matrix)]))
    else:
        matrix = accuracy_matrix(record, **how)[:tasks_seen, :tasks_seen]
        matrix = retrieval_matrix(record, rounds=rounds, after=after) if show == "adapters" else matrix
        names = tuple(map(str, range(tasks_seen)))
    return IncrementalView(accuracy_curve(record, **how), references or {}, after, matrix, names, show)
