"""Fewer rows in the router itself: delete them, or average those of a group."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from notebook_kit.expert_merging.apply import Combine
from notebook_kit.expert_merging.mapped import ARCHITECTURES
from notebook_kit.expert_merging.mapped_experts import shell
from notebook_kit.expert_merging.plan import LayerPlan
from notebook_kit.expert_merging.view import check_finite, expert_view


def keep_rows(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """Copy a transformers model with some experts and their router rows only.

    Softmax and top-k then run over the rows that are left, and renormalise by themselves.

    Args:
        model: not modified.
        kept: block name to the experts that stay, equally many in each layer.

    Returns:
        A model of the very same class.

    Raises:
        ValueError: a list of experts, a router with groups, or another number of experts in each layer.
    """
    check_finite(model)
    numbers = {len(experts) for experts in kept.values()}
    if len(numbers) != 1:
        raise ValueError(f"a configuration knows one number of experts, layers would keep {sorted(numbers)}")
    (n_experts,) = numbers
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in ARCHITECTURES:
        raise ValueError(
            f'router="drop" needs a transformers model of type {", ".join(ARCHITECTURES)}, got '
            f'{type(model).__name__}; router="map" works here'
        )
    if (getattr(config, "n_group", None) or 1) > 1:
        raise ValueError(
            f"{type(model).__name__} picks {config.n_group} groups of experts before experts: rows cannot be deleted "
            'freely; use router="map"'
        )
    config, memo = copy.deepcopy(config), {}
    memo[id(model.config)] = config
    setattr(config, ARCHITECTURES[config.model_type][1], n_experts)
    if hasattr(config, "num_experts_per_tok"):
        config.num_experts_per_tok = min(config.num_experts_per_tok, n_experts)
    for layer in expert_view(model):
        experts, gate, rows = shell(layer.experts), shell(layer.router_module), torch.tensor(list(kept[layer.name]))
        if isinstance(experts, nn.ModuleDict):
            _keep_modules(experts, gate, rows)
        else:
            for module in (experts, gate):
                _keep_rows(module, rows)
            experts.config, gate.top_k = config, config.num_experts_per_tok
        experts.num_experts = gate.num_experts = n_experts
        memo |= {id(layer.experts): experts, id(layer.router_module): gate}
    new = copy.deepcopy(model, memo)
    for part in ("encoder", "decoder") if config.is_encoder_decoder else ():  # have configurations of their own
        setattr(getattr(new, part).config, ARCHITECTURES[config.model_type][1], n_experts)
    for layer in expert_view(new):
        if hasattr(layer.block, "top_k"):
            layer.block.top_k = config.num_experts_per_tok
    if hasattr(new, "num_experts"):  # what the balance loss counts with
        new.num_experts, new.num_experts_per_tok = n_experts, config.num_experts_per_tok
    return new


def _keep_rows(module: nn.Module, rows: Tensor) -> None:
    """Every parameter and buffer of fused experts and of their router has one entry an expert on its first axis."""
    module._parameters = {
        name: None if p is None else nn.Parameter(p.detach()[rows].clone(), requires_grad=p.requires_grad)
        for name, p in module._parameters.items()
    }
    module._buffers = {name: b[rows].clone() for name, b in module._buffers.items()}


def _keep_modules(experts: nn.ModuleDict, router: nn.Module, rows: Tensor) -> None:
    """Switch keeps experts in a dictionary, numbered by their names, and its router's rows in a linear layer."""
    modules = list(experts.values())
    experts._modules = {f"expert_{place}": modules[row] for place, row in enumerate(rows.tolist())}
    router.classifier = shell(router.classifier)
    _keep_rows(router.classifier, rows)
    router.classifier.out_features = len(rows)


@torch.no_grad()
def mean_rows(model: nn.Module, plan: Mapping[str, LayerPlan], combine: Combine) -> nn.Module:
    """Apply a plan with one router row a group, the mean of its members' rows.

    A group then counts once in the softmax, however many members it had: its share of the tokens changes.

    Args:
        model: as `keep_rows`.
        plan: equally many groups in each layer.
        combine: as `apply_plan`.

    Returns:
        A model of the very same class.
    """
    new = copy.deepcopy(model)
    for layer, whole in zip(expert_view(new), expert_view(model), strict=True):
        parts = {name: getattr(layer, name).clone() for name in layer.parts}
        for group, weights in zip(plan[layer.name].groups, plan[layer.name].weights, strict=True):
            for name, tensor in zip(parts, combine(whole, group, weights), strict=True):
                parts[name][group[0]] = tensor
            for row in (*layer.router_module.parameters(), *layer.router_module.buffers()):
                row[group[0]] = row[list(group)].mean(0)
        layer.write(**parts)
    return keep_rows(new, {name: layer.dominant for name, layer in plan.items()})
