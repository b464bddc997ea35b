"""The adapters' own tensors, apart from the model they sit in."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from notebook_kit.adapters._adapter import adapters

SHOWN = 5


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy the adapters' tensors, and nothing of their hosts.

    Args:
        model: a model with adapters.

    Returns:
        dict: "layers.0.q_proj.A" and so on to tensor; `notebook_kit.weights.save` writes it to a file.

    Raises:
        ValueError: the model carries no adapter.
    """
    return {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}


def load_adapter_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set the adapters' tensors; all of them, or none if something does not fit.

    Args:
        model: a model with the same adapters attached; changed in place.
        weights: what `adapter_weights` returned; cast to the model's dtype and device.

    Raises:
        ValueError: keys are missing or unknown, shapes differ, or a tensor holds NaN or Inf; the first five are named.
        TypeError: a value is not a tensor.
    """
    own = _tensors(model)
    errors = [f"{key!r}: missing" for key in own if key not in weights]
    errors += [f"{key!r}: no adapter of this model has it" for key in weights if key not in own]
    for key in [key for key in own if key in weights]:
        value = weights[key]
        if not isinstance(value, Tensor):
            raise TypeError(f"{key!r} must be a tensor, got {type(value).__name__}")
        if value.shape != own[key].shape:
            errors.append(f"{key!r}: shape {list(own[key].shape)} in the model, {list(value.shape)} given")
        elif not torch.isfinite(value).all():
            errors.append(f"{key!r}: holds NaN or Inf")
    if errors:
        more = f"\n  and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
        listing = "\n  ".join(errors[:SHOWN])
        raise ValueError(f"adapter weights do not fit {type(model).__name__}, nothing was loaded:\n  {listing}{more}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(weights[key])


def trainable_parameters(model: nn.Module):
    """List what a model would train.

    Args:
        model: any module, with or without adapters.

    Returns:
        DataFrame: a row for each module with trainable parameters of its own: module, adapter (its class, or "" for a
        plain module), parameters (their number), share (of all parameters of the model, adapters included).
    """
    import pandas as pd

    carriers = {name: type(module).__name__ for name, module in adapters(model)}
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = next((n for n in carriers if name.startswith(f"{n}.") and not name.startswith(f"{n}.host.")), None)
            module = name.rpartition(".")[0] if owner is None else owner
            counts[module] = counts.get(module, 0) + parameter.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    rows = [(module, carriers.get(module, ""), count, count / total) for module, count in counts.items()]
    return pd.DataFrame(rows, columns=["module", "adapter", "parameters", "share"])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that belong to adapters, by name; references."""
    found = {}
    for name, adapter in adapters(model):
        for key, tensor in adapter.state_dict(keep_vars=True).items():
            if not key.startswith("host."):
                found[f"{name}.{key}"] = tensor
    if not found:
        raise ValueError(f"{type(model).__name__} carries no adapter with weights; `attach` one first")
    return found
