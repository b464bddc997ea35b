"""Whole sub-layers as hosts: an attention block or an MLP, from hidden states to hidden states of the same size."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.adapters._adapter import is_linear, sizes


def is_sublayer(module: nn.Module) -> bool:
    """Say whether a module is a branch: linear layers inside, the last as wide as the first one's input."""
    if is_linear(module) or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    inner = [child for child in module.modules() if is_linear(child)]
    return bool(inner) and sizes(inner[0])[0] == sizes(inner[-1])[1]


def width(sublayer: nn.Module) -> int:
    """The size of the hidden states that go in and come out."""
    return sizes(next(child for child in sublayer.modules() if is_linear(child)))[0]


def hidden_states(args: tuple, kwargs: dict[str, Any]) -> Float[Tensor, "... d_in"]:
    """What a host was called with: its first argument, or the one named hidden_states.

    Raises:
        TypeError: there is no such tensor; the text says what came.
    """
    x = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(x, Tensor):
        came = ", ".join([*(type(value).__name__ for value in args), *kwargs]) or "nothing"
        raise TypeError(f"a host must be called with its input first, or with hidden_states=..., got {came}")
    return x


def plus(output: Any, change: Float[Tensor, "... d_out"], scale: float) -> Any:
    """The host's output with `scale` times the change added to its hidden states; attention returns them in a tuple."""
    if isinstance(output, tuple):
        return (plus(output[0], change, scale), *output[1:])
    return torch.add(output, change, alpha=scale)
