"""The loss of weights on every task's data: what merges that search for coefficients make small.

    entropy        mean over inputs of −Σ_c p_c log p_c, p = softmax(logits): no labels needed
    cross_entropy  mean over inputs of −log p_label

A batch is one input tensor, a tuple (inputs, labels), or a mapping of named arguments as transformers models take
them; a LIST is several batches, used in turn. Nothing here is any paper's: it is how theirs meet your model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from notebook_kit.weights import Weights

Models = nn.Module | Mapping[str, nn.Module]
TaskLoss = Callable[[Any, Any, str], Tensor]


class Objective:
    """Losses of one set of weights on the data of several tasks.

    Args:
        model: takes the inputs; or one model a task, where heads differ. What the weights lack (heads, say) is its own.
        batches: task to a batch, or to a list of batches.
        loss: "entropy" or "cross_entropy"; a model that computes its own loss from labels is believed.
        heads: task to the slice of the logits that is its own; a task that is not named has them all.
        task_loss: (output, batch, task) -> scalar, in place of `loss` and `heads`.
        batch_size: rows drawn anew for each step; None takes the whole batch.
        seed: of the rows drawn.

    Raises:
        ValueError: no task, an empty list or batch, or a model that is missing for a task.
    """

    def __init__(
        self,
        model: Models,
        batches: Mapping[str, Any],
        *,
        loss: str = "entropy",
        heads: Mapping[str, slice] | None = None,
        task_loss: TaskLoss | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ):
        if not isinstance(batches, Mapping) or not batches:
            raise ValueError(f"batches must map at least one task to its data, got {type(batches).__name__}")
        self.batches = {task: data if isinstance(data, list) else [data] for task, data in batches.items()}
        self.tasks = list(self.batches)
        self.models = dict(model) if isinstance(model, Mapping) else dict.fromkeys(self.tasks, model)
        for task, data in self.batches.items():
            if not data:
                raise ValueError(f"batches of task {task!r} are an empty list: give at least one batch")
            for batch in data:
                if _count(batch) == 0:
                    raise ValueError(f"batches of task {task!r} hold a batch without rows")
            if task not in self.models:
                raise ValueError(f"model has no entry for task {task!r}, only {', '.join(self.models)}")
        self.loss = task_loss or default_loss(loss, heads or {})
        self.batch_size = batch_size
        self._generator, self._step = torch.Generator().manual_seed(seed), 0

    def draw(self) -> dict[str, Any]:
        """The next batch of each task."""
        drawn = {task: data[self._step % len(data)] for task, data in self.batches.items()}
        self._step += 1
        return drawn if self.batch_size is None else {task: self._rows(batch) for task, batch in drawn.items()}

    def losses(self, weights: Weights, drawn: Mapping[str, Any]) -> Iterator[tuple[str, Float[Tensor, ""]]]:
        """Each task with its loss at these weights, one after another."""
        for task, batch in drawn.items():
            value = self.loss(run(self.models[task], weights, batch), batch, task)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise TypeError(f"task_loss must return a scalar tensor, got {_brief(value)} for task {task!r}")
            if not torch.isfinite(value):
                raise ValueError(f"the loss of task {task!r} is {value.item()}: a smaller lr or scale may help")
            yield task, value.reshape(())

    def owners(self, base: Weights) -> dict[str, str]:
        """Each floating key of base with the first key that is the same parameter of the model (tied ones share it).

        Raises:
            ValueError: the model has no such tensor.
        """
        owners: dict[str, str] = {}
        for model in {id(model): model for model in self.models.values()}.values():
            held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
            first: dict[int, str] = {}
            for name in base:
                if name not in held:
                    raise ValueError(f"tensor {name!r} of base is not in the model ({type(model).__name__})")
                if base[name].is_floating_point():
                    owners.setdefault(name, first.setdefault(id(held[name]), name))
        return owners

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off; every model's mode, and every parameter, is as before afterwards."""
        with ExitStack() as stack:
            for model in {id(model): model for model in self.models.values()}.values():
                stack.callback(model.train, model.training)
                model.eval()
            yield

    def _rows(self, batch):
        n = _count(batch)
        if n is None:
            raise ValueError(f"batch_size needs batches of tensors, from which rows can be drawn, got {_brief(batch)}")
        rows = torch.randint(n, (min(self.batch_size, n),), generator=self._generator)

        def take(value):
            return value[rows] if isinstance(value, Tensor) and len(value) == n else value

        if isinstance(batch, Mapping):
            return {name: take(value) for name, value in batch.items()}
        return tuple(map(take, batch)) if isinstance(batch, tuple) else take(batch)


def run(model: nn.Module, weights: Weights, batch):
    """The model's output for a batch, with these weights in place of its own; buffers pass on no gradient."""
    buffers = {name for name, _ in model.named_buffers()}  # running statistics, which torch does not differentiate
    given = {name: tensor.detach() if name in buffers else tensor for name, tensor in weights.items()}
    if isinstance(batch, Mapping):
        return functional_call(model, given, (), dict(batch))
    return functional_call(model, given, (batch[0] if isinstance(batch, tuple) else batch,))


def default_loss(loss: str, heads: Mapping[str, slice]) -> TaskLoss:
    """The loss called "entropy" or "cross_entropy", on the part of the logits that belongs to the task."""

    def entropy(output, batch, task: str) -> Tensor:
        return mean_entropy(_own(output, heads, task), _mask(batch))

    def cross_entropy(output, batch, task: str) -> Tensor:
        own = getattr(output, "loss", None)
        if own is not None and task not in heads:
            return own
        logits = _own(output, heads, task)
        return F.cross_entropy(logits.flatten(0, -2), _labels(batch, task).flatten())

    return {"entropy": entropy, "cross_entropy": cross_entropy}[loss]


def mean_entropy(
    logits: Float[Tensor, "*inputs classes"], mask: Int[Tensor, "*inputs"] | None = None
) -> Float[Tensor, ""]:
    """Mean entropy of the softmax, in nats; inputs with mask 0 (padding) do not count."""
    log_p = logits.log_softmax(-1)
    each = -(log_p.exp() * log_p).sum(-1)
    if mask is None or mask.shape != each.shape:
        return each.mean()
    return (each * mask).sum() / mask.sum().clamp(min=1)


def _logits(output) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model must return logits or an output with .logits, got {_brief(output)}; give task_loss")
    return logits


def _own(output, heads: Mapping[str, slice], task: str) -> Tensor:
    """The task's slice of the logits."""
    logits = _logits(output)
    own = logits[..., heads.get(task, slice(None))]
    if own.shape[-1] == 0:
        raise ValueError(f"heads[{task!r}] is {heads.get(task)}, which holds none of the {logits.shape[-1]} logits")
    return own


def _count(batch) -> int | None:
    """Rows of a batch: of its first tensor with an axis; None where there is none."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), None)


def _labels(batch, task: str) -> Tensor:
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch["labels"]
    if isinstance(batch, tuple) and len(batch) > 1:
        return batch[1]
    raise ValueError(f"cross_entropy needs labels: give task {task!r} batches (inputs, labels), or loss='entropy'")


def _mask(batch) -> Tensor | None:
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def _brief(value) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
