"""Models that store fewer experts than their router has rows: a map leads each row to a stored expert.

The router keeps its N rows, so its decisions stay what they were; top-k may meet one stored expert twice, and then
its two weights add up. Importing this module tells the Auto classes about the `mapped_*` model types, so that
`AutoModelForCausalLM.from_pretrained(folder)` restores a merged model.
"""

import copy
import re
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from notebook_kit.expert_merging.view import expert_view

# model type: (name of its configuration and model, where the configuration keeps the number of router rows)
ARCHITECTURES = {
    "mixtral": ("Mixtral", "num_local_experts"),
    "qwen2_moe": ("Qwen2Moe", "num_experts"),
    "qwen3_moe": ("Qwen3Moe", "num_experts"),
    "olmoe": ("Olmoe", "num_experts"),
    "deepseek_v3": ("DeepseekV3", "n_routed_experts"),
}
_models: dict[str, type] = {}


class MappedExperts:
    """Before a class of fused experts: choices of router rows become choices of stored experts."""

    expert_map: tuple[int, ...]

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
        stored = _lookup(self.expert_map, top_k_index.device)[top_k_index]
        return super().forward(hidden_states, stored, top_k_weights)


class MappedModel:
    """Before a class of models: `config.expert_map`, decoder layer to map, says how many experts each layer stores."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if not config.expert_map:
            raise ValueError(f"{type(config).__name__} needs expert_map: decoder layer to one stored expert per row")
        for layer in expert_view(self):
            shrink(layer.experts, config.expert_map[layer_number(layer.name)])


def shrink(experts: nn.Module, expert_map: Sequence[int]) -> nn.Module:
    """Give a module of fused experts new, uninitialised tensors with as many experts as the map names, in place."""
    stored = max(expert_map) + 1
    if sorted(set(expert_map)) != list(range(stored)):
        raise ValueError(f"expert_map must lead to every stored expert 0..{stored - 1}, got {list(expert_map)}")
    for name in ("gate_up_proj", "down_proj"):
        old = getattr(experts, name)
        new = torch.empty((stored, *old.shape[1:]), dtype=old.dtype, device=old.device)
        setattr(experts, name, nn.Parameter(new, requires_grad=old.requires_grad))
    experts.num_experts = stored
    if not isinstance(experts, MappedExperts):
        experts.__class__ = _mapped_class(type(experts))
    experts.expert_map = tuple(int(place) for place in expert_map)
    return experts


def shell(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its tensors until they are replaced, and nothing else: not its hooks either."""
    new = copy.copy(module)
    for key, value in vars(module).items():
        if isinstance(value, dict | set):
            new.__dict__[key] = copy.copy(value)
    return new


def replaced(model: nn.Module, experts: Mapping[str, nn.Module], expert_maps: Mapping[str, Sequence[int]]) -> nn.Module:
    """Copy a model with other experts in place of its own, which are not copied.

    Args:
        model: not modified.
        experts: block name to the new `experts` module.
        expert_maps: block name to map, for fused experts of a transformers model.

    Returns:
        The new model: of a subclass that saves and loads, where maps are given.
    """
    memo = {id(layer.experts): experts[layer.name] for layer in expert_view(model)}
    fused = any(isinstance(new, MappedExperts) for new in experts.values())
    if fused:
        config_class, model_class = _classes(model)
        config = config_class.from_dict(model.config.to_dict() | {"model_type": config_class.model_type})
        config.expert_map = {layer_number(name): list(expert_maps[name]) for name in expert_maps}
        config._attn_implementation = model.config._attn_implementation
        config._experts_implementation = model.config._experts_implementation
        memo[id(model.config)] = config
        for new in experts.values():
            new.config = config
    new_model = copy.deepcopy(model, memo)
    if fused:
        new_model.__class__ = model_class
        config.architectures = [model_class.__name__]
    return new_model


def layer_number(name: str) -> str:
    """The number of the decoder layer in a block's name, as config.json writes it."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if found is None:
        raise ValueError(f"the block {name!r} stands in no numbered layer, so its map cannot be written to a config")
    return found[1]


def _classes(model: nn.Module) -> tuple[type, type]:
    known = {kind: classes for kind, classes in _models.items() if type(model) is classes[2]}
    if not known:
        names = ", ".join(classes[2].__name__ for classes in _models.values())
        raise ValueError(
            f"merged experts of {type(model).__name__} could not be saved and loaded again; known are {names}"
        )
    config_class, model_class, _ = next(iter(known.values()))
    return config_class, model_class


@lru_cache
def _lookup(expert_map: tuple[int, ...], device: torch.device) -> Int[Tensor, " experts"]:
    return torch.tensor(expert_map, device=device)


@lru_cache
def _mapped_class(experts_class: type[nn.Module]) -> type[nn.Module]:
    name = f"Mapped{experts_class.__name__}"
    mapped = type(name, (MappedExperts, experts_class), {"__module__": __name__, "__doc__": MappedExperts.__doc__})
    globals()[name] = mapped  # so that a merged model can be pickled
    return mapped


def _register(kind: str, name: str) -> None:
    config_base, model_base = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
    mapped = f"mapped_{kind}"
    here = {"__module__": __name__}
    config = type(
        f"Mapped{name}Config",
        (config_base,),
        {**here, "__doc__": f"{name}Config with `expert_map`.", "model_type": mapped, "expert_map": None},
    )
    model = type(
        f"Mapped{name}ForCausalLM",
        (MappedModel, model_base),
        {**here, "__doc__": f"{name}ForCausalLM that stores fewer experts.", "config_class": config},
    )
    globals().update({config.__name__: config, model.__name__: model})
    transformers.AutoConfig.register(mapped, config)
    transformers.AutoModelForCausalLM.register(config, model)
    # Files keep one tensor an expert, under the names of the architecture.
    register_checkpoint_conversion_mapping(mapped, get_checkpoint_conversion_mapping(kind))
    _mapped_class(getattr(sys.modules[model_base.__module__], f"{name}Experts"))
    _models[kind] = (config, model, model_base)


for _kind, (_name, _) in ARCHITECTURES.items():
    _register(_kind, _name)
