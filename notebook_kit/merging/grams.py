"""Gram matrices of what linear layers see: G = XᵀX / n, all that least squares needs to know of the data.

X: [n, in], the rows that reached a layer (tokens, images), gathered over all batches; G: [in, in].
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from notebook_kit.weights import IncompatibleWeights, Weights, float_keys

TRANSPOSED = ".T"  # ends the name of a Gram whose weight is stored [in, out], as GPT-2's Conv1D does


@torch.no_grad()
def gram_matrices(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Record G = XᵀX / n of the inputs of every linear layer.

    Args:
        model: any module; run in evaluation mode and left as it was.
        batches: tensors, tuples (x, y) or mappings of arguments; positions that "attention_mask" hides do not count.

    Returns:
        dict: name of the weight -> G [in, in]; for a Conv1D (weight [in, out]) the name ends in ".T". A weight that is
        not an `nn.Linear`'s own alone (tied to an embedding, or never called) is left out.

    Raises:
        ValueError: no layer was reached, or inputs hold NaN or Inf.
    """
    layers = {name: layer for name, layer in model.named_modules() if _is_linear(layer)}
    owners: dict[int, set] = {}
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(_is_linear(layer))
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    mask = None

    def hook(key: str):
        def record(layer: nn.Module, args: tuple) -> None:
            x = args[0].detach()
            kept = mask.bool() if mask is not None and mask.shape == x.shape[:-1] else ...
            x = x[kept].reshape(-1, x.shape[-1])
            x = x if x.dtype == torch.float64 else x.float()
            sums[key] = sums.get(key, 0) + x.T @ x
            rows[key] = rows.get(key, 0) + len(x)

        return record

    first = {id(layer.weight): name for name, layer in reversed(layers.items())}
    handles = [
        layer.register_forward_pre_hook(hook(f"{first[id(layer.weight)]}.weight{_ending(layer)}"))
        for layer in layers.values()
        if owners[id(layer.weight)] == {True}
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in batches:
            if isinstance(batch, Mapping):
                mask = batch.get("attention_mask")
                model(**{name: value for name, value in batch.items() if name != "labels"})
            else:
                model(batch if isinstance(batch, Tensor) else batch[0])
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not sums:
        raise ValueError(f"batches reached no linear layer of {type(model).__name__} (gram_matrices)")
    grams = {key: total / max(rows[key], 1) for key, total in sums.items()}
    for key, G in grams.items():
        if not torch.isfinite(G).all():
            raise ValueError(f"the inputs of {key!r} hold NaN or Inf (gram_matrices)")
    return grams


def check_grams(base: Weights, experts: Sequence[Weights], grams: Sequence[Weights], *, part: bool = False) -> None:
    """Refuse Grams that do not fit: one mapping an expert, the same names in each, of the weight's input size.

    Args:
        base: state dict.
        experts: state dicts.
        grams: what `gram_matrices` returned for each.
        part: `base` is a part of the model, so that it may have none of the names.

    Raises:
        TypeError, ValueError, IncompatibleWeights: the text says which and why.
    """
    source = "make them with gram_matrices(model, batches)"
    if isinstance(grams, Mapping) or not all(isinstance(table, Mapping) for table in grams):
        raise TypeError(f"grams must be a sequence of mappings, one an expert; {source}")
    if len(grams) != len(experts):
        raise ValueError(f"grams must have one mapping per expert, {len(experts)}, got {len(grams)}; {source}")
    names = float_keys(base)
    for name in names:
        for key in (name, name + TRANSPOSED):
            has = [key in table for table in grams]
            if any(has) and not all(has):
                raise ValueError(f"{key!r} is in grams[{has.index(True)}] but not in grams[{has.index(False)}]")
            for i, table in enumerate(grams if all(has) else ()):
                width = base[name].shape[0 if key != name else -1]
                if tuple(table[key].shape) != (width, width) or base[name].ndim != 2:
                    shapes = f"{list(table[key].shape)} in grams[{i}] for a weight {list(base[name].shape)}"
                    raise IncompatibleWeights(f"{key!r}: Gram {shapes}, expected [{width}, {width}]")
    known = any(key in table for table in grams for name in names for key in (name, name + TRANSPOSED))
    if not part and names and not known:
        raise ValueError(
            f"grams have none of the model's weights, but {', '.join(list(grams[0])[:3]) or 'nothing'}; {source}"
        )


def _is_linear(layer: nn.Module) -> bool:
    # transformers' Conv1D without importing transformers
    return isinstance(layer, nn.Linear) or (type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"))


def _ending(layer: nn.Module) -> str:
    return "" if isinstance(layer, nn.Linear) else TRANSPOSED
