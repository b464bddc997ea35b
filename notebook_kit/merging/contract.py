"""What every merge promises: base's keys, shapes and dtypes; arithmetic in float32 at least; inputs untouched."""

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from notebook_kit.weights import Weights, at_least_float32, check

Rule = Callable[[str, Tensor, list[Tensor]], Tensor]
PIECE = 1 << 18  # elements: what a rule holds in float32 stays small, and in the cache


def tensor_by_tensor(
    base: Weights, experts: Sequence[Weights], rule: Rule, *, elementwise: bool = False
) -> dict[str, Tensor]:
    """Merge each floating tensor by `rule(name, base, experts)`; other tensors are base's.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i.
        rule: gets the tensors in float32 or float64 and returns one of the same shape; must not modify them.
        elementwise: the rule treats each entry alone, so it gets the tensors flat and in pieces, one after another.

    Raises:
        IncompatibleWeights, ValueError: as `weights.check`.
    """
    check(base, experts)
    merged = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            merged[name] = tensor.clone()
            continue
        if elementwise:
            merged[name] = _in_pieces(name, tensor, [expert[name] for expert in experts], rule)
            continue
        result = rule(name, at_least_float32(tensor), [at_least_float32(expert[name]) for expert in experts])
        merged[name] = result.to(tensor.dtype)
    return merged


def _in_pieces(name: str, theta_0: Tensor, thetas: list[Tensor], rule: Rule) -> Tensor:
    flat, *others = (tensor.reshape(-1) for tensor in (theta_0, *thetas))
    result = torch.empty_like(flat)
    for start in range(0, len(flat), PIECE):
        where = slice(start, start + PIECE)
        result[where] = rule(name, at_least_float32(flat[where]), [at_least_float32(other[where]) for other in others])
    return result.reshape(theta_0.shape)


def tensor_generator(seed: int, name: str, index: int) -> torch.Generator:
    """Randomness that depends on the tensor's name, not on its place: streaming a file gives the same draw.

    It is the CPU's, and what it draws is sent to where the tensor is: a GPU gets the same numbers.
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + index * 7919 + zlib.crc32(name.encode())) % 2**63)
