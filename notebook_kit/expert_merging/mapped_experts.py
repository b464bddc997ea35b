"""Experts of which fewer are stored than the router has rows: a map leads each row to a stored expert.

Top-k may meet one stored expert twice, and then its two weights add up.
"""

import copy
import sys
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class MappedExperts:
    """Before a class of fused experts: choices of router rows become choices of stored experts."""

    family = "mapped"
    of_switch: type  # what stands in its place before Switch Transformers' experts
    expert_map: tuple[int, ...]

    def settings(self) -> dict[str, object]:
        """What a configuration must know of these experts before their weights are loaded."""
        return {"expert_map": list(self.expert_map)}

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens d"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens d"]:
        """Run the stored experts.

        Args:
            hidden_states: inputs.
            top_k_index: router rows, 0 to N − 1.
            top_k_weights: what multiplies each one's output.
        """
        stored = lookup(self.expert_map, top_k_index.device)[top_k_index]
        return super().forward(hidden_states, stored, top_k_weights)


class MappedSwitchExperts(MappedExperts):
    """Before Switch Transformers' dictionary of experts: its mask of router rows becomes one of stored experts."""

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens d"],
        selected_experts: Int[Tensor, "tokens 1 experts"],
        routing_weights: Float[Tensor, "tokens 1"],
    ) -> Float[Tensor, "tokens d"]:
        """Run the stored experts.

        Args:
            hidden_states: inputs.
            selected_experts: a 1 for each token's router row; none where the row had no capacity left.
            routing_weights: what multiplies each one's output.
        """
        stored = selected_experts.new_zeros(*selected_experts.shape[:2], len(self))
        stored.index_add_(2, lookup(self.expert_map, stored.device), selected_experts)
        return super(MappedExperts, self).forward(hidden_states, stored, routing_weights)


MappedExperts.of_switch = MappedSwitchExperts


def shrink(experts: nn.Module, expert_map: Sequence[int]) -> nn.Module:
    """Let a module store as many experts as the map names, in place: fused ones in new, uninitialised tensors."""
    stored = max(expert_map) + 1
    if sorted(set(expert_map)) != list(range(stored)):
        raise ValueError(f"expert_map must lead to every stored expert 0..{stored - 1}, got {list(expert_map)}")
    for name, old in dict(experts.named_parameters(recurse=False)).items():
        new = torch.empty((stored, *old.shape[1:]), dtype=old.dtype, device=old.device)
        setattr(experts, name, nn.Parameter(new, requires_grad=old.requires_grad))
    if isinstance(experts, nn.ModuleDict):  # the first ones stay in their places
        experts._modules = dict(list(experts._modules.items())[:stored])
    experts.num_experts = stored
    if not isinstance(experts, MappedExperts):
        experts.__class__ = class_of(MappedExperts, type(experts))
    experts.expert_map = tuple(int(place) for place in expert_map)
    return experts


def shell(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its tensors until they are replaced, and nothing else: not its hooks either."""
    new = copy.copy(module)
    for key, value in vars(module).items():
        if isinstance(value, dict | set):
            new.__dict__[key] = copy.copy(value)
    return new


@lru_cache
def lookup(expert_map: tuple[int, ...], device: torch.device) -> Int[Tensor, " experts"]:
    return torch.tensor(expert_map, device=device)


@lru_cache
def class_of(mixin: type, experts_class: type[nn.Module]) -> type[nn.Module]:
    """The class `mixin` before a class of experts; one class for each pair, so that it can be pickled."""
    if issubclass(experts_class, nn.ModuleDict):
        mixin = mixin.of_switch
        if issubclass(mixin, nn.Module):  # needs nothing of the dictionary
            return mixin
    name = f"{mixin.family.capitalize()}{experts_class.__name__}"
    made = type(name, (mixin, experts_class), {"__module__": mixin.__module__, "__doc__": mixin.__doc__})
    setattr(sys.modules[mixin.__module__], name, made)
    return made
