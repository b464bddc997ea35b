"""Checkpoints of one run: a recorder that collects them while a model trains, and the plain ways to average them.

    last      θ_N                                    best   the one with the lowest loss
    uniform   1/n Σ θ_c over the last n              (stochastic weight averaging, LAWA)
    ema       θ̄_1 = θ_1,  θ̄_c = d θ̄_{c−1} + (1 − d) θ_c     d: decay; over the last n

These are what `metrics_weighted` (Yu & Choi, 2025) is compared with.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.average import average
from notebook_kit.merging.metrics_weighted import select_checkpoints
from notebook_kit.weights import Weights, check


def copy_of_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy all of a model's tensors."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class CheckpointRecorder:
    """Collect checkpoints of a run, each with its step and the mean loss of the batches before it.

        recorder = CheckpointRecorder(loss, weights=adapter_weights)
        fit(model, batches, recorder.loss, steps=600, evaluate=recorder.evaluate, evaluate_every=20)
        metrics_weighted(recorder.checkpoints[-1], recorder.checkpoints, metrics=recorder.losses)

    In another training loop call `recorder.saw(loss)` after each batch and `recorder.store(model)` when due.

    Args:
        loss: (model, batch) -> scalar, what `fit` minimises; None where `saw` is called instead.
        weights: model -> tensors to keep, such as `adapters.adapter_weights`; default: the whole state dict.
        window: batches in the mean loss of a checkpoint; None means all since the checkpoint before.

    Raises:
        ValueError: the window is below 1.
    """

    def __init__(
        self,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        *,
        weights: Callable[[nn.Module], dict[str, Tensor]] = copy_of_state,
        window: int | None = None,
    ):
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 batch, got {window} (CheckpointRecorder)")
        self._loss, self._weights, self._window = loss, weights, window
        self._seen: deque[Tensor] = deque(maxlen=window)
        self._step = 0
        self.checkpoints: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        self.steps: list[int] = []

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch, and remember it."""
        if self._loss is None:
            raise ValueError("this recorder was made without a loss: call `saw` with each batch's loss instead")
        value = self._loss(model, batch)
        self.saw(value)
        return value

    def saw(self, loss: Tensor | float) -> None:
        """Count a batch and remember its loss."""
        self._step += 1
        self._seen.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def store(self, model: nn.Module) -> float:
        """Keep a checkpoint of the model as it is now; returns its windowed loss.

        Raises:
            ValueError: no batch was seen since the last one.
        """
        if not self._seen or (self.steps and self.steps[-1] == self._step):
            raise ValueError(f"no batch was seen since the last checkpoint, at step {self._step} (CheckpointRecorder)")
        self.losses.append(sum(float(value) for value in self._seen) / len(self._seen))
        self.steps.append(self._step)
        self.checkpoints.append(self._weights(model))
        if self._window is None:
            self._seen.clear()
        return self.losses[-1]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Store a checkpoint, as `fit`'s `evaluate`."""
        return {"window_loss": self.store(model)}


@method(family="merging", paper="mwa")
def average_checkpoints(
    base: Weights,
    experts: Sequence[Weights],
    *,
    rule: Annotated[str, Choice("uniform", "ema", "last", "best")] = "uniform",
    n_last: Annotated[int, Range(1, 100)] = 10,
    stride: Annotated[int, Range(1, 20)] = 1,
    decay: Annotated[float, Range(0, 0.999)] = 0.7,
    metrics: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Average the checkpoints of one run without looking at how good each is; or take one of them.

    Args:
        base: state dict, or adapter weights, that sets keys, shapes and dtypes.
        experts: the checkpoints, in the order of training.
        rule: "uniform", "ema" (exponential moving average), "last", or "best" by `metrics`.
        n_last: checkpoints used, at most.
        stride: use every so many-th, counted back from the last.
        decay: of the moving average, for each checkpoint used.
        metrics: one loss a checkpoint, of all `experts`; needed by "best".

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: "best" without one loss per checkpoint; NaN or Inf in a tensor.

    Source:
        The baselines of Yu & Choi, 2025, arXiv 2504.18580.
    """
    check(base, experts)
    chosen = select_checkpoints(len(experts), n_last=n_last, stride=stride)
    n = len(chosen)
    if rule == "best":
        if metrics is None or len(metrics) != len(experts):
            got = "none" if metrics is None else len(metrics)
            raise ValueError(f"rule='best' needs one loss per checkpoint in metrics, {len(experts)}, got {got}")
        chosen = [min(chosen, key=lambda c: float(metrics[c]))]
    elif rule == "last":
        chosen = chosen[-1:]
    weights = None
    if rule == "ema":
        weights = [decay ** (n - 1)] + [(1 - decay) * decay ** (n - 1 - i) for i in range(1, n)]
    return average(base, [experts[c] for c in chosen], weights=weights)
