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
from typing import ClassVar

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
    "gpt_oss": ("GptOss", "num_local_experts"),
}
# (family, model type): (configuration, model, the model's base)
_models: dict[tuple[str, str], tuple[type, type, type]] = {}


class MappedExperts:
    """Before a class of fused experts: choices of router rows become choices of stored experts."""

    family = "mapped"
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


class SumRouter:
    """Before a class of softmax routers: tokens choose groups, and a group's probability is the sum of its members'.

    P_g = Σ_{i ∈ g} p_i, which sum to 1 as p does; top-k and its renormalisation then run over P. A chosen group is
    named by its first row, so that experts and traces see router rows as ever.
    """

    family = "sum"
    expert_map: tuple[int, ...]

    def group_probs(self, logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens groups"]:
        """P, float32."""
        p = logits.float().softmax(-1)
        return p.new_zeros(len(p), max(self.expert_map) + 1).index_add(1, lookup(self.expert_map, p.device), p)

    def forward(self, hidden_states: Float[Tensor, "*batch d"]) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of all rows, the weights of the chosen groups, and their first rows.

        Args:
            hidden_states: inputs.
        """
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = nn.functional.linear(x, self.weight, getattr(self, "bias", None))
        probs = self.group_probs(logits)
        top, group = probs.topk(min(self.top_k, probs.shape[1]), dim=-1)
        if getattr(self, "norm_topk_prob", True):  # Mixtral and gpt-oss always do
            top = top / top.sum(-1, keepdim=True)
        first = tuple(map(self.expert_map.index, range(probs.shape[1])))
        return logits, top.to(logits.dtype), lookup(first, group.device)[group]


def sum_rows(model: nn.Module) -> nn.Module:
    """Let the routers of a merged model add up the probabilities of a group, in place.

    Raises:
        ValueError: experts in a list, or a router without a softmax.
    """
    for layer in expert_view(model):
        router = layer.router_module
        if not isinstance(layer.experts, MappedExperts) or hasattr(router, "e_score_correction_bias"):
            raise ValueError(
                f'router="sum" adds up softmax probabilities of a transformers model; {layer.name!r} has a '
                f'{type(router).__name__} and {type(layer.experts).__name__}: use router="map"'
            )
        if not isinstance(router, SumRouter):
            router.__class__ = class_of(SumRouter, type(router))
        router.expert_map = layer.expert_map
    model.config.router_rows = "sum"
    return model


class MappedModel:
    """Before a class of models: `config.expert_map`, decoder layer to map, says how many experts each layer stores.

    `config.router_rows` is "map" (every router row is chosen by itself) or "sum" (see `SumRouter`).
    """

    fields: ClassVar = {"expert_map": None, "router_rows": "map"}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if not config.expert_map:
            raise ValueError(f"{type(config).__name__} needs expert_map: decoder layer to one stored expert per row")
        for layer in expert_view(self):
            self.prepare(layer.experts, layer_number(layer.name))
        if config.router_rows == "sum":
            sum_rows(self)

    def prepare(self, experts: nn.Module, number: str) -> None:
        """Give the experts of one layer the shapes that the configuration says."""
        shrink(experts, self.config.expert_map[number])


def shrink(experts: nn.Module, expert_map: Sequence[int]) -> nn.Module:
    """Give a module of fused experts new, uninitialised tensors with as many experts as the map names, in place."""
    stored = max(expert_map) + 1
    if sorted(set(expert_map)) != list(range(stored)):
        raise ValueError(f"expert_map must lead to every stored expert 0..{stored - 1}, got {list(expert_map)}")
    for name, old in dict(experts.named_parameters(recurse=False)).items():
        new = torch.empty((stored, *old.shape[1:]), dtype=old.dtype, device=old.device)
        setattr(experts, name, nn.Parameter(new, requires_grad=old.requires_grad))
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


def replaced(model: nn.Module, experts: Mapping[str, nn.Module]) -> nn.Module:
    """Copy a model with other experts in place of its own, which are not copied.

    Args:
        model: not modified.
        experts: block name to the new `experts` module.

    Returns:
        The new model: of a subclass that saves and loads, where experts are `MappedExperts`.
    """
    memo = {id(layer.experts): experts[layer.name] for layer in expert_view(model)}
    families = {getattr(new, "family", None) for new in experts.values()}
    fused = families != {None}
    if fused:
        config_class, model_class = _classes(model, *families)
        config = config_class.from_dict(model.config.to_dict() | {"model_type": config_class.model_type})
        describe(config, experts)
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


def describe(config, experts: Mapping[str, MappedExperts]) -> None:
    """Write into a configuration what each layer's experts say of themselves."""
    settings = {layer_number(name): new.settings() for name, new in experts.items()}
    for key in next(iter(settings.values())):
        setattr(config, key, {number: values[key] for number, values in settings.items()})


def layer_number(name: str) -> str:
    """The number of the decoder layer in a block's name, as config.json writes it."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if found is None:
        raise ValueError(f"the block {name!r} stands in no numbered layer, so its map cannot be written to a config")
    return found[1]


def _classes(model: nn.Module, family: str) -> tuple[type, type]:
    # Merged experts may be factored, but not merged again: the map of the first merge would be lost.
    own = type(model) if family == MappedExperts.family else getattr(type(model), "unmerged", type(model))
    for (known, _), (config_class, model_class, base) in _models.items():
        if known == family and base is own:
            return config_class, model_class
    names = ", ".join(f"{name}ForCausalLM" for name, _ in ARCHITECTURES.values())
    raise ValueError(f"merged experts of {type(model).__name__} could not be saved and loaded again; known are {names}")


def merged_classes(kind: str) -> tuple[type, type]:
    """Configuration and model class of a merged architecture.

    Args:
        kind: model type of the original, such as "mixtral".
    """
    return _models[MappedExperts.family, kind][:2]


@lru_cache
def lookup(expert_map: tuple[int, ...], device: torch.device) -> Int[Tensor, " experts"]:
    return torch.tensor(expert_map, device=device)


@lru_cache
def class_of(mixin: type, experts_class: type[nn.Module]) -> type[nn.Module]:
    """The class `mixin` before a class of fused experts; one class for each pair, so that it can be pickled."""
    name = f"{mixin.family.capitalize()}{experts_class.__name__}"
    made = type(name, (mixin, experts_class), {"__module__": mixin.__module__, "__doc__": mixin.__doc__})
    setattr(sys.modules[mixin.__module__], name, made)
    return made


def register(mixin: type, model_mixin: type, *, same_files: bool) -> None:
    """Make a configuration and a model class of each architecture, and tell the Auto classes about them.

    Args:
        mixin: of its experts; `family` and `settings` name the model type and the configuration's new fields.
        model_mixin: of the model, whose `prepare` shapes the experts.
        same_files: files keep one tensor an expert, under the names of the architecture.
    """
    family, here = mixin.family, {"__module__": mixin.__module__}
    for kind, (name, _) in ARCHITECTURES.items():
        config_base, base = (getattr(transformers, f"{name}{end}") for end in ("Config", "ForCausalLM"))
        fields = {**here, "__doc__": f"{name}Config for {family} experts.", "model_type": f"{family}_{kind}"}
        config = type(f"{family.capitalize()}{name}Config", (config_base,), {**fields, **model_mixin.fields})
        fields = {**here, "__doc__": f"{name}ForCausalLM that stores fewer experts.", "config_class": config}
        model = type(f"{family.capitalize()}{name}ForCausalLM", (model_mixin, base), {**fields, "unmerged": base})
        for made in (config, model):
            setattr(sys.modules[mixin.__module__], made.__name__, made)
        transformers.AutoConfig.register(config.model_type, config)
        transformers.AutoModelForCausalLM.register(config, model)
        if same_files:
            register_checkpoint_conversion_mapping(config.model_type, get_checkpoint_conversion_mapping(kind))
        class_of(mixin, getattr(sys.modules[base.__module__], f"{name}Experts"))
        _models[family, kind] = config, model, base


register(MappedExperts, MappedModel, same_files=True)
