"""Cut a wide two-layer network into experts, and sew them together again.

    dense(x) = W₂ act(W₁ x + b₁) + b₂         expert i has a stretch of the hidden units: W₁ rows, b₁, W₂ columns

An even share b₂ / N goes to each expert, so that the experts' plain sum is the dense network. A router whose N weights
are all 1 / N gives dense / N: `scale=N` makes the sliced layer start as the dense one (zero router, k = N).

Source: the experts of Chen et al. 2023 (SMoE-Dropout), which are slices in size; moduling a trained layer so is ours.
"""

from collections.abc import Iterable

import torch
from torch import nn

from notebook_kit.models import MLP


@torch.no_grad()
def slice_mlp(mlp: MLP, n_experts: int, *, scale: float = 1.0) -> nn.ModuleList:
    """Cut an MLP with one hidden layer into experts of equal width.

    Args:
        mlp: MLP([d_in, width, d_out]); left as it is.
        n_experts: N, a divisor of the width.
        scale: multiplies what each expert gives; N makes the mean of the experts the dense network.

    Returns:
        N networks MLP([d_in, width / N, d_out]).

    Raises:
        ValueError: more than one hidden layer, or a width that N does not divide.
    """
    if len(mlp.layers) != 2:
        raise ValueError(f"slice_mlp cuts MLPs with one hidden layer, got {len(mlp.layers)} linear layers")
    first, last = mlp.layers
    if n_experts < 1 or first.out_features % n_experts:
        raise ValueError(f"n_experts must divide the hidden width {first.out_features}, got {n_experts} (slice_mlp)")
    width, experts = first.out_features // n_experts, nn.ModuleList()
    for i in range(n_experts):
        units, expert = slice(i * width, (i + 1) * width), _empty(mlp, width)
        expert.layers[0].weight.copy_(first.weight[units])
        expert.layers[0].bias.copy_(first.bias[units])
        expert.layers[1].weight.copy_(last.weight[:, units] * scale)
        expert.layers[1].bias.copy_(last.bias * scale / n_experts)
        experts.append(expert)
    return experts


@torch.no_grad()
def join_mlp(experts: Iterable[MLP], *, scale: float = 1.0) -> MLP:
    """Sew experts into one wide network, their sum: the way back from `slice_mlp`.

    Args:
        experts: networks with one hidden layer, alike in input, output and activation.
        scale: what `slice_mlp` multiplied by.

    Raises:
        ValueError: no experts, or experts that differ.
    """
    experts = list(experts)
    kinds = {(e.activation, len(e.layers), e.layers[0].in_features, e.layers[-1].out_features) for e in experts}
    if len(kinds) != 1 or next(iter(kinds))[1] != 2:
        raise ValueError(f"join_mlp needs MLPs with one hidden layer, alike at both ends, got {len(kinds)} kinds")
    joined = _empty(experts[0], sum(expert.layers[0].out_features for expert in experts))
    joined.layers[0].weight.copy_(torch.cat([expert.layers[0].weight for expert in experts]))
    joined.layers[0].bias.copy_(torch.cat([expert.layers[0].bias for expert in experts]))
    joined.layers[1].weight.copy_(torch.cat([expert.layers[1].weight for expert in experts], 1) / scale)
    joined.layers[1].bias.copy_(torch.stack([expert.layers[1].bias for expert in experts]).sum(0) / scale)
    return joined


def _empty(like: MLP, width: int) -> MLP:
    first, last = like.layers[0], like.layers[-1]
    with torch.random.fork_rng(devices=[]):  # its random weights are overwritten
        made = MLP([first.in_features, width, last.out_features], like.activation)
    return made.to(first.weight.device, first.weight.dtype)
