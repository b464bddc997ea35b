"""Expert-diversify: one trained expert becomes N, each a copy with its own random share of the weights set to zero.

    W_i = W_0 ⊙ M_i        M_i ~ Bernoulli(1 - mask_rate), entry by entry, one draw an expert

Masks fall on matrices; biases and norms are copied whole. The masks act once: what is zero at the beginning may grow
back. With mask_rate = 0 all experts are equal, and with weights that sum to 1 the layer is the seed expert.

Source: Nie et al. 2021, section 4. Their released code holds the gate only; that the copies differ by random masks is
told in the paper's text, the rate is not certain: 0.5 is our default, 0 the ablation.
"""

import copy
from collections.abc import Iterable
from typing import Annotated

import torch
from torch import nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range


@method(family="mixtures", paper="evomoe")
@torch.no_grad()
def spawn_experts(
    expert: nn.Module,
    n_experts: int,
    *,
    mask_rate: Annotated[float, Range(0.0, 0.99)] = 0.5,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
) -> nn.ModuleList:
    """Copy a trained expert N times, each copy without a random share of its weights.

    An optimiser made afterwards starts with fresh moments; `inherit_moments` hands on those of the seed expert.

    Args:
        expert: any module; left as it is.
        n_experts: N, at least 1.
        mask_rate: share of each matrix that is set to zero.
        seed: of the masks.

    Returns:
        N modules, for `MoE`.

    Raises:
        ValueError: n_experts below 1.
    """
    if n_experts < 1:
        raise ValueError(f"n_experts must be at least 1, got {n_experts} (spawn_experts)")
    generator, experts = torch.Generator("cpu").manual_seed(seed), nn.ModuleList()
    for _ in range(n_experts):
        spawned = copy.deepcopy(expert)
        for parameter in spawned.parameters():
            if parameter.ndim >= 2 and mask_rate > 0:
                kept = torch.rand(parameter.shape, generator=generator, device="cpu") >= mask_rate
                parameter.mul_(kept.to(parameter.device))
        experts.append(spawned)
    return experts


@torch.no_grad()
def inherit_moments(
    optimizer: torch.optim.Optimizer, expert: nn.Module, experts: Iterable[nn.Module], into: torch.optim.Optimizer
) -> int:
    """Copy what an optimiser remembers of a seed expert's parameters to each of its copies.

    The moments are copied whole, also where a mask set the weight to zero: the loss still has a gradient there.

    Args:
        optimizer: the one that trained the seed expert.
        expert: the seed.
        experts: its copies, from `spawn_experts`.
        into: the optimiser that holds the copies' parameters; may be the same.

    Returns:
        How many parameters were given a state.

    Raises:
        ValueError: a copy's parameter that `into` does not hold, or copies that do not resemble the seed.
    """
    held = {id(p) for group in into.param_groups for p in group["params"]}
    pairs = []
    for number, spawned in enumerate(experts):
        parts = dict(spawned.named_parameters())
        if {n: p.shape for n, p in parts.items()} != {n: p.shape for n, p in expert.named_parameters()}:
            raise ValueError(f"expert {number} has other parameters than the seed expert (inherit_moments)")
        for name, seed in expert.named_parameters():
            if id(parts[name]) not in held:
                raise ValueError(f"`into` does not hold {name} of expert {number}: add its parameters first")
            if seed in optimizer.state:
                pairs.append((parts[name], optimizer.state[seed]))
    for parameter, state in pairs:
        into.state[parameter] = copy.deepcopy(state)
    return len(pairs)
