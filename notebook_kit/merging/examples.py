"""Batches taken apart into examples, so that a gradient can be had for each: side by side (vmap) or in turn."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import vmap

from notebook_kit.merging.pulled_back import IGNORED


def inputs_of(batch) -> tuple[tuple, dict, Tensor | None, int]:
    """(arguments, named arguments, labels, number of examples) of a batch."""
    args, kwargs, labels = (), {}, None
    if isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, Mapping):
        kwargs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch.get("labels")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.bool().all():  # says nothing, and stands in the way of vmap
            del kwargs["attention_mask"]
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        args, labels = (batch[0],), batch[1]
    else:
        raise ValueError(f"a batch must be a tensor, a pair (x, y) or a mapping, got {type(batch).__name__}")
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors:
        raise ValueError("a batch must hold at least one tensor of inputs (diagonal_fisher)")
    return args, kwargs, labels, len(tensors[0])


def which_count(model: nn.Module, kwargs: dict, labels: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """Which positions count, and the labels that stand at them."""
    kept = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == kept.shape:
        kept = mask.bool()
    generates = getattr(model, "can_generate", bool)() and not model.config.is_encoder_decoder
    if labels is not None and generates and labels.shape == kept.shape:  # position t predicts token t + 1
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
    return kept, labels


def one_of(value):
    """Give an example the batch axis that its model expects."""
    return value[None] if isinstance(value, Tensor) else value


def rows_of(value, where: slice | int):
    """Some examples of a tensor; what is no tensor is for all."""
    return value[where] if isinstance(value, Tensor) else value


def outputs_of(output, logits: Callable | None) -> Tensor:
    """The outputs [positions, classes] of one example, out of whatever the model returned."""
    z = logits(output) if logits is not None else getattr(output, "logits", output)
    if not isinstance(z, Tensor) or z.ndim not in (2, 3) or z.shape[0] != 1:
        got = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(
            f"outputs must be [n, classes] or [n, positions, classes]; one example gave {got}: say `logits`"
        )
    return z.reshape(-1, z.shape[-1])


def side_by_side(fn: Callable, args, kwargs: dict, *more: Tensor):
    """Call fn(args, kwargs, *more) for all examples at once."""
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in kwargs.items() if name not in tensors}
    try:
        return vmap(lambda args, kwargs, *more: fn(args, kwargs | others, *more))(tuple(args), tensors, *more)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise RuntimeError(
            "this model's flow depends on its data, so that examples cannot go side by side (vmap): "
            "call diagonal_fisher(..., vectorized=False)"
        ) from error


def in_turn(fn: Callable, args, kwargs: dict, *more: Tensor):
    """Call fn(args, kwargs, *more) for one example after another, and stack what comes."""
    count = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
    results = []
    for i in range(count):
        one = tuple(a[i] for a in args), {name: rows_of(value, i) for name, value in kwargs.items()}
        results.append(fn(*one, *(value[i] for value in more)))
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}
