"""From a plan to the smaller model: one stored expert a group, combined as the method says."""

import copy
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.expert_merging.layout import fused_parts
from notebook_kit.expert_merging.mapped import replaced
from notebook_kit.expert_merging.mapped_experts import shell, shrink
from notebook_kit.expert_merging.plan import LayerPlan
from notebook_kit.expert_merging.sum_router import sum_rows
from notebook_kit.expert_merging.view import ExpertLayer, check_finite, expert_view

# Gate [f, d], up [f, d], down [d, f], and their biases where the architecture has them.
Expert = tuple[Float[Tensor, "..."], ...]
Combine = Callable[[ExpertLayer, tuple[int, ...], tuple[float, ...]], Expert]


def apply_plan(model: nn.Module, plan: Mapping[str, LayerPlan], combine: Combine, *, router: str = "map") -> nn.Module:
    """Build the smaller model: one stored expert a group, the router's rows untouched, tied through a map.

    Args:
        model: with its experts unmerged; not modified.
        plan: block name to `LayerPlan`, one for each routed layer.
        combine: (layer, group, weights) -> (gate [f, d], up [f, d], down [d, f], and biases if there are any; the
            layer's `parts`) of the expert that stands for it.
        router: "map" (rows are chosen one by one, and lead to their group) or "sum" (groups are chosen, by the sum of
            their rows' probabilities).

    Returns:
        A new model. transformers models are of a subclass of their class that `save_pretrained` and
        `from_pretrained` carry; a list of experts holds one module several times.

    Raises:
        ValueError: NaN or Inf in an expert; the plan lacks a layer or has a wrong number of experts; "sum" on a list
            of experts or a router without a softmax.
    """
    check_finite(model)
    layers = expert_view(model)
    missing = [layer.name for layer in layers if layer.name not in plan]
    if missing:
        raise ValueError(f"the plan has no layer {missing[0]!r}, only {', '.join(plan)}")
    experts = {}
    for layer in layers:
        groups = plan[layer.name]
        if len(groups.expert_map) != len(layer):
            raise ValueError(f"the plan of {layer.name!r} is for {len(groups.expert_map)} experts, it has {len(layer)}")
        build = _fused if layer.fused else _named if isinstance(layer.experts, nn.ModuleDict) else _listed
        experts[layer.name] = build(layer, groups, combine)
    new = replaced(model, experts)
    return sum_rows(new) if router == "sum" else new


@torch.no_grad()
def _fused(layer: ExpertLayer, plan: LayerPlan, combine: Combine) -> nn.Module:
    new = shrink(shell(layer.experts), plan.expert_map)
    parts = fused_parts(new)
    for number, (group, weights) in enumerate(zip(plan.groups, plan.weights, strict=True)):
        for part, tensor in zip(parts, combine(layer, group, weights), strict=True):
            part[number].copy_(tensor)
    return new


def _listed(layer: ExpertLayer, plan: LayerPlan, combine: Combine) -> nn.ModuleList:
    merged = _modules(layer, plan, combine)
    return nn.ModuleList(merged[place] for place in plan.expert_map)


def _named(layer: ExpertLayer, plan: LayerPlan, combine: Combine) -> nn.ModuleDict:
    new = shrink(shell(layer.experts), plan.expert_map)
    new.update(zip(new, _modules(layer, plan, combine), strict=True))
    return new


@torch.no_grad()
def _modules(layer: ExpertLayer, plan: LayerPlan, combine: Combine) -> list[nn.Module]:
    """One module a group."""
    merged, experts = [], list(layer.experts.children())
    for group, weights in zip(plan.groups, plan.weights, strict=True):
        expert = copy.deepcopy(experts[group[0]])
        for name, tensor in zip(layer.names, combine(layer, group, weights), strict=True):
            getattr(expert, name).weight.copy_(tensor)
        merged.append(expert)
    return merged
