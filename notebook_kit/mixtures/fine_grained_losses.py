"""The two balance losses of DeepSeekMoE: one for every expert, one for every device that holds several.

    f_i = N'/(K' T) · (tokens that picked i)      P_i = mean over tokens of p_i          both sum to N' and to 1
    expert level:   Σ_i f_i P_i
    device level:   Σ_g f'_g P'_g                 f'_g = mean of f_i in the group, P'_g = sum of P_i in the group

N' routed experts, K' picks a token, T tokens. Even load gives 1 in both, whatever K' (transformers' Mixtral loss gives
K'). One expert a device: both are the same. One device: always 1. An even load over devices leaves experts free.

Source: Dai et al. 2024, equations 12 to 17.
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.routers import load_balancing_loss


@method(family="mixtures", paper="deepseekmoe")
def expert_balance_loss(
    probs: Float[Tensor, "tokens experts"],
    experts: Int[Tensor, "tokens k"],
    *,
    mask: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Σ f P over routed experts, 1 at an even load: `load_balancing_loss` divided by the picks a token makes.

    Args:
        probs: p, rows sum to 1.
        experts: picks, -1 is none.
        mask: True for real tokens.

    Returns:
        Scalar; multiply by α₁, 0.01 in the 2B model.

    Source: Dai et al. 2024, equations 12 to 14.
    """
    return load_balancing_loss(probs, experts, mask=mask) / max(experts.shape[1], 1)


@method(family="mixtures", paper="deepseekmoe")
def device_balance_loss(
    probs: Float[Tensor, "tokens experts"],
    experts: Int[Tensor, "tokens k"],
    *,
    device_groups: Annotated[int, Range(1, 4096)] = 1,
    mask: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Σ f' P' over groups of neighbouring experts, 1 at an even load of the groups.

    Args:
        probs: p, rows sum to 1.
        experts: picks, -1 is none.
        device_groups: D, groups of equally many experts; must divide their number.
        mask: True for real tokens.

    Returns:
        Scalar; multiply by α₂, 0.05 in the 145B model.

    Raises:
        ValueError: device_groups does not divide the number of experts.

    Source: Dai et al. 2024, equations 15 to 17.
    """
    n_experts = probs.shape[1]
    if n_experts % device_groups:
        raise ValueError(
            f"device_groups must divide the {n_experts} routed experts, got {device_groups} (device_balance_loss)"
        )
    # With groups as experts: N'/(K' T) times the mean count in a group is D/(K' T) times the group's count.
    size = n_experts // device_groups
    grouped = torch.where(experts >= 0, experts.div(size, rounding_mode="floor"), -1)
    return expert_balance_loss(probs.unflatten(1, (device_groups, size)).sum(2), grouped, mask=mask)
