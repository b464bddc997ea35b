"""Which points a classifier gets right, for one model or for several at once; and small random models to begin with."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from notebook_kit.merging.flat_space import Flat, FlatSpace
from notebook_kit.merging.niches import Scores
from notebook_kit.weights import Weights


class PointScores:
    """`score_points` of a classifier: 1 where it names the right class; several models in one batched pass.

    Args:
        model: takes the inputs and returns logits; put into evaluation mode by you.
        inputs: Float[points, ...]; all at once.
        labels: Int[points], or one column a task: Int[points, tasks], then a point is an input in one task.
        heads: slices of the logits, one a column of labels; None for a single task.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, labels: Tensor, heads: Sequence[slice] | None = None):
        self.model, self.inputs = model, inputs
        self.labels, self.heads = labels.reshape(len(labels), -1), list(heads or [slice(None)])
        if len(self.heads) != self.labels.shape[1]:
            raise ValueError(
                f"heads must have one slice for each column of labels, {self.labels.shape[1]}, got {len(self.heads)}"
            )

    @torch.no_grad()
    def __call__(self, weights: Weights) -> Float[Tensor, " points"]:
        """1 or 0 for each point, task after task."""
        return self._right(functional_call(self.model, dict(weights), (self.inputs,)))

    @torch.no_grad()
    def stacked(self, space: FlatSpace, flat: Flat) -> Scores:
        """The same for several models, rows of a `FlatSpace`."""
        held = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        tied = any(held.get(name) is not held.get(owner) for name, owner in space.owners.items())
        if tied:  # one tensor in base, but two in the model: each must be given
            return torch.stack([self(space.weights(row)) for row in flat])
        rest = {name: tensor for name, tensor in space.like.items() if name not in space.owners}

        def call(one):
            return functional_call(self.model, one | rest, (self.inputs,))

        return self._right(vmap(call)(space.stack(flat)))

    def _right(self, logits: Tensor) -> Tensor:
        columns = [logits[..., head].argmax(-1) == self.labels[:, i] for i, head in enumerate(self.heads)]
        return torch.cat(columns, dim=-1).float()


def random_weights(base: Weights, count: int, *, std: float = 0.01, seed: int = 0) -> list[dict[str, Tensor]]:
    """Models of small Gaussian weights with base's keys and shapes: where evolution from scratch begins.

    Args:
        base: state dict to be like.
        count: how many (the official code begins with two).
        std: of every entry.
        seed: of the draws.
    """
    generator, space = torch.Generator().manual_seed(seed), FlatSpace(base)
    rows = [std * torch.randn(len(space), generator=generator).to(space.device) for _ in range(count)]
    return [{name: tensor.clone() for name, tensor in space.weights(row).items()} for row in rows]
