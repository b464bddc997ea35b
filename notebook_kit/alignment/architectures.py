"""Permutation specs read from a model or its configuration: what may be reordered in each known architecture."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from notebook_kit.alignment.conv_nets import chain_spec, children_of, resnet_spec
from notebook_kit.alignment.decoders import llama
from notebook_kit.alignment.encoders import bert, vit
from notebook_kit.alignment.spec import PermutationSpec
from notebook_kit.alignment.spec_table import Table
from notebook_kit.alignment.t5 import t5

LLAMA_LIKE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "olmo2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
)
SUPPORTED = (*LLAMA_LIKE, "bert", "vit", "t5", "mt5", "resnet")
STREAM = "residual"


def permutation_spec(
    model_or_config,
    *,
    weights: Mapping[str, Tensor] | None = None,
    residual: bool = False,
    expert_order: bool = False,
) -> PermutationSpec:
    """Say which axes of a network's weights must be permuted together.

    Hidden units of feed-forward layers (gate rows, up rows, down columns share one permutation; each expert has its
    own), whole attention heads (a key-value head takes its group of query heads along, which may also be reordered
    among themselves; nothing moves inside a head, where rotary positions live), channels of convolutions with their
    batch norm, and optionally the residual stream.

    Args:
        model_or_config: an `MLP`, an `nn.Sequential` of linear layers and convolutions (such as `VGG`), a `ResNet`, a
            transformers model, or its configuration.
        weights: state dict or `Checkpoint` whose names to use, when they are not the model's (files of Mixtral keep
            one tensor per expert).
        residual: permute the residual stream too: one permutation for the whole stack; in a ResNet one for each
            stretch between shortcuts.
        expert_order: permute the routed experts of each layer, too, with their router rows; each one's units move
            within it. Only where experts are fused tensors. Matching it by weights takes E² assignments a layer.

    Returns:
        PermutationSpec.

    Raises:
        ValueError: an architecture that is not known; the text lists those that are. An order of experts where there
            is none.

    Source: after the specs of samuela/git-re-basin; those for transformers follow from the architectures.
    """
    config = getattr(model_or_config, "config", model_or_config)
    kind = getattr(config, "model_type", None)
    if kind is None:
        return _ours(model_or_config, residual)
    # A model merged by this kit keeps its experts' layout under a name of its own.
    kind = kind.removeprefix("mapped_")
    if kind not in SUPPORTED:
        raise ValueError(
            f"no permutation spec for model type {kind!r}: known are {', '.join(SUPPORTED)}, MLP and nn.Sequential; "
            "write one with PermutationSpec(axes, sizes)"
        )
    if weights is None:
        weights = (model_or_config if isinstance(model_or_config, nn.Module) else _hollow(config)).state_dict()
    if kind == "resnet":
        return resnet_spec(weights, residual, kind)
    table = Table({name: len(_shape(weights, name)) for name in weights}, config, STREAM if residual else None)
    table.expert_order = expert_order
    {"bert": bert, "vit": vit, "t5": t5, "mt5": t5}.get(kind, llama)(table, kind, config)
    if residual:
        table.sizes[STREAM] = config.hidden_size
    if expert_order and not any(perm.endswith(".order") for perm in table.sizes):
        raise ValueError(f"{kind} has no routed experts that could be reordered: use expert_order=False")
    return PermutationSpec(table.axes, table.sizes, inside=table.inside, description=kind)


def _ours(model: nn.Module, residual: bool) -> PermutationSpec:
    """A network of the kit, or an nn.Sequential."""
    from notebook_kit.models import MLP, ResNet

    if isinstance(model, MLP):
        return chain_spec(model, [(f"layers.{i}", layer) for i, layer in enumerate(model.layers)])
    if isinstance(model, nn.Sequential):
        return chain_spec(model, children_of(model))
    if isinstance(model, ResNet):
        return resnet_spec(model.state_dict(), residual, "ResNet")
    raise ValueError(
        f"no permutation spec for {type(model).__name__}: known are MLP, VGG, ResNet, nn.Sequential of linear layers "
        f"and convolutions, and transformers models of type {', '.join(SUPPORTED)}; write one with "
        "PermutationSpec(axes, sizes)"
    )


def _hollow(config) -> nn.Module:
    """The architecture without weights, for its names and shapes."""
    import transformers

    name = (getattr(config, "architectures", None) or [None])[0]
    automatic = transformers.AutoModelForCausalLM if config.model_type in LLAMA_LIKE else transformers.AutoModel
    with torch.device("meta"):
        return getattr(transformers, name)(config) if name else automatic.from_config(config)


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return weights.spec()[name][0] if hasattr(weights, "spec") else tuple(weights[name].shape)
