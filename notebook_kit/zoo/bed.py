"""A bed: a model, the checkpoints to combine, and one number that says how good a combination is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from notebook_kit.weights import check


class Score(float):
    """The mean over tasks, higher is better; a float that also remembers each task in `.tasks`.

    Args:
        tasks: task to figure, at least one.
        unit: what is measured, such as "accuracy".

    Raises:
        ValueError: there is no task.
    """

    tasks: dict[str, float]
    unit: str

    def __new__(cls, tasks: Mapping[str, float], unit: str = "score"):
        """Take the mean of the tasks."""
        if not tasks:
            raise ValueError("a Score needs at least one task")
        score = super().__new__(cls, sum(tasks.values()) / len(tasks))
        score.tasks, score.unit = dict(tasks), unit
        return score

    def __reduce__(self):
        """Pickle the tasks, from which the mean follows."""
        return type(self), (self.tasks, self.unit)


@dataclass(frozen=True)
class Bed:
    """What a method is tried on: a model, base and expert weights, and held-out data.

    Args:
        model: module with the base weights, in evaluation mode.
        base: state dict all experts started from.
        experts: one state dict per expert, in the order of `names`; empty for a mixture of experts.
        names: of the experts; for a mixture of experts, of the tasks.
        measure: (model, weights or None, batches) -> task to figure.
        inputs: split -> task to held-out data.
        unit: what `measure` gives, for axes.
        splits: names that `batches` and `score` accept.
    """

    model: nn.Module
    base: dict[str, Tensor]
    experts: list[dict[str, Tensor]]
    names: list[str]
    measure: Callable[[nn.Module, Mapping[str, Tensor] | None, Any], dict[str, float]] = field(repr=False)
    inputs: Callable[[str], dict[str, Any]] = field(repr=False)
    unit: str = "score"
    splits: Sequence[str] = ("train", "val", "test")

    def batches(self, split: str = "test") -> dict[str, Any]:
        """Return the data of each task.

        Args:
            split: "train", "val" or "test".

        Returns:
            Task to (pixels, classes) for digits, to byte ids Int[n, length] for languages.

        Raises:
            ValueError: the split is unknown.
        """
        if split not in self.splits:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(self.splits)}")
        return self.inputs(split)

    def score(self, weights: Mapping[str, Tensor] | nn.Module, split: str = "test") -> Score:
        """Measure weights, or a model, on held-out data; nothing is modified.

        Args:
            weights: a state dict with the keys and shapes of `base`, or a model that takes the same inputs.
            split: "test" to report, "val" to tune.

        Returns:
            The mean over tasks: accuracy in [0, 1] for digits, log-likelihood in nats per byte (negative) for
            languages. `.tasks` holds each.

        Raises:
            IncompatibleWeights: keys or shapes differ from the base's.
            ValueError: the split is unknown, or the weights hold NaN or Inf.
        """
        data = self.batches(split)
        if not isinstance(weights, nn.Module):
            check(self.base, [weights], names=["weights"])
            return Score(self.measure(self.model, weights, data), self.unit)
        if not weights.training:
            return Score(self.measure(weights, None, data), self.unit)
        try:
            return Score(self.measure(weights.eval(), None, data), self.unit)
        finally:
            weights.train()
