"""Models that store fewer experts than their router has rows: a map leads each row to a stored expert.

The router keeps its N rows, so its decisions stay what they were; top-k may meet one stored expert twice, and then
its two weights add up. Importing this module tells the Auto classes about the `mapped_*` model types, so that
`AutoModelForCausalLM.from_pretrained(folder)` restores a merged model. Where the import cannot be had, as in another
program, `trust_remote_code=True` does the same: a folder carries a file that imports it.
"""

import copy
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import transformers
from torch import nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from notebook_kit.expert_merging.mapped_experts import MappedExperts, class_of, shrink
from notebook_kit.expert_merging.sum_router import sum_rows
from notebook_kit.expert_merging.view import expert_view
from notebook_kit.routing.switch import is_switch_router

# model type: (name of its configuration and model, where the configuration keeps the number of router rows)
ARCHITECTURES = {
    "mixtral": ("Mixtral", "num_local_experts"),
    "qwen2_moe": ("Qwen2Moe", "num_experts"),
    "qwen3_moe": ("Qwen3Moe", "num_experts"),
    "olmoe": ("Olmoe", "num_experts"),
    "deepseek_v3": ("DeepseekV3", "n_routed_experts"),
    "gpt_oss": ("GptOss", "num_local_experts"),
    "switch_transformers": ("SwitchTransformers", "num_experts"),
}
ENCODERS = ("switch_transformers",)  # an encoder and a decoder; all others are decoders
LOADER = "merged_experts"
LOADER_CODE = '''"""The experts of this model are merged: transformers needs the package that merged them to load it."""

from {module} import {names}  # noqa: F401
'''
# (family, model type): (configuration, model, the model's base)
_models: dict[tuple[str, str], tuple[type, type, type]] = {}


def _stay_here(cls: type, auto_class: object = None) -> None:
    """In place of `register_for_auto_class`: transformers would copy this module into folders that import it."""


class MergedConfig:
    """Before a class of configurations: a folder that it is saved to can be loaded by programs that know no kit."""

    register_for_auto_class = classmethod(_stay_here)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Save config.json, and the file that its `auto_map` names."""
        auto_model, _ = _heads(type(self).unmerged_type)
        names = {"AutoConfig": type(self).__name__, auto_model: _model_class(type(self)).__name__}
        self.auto_map = {auto: f"{LOADER}.{name}" for auto, name in names.items()}
        super().save_pretrained(save_directory, **kwargs)
        code = LOADER_CODE.format(module=type(self).__module__, names=", ".join(names.values()))
        (Path(save_directory) / f"{LOADER}.py").write_text(code, "utf-8")


class MappedModel:
    """Before a class of models: `config.expert_map`, layer to map, says how many experts each layer stores.

    `config.router_rows` is "map" (every router row is chosen by itself) or "sum" (see `SumRouter`).
    """

    fields: ClassVar = {"expert_map": None, "router_rows": "map"}
    register_for_auto_class = classmethod(_stay_here)

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if not config.expert_map:
            raise ValueError(f"{type(config).__name__} needs expert_map: layer to one stored expert per row")
        for layer in expert_view(self):
            self.prepare(layer.experts, layer_number(layer.name))
        if config.router_rows == "sum":
            sum_rows(self)

    def _init_weights(self, module: nn.Module) -> None:
        # That of Switch's block looks for as many experts as the router has rows; its parts are met one by one too.
        if not is_switch_router(getattr(module, "router", None)):
            super()._init_weights(module)

    def prepare(self, experts: nn.Module, number: str) -> None:
        """Give the experts of one layer the shapes that the configuration says."""
        shrink(experts, self.config.expert_map[number])


def replaced(model: nn.Module, experts: Mapping[str, nn.Module]) -> nn.Module:
    """Copy a model with other experts in place of its own, which are not copied.

    Args:
        model: not modified.
        experts: block name to the new `experts` module.

    Returns:
        The new model: of a subclass that saves and loads, where experts are `MappedExperts`.

    Raises:
        ValueError: an architecture that could not be saved.
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
    """The number of the layer in a block's name, as config.json writes it: "3", "encoder.3" or "decoder.3"."""
    found = re.search(r"(?:^|\.)(?:layers|(encoder|decoder)\.block)\.(\d+)\.", name)
    if found is None:
        raise ValueError(f"the block {name!r} stands in no numbered layer, so its map cannot be written to a config")
    return ".".join(filter(None, found.groups()))


def _classes(model: nn.Module, family: str) -> tuple[type, type]:
    # Merged experts may be factored, but not merged again: the map of the first merge would be lost.
    own = type(model) if family == MappedExperts.family else getattr(type(model), "unmerged", type(model))
    for (known, _), (config_class, model_class, base) in _models.items():
        if known == family and base is own:
            return config_class, model_class
    names = ", ".join(name + _heads(kind)[1] for kind, (name, _) in ARCHITECTURES.items())
    raise ValueError(f"merged experts of {type(model).__name__} could not be saved and loaded again; known are {names}")


def _heads(kind: str) -> tuple[str, str]:
    """The Auto class of a model type, and how the names of its models end."""
    if kind in ENCODERS:
        return "AutoModelForSeq2SeqLM", "ForConditionalGeneration"
    return "AutoModelForCausalLM", "ForCausalLM"


def _model_class(config_class: type) -> type:
    return next(model for config, model, _ in _models.values() if config is config_class)


def merged_classes(kind: str) -> tuple[type, type]:
    """Configuration and model class of a merged architecture.

    Args:
        kind: model type of the original, such as "mixtral".
    """
    return _models[MappedExperts.family, kind][:2]


def register(mixin: type, model_mixin: type, *, same_files: bool) -> None:
    """Make a configuration and a model class of each architecture, and tell the Auto classes about them.

    Args:
        mixin: of its experts; `family` and `settings` name the model type and the configuration's new fields.
        model_mixin: of the model, whose `prepare` shapes the experts.
        same_files: files keep one tensor an expert, under the names of the architecture.
    """
    family, here = mixin.family, {"__module__": model_mixin.__module__}
    for kind, (name, _) in ARCHITECTURES.items():
        auto_model, head = _heads(kind)
        config_base, base = (getattr(transformers, f"{name}{end}") for end in ("Config", head))
        fields = {**here, "__doc__": f"{name}Config for {family} experts.", "model_type": f"{family}_{kind}"}
        fields["unmerged_type"] = kind
        config = type(
            f"{family.capitalize()}{name}Config", (MergedConfig, config_base), {**fields, **model_mixin.fields}
        )
        fields = {**here, "__doc__": f"{name}{head} that stores fewer experts.", "config_class": config}
        model = type(f"{family.capitalize()}{name}{head}", (model_mixin, base), {**fields, "unmerged": base})
        for made in (config, model):
            setattr(sys.modules[model_mixin.__module__], made.__name__, made)
        transformers.AutoConfig.register(config.model_type, config)
        getattr(transformers, auto_model).register(config, model)
        if same_files and (conversion := get_checkpoint_conversion_mapping(kind)):
            register_checkpoint_conversion_mapping(config.model_type, conversion)
        class_of(mixin, getattr(sys.modules[base.__module__], f"{name}Experts"))
        _models[family, kind] = config, model, base


register(MappedExperts, MappedModel, same_files=True)
