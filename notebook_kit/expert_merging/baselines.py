"""Baselines that expert merging must beat: drop the experts that are used least, or average without alignment."""

import copy
from typing import Annotated

import torch
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.expert_merging.align_experts import Aligner, average_group
from notebook_kit.expert_merging.m_smoe import SIMILARITIES, expert_similarity, plan_m_smoe
from notebook_kit.expert_merging.mapped import ARCHITECTURES, shell
from notebook_kit.expert_merging.plan import (
    LayerPlan,
    apply_plan,
    check_n_experts,
    dominant_experts,
    group_by_similarity,
    usage_of,
)
from notebook_kit.expert_merging.view import expert_view
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routing import RoutingTrace


@method(family="expert_merging", paper="m-smoe")
def average_experts(
    model: nn.Module,
    trace: RoutingTrace,
    *,
    n_experts: Annotated[int, Range(1, 512)] = 4,
    align: bool = False,
    similarity: Annotated[str, Choice(*SIMILARITIES)] = "router-logits",
    adaptive: bool = False,
) -> nn.Module:
    """Average the experts of each group entry by entry: the control that shows what alignment and usage are worth.

    Groups as in `m_smoe`; then W = mean of the members' weights, unit j of one with unit j of the other, although
    hidden units have no common order.

    Args:
        model: as `m_smoe`.
        trace: `record_routing(model)` over calibration text.
        n_experts: experts that each layer stores afterwards; on average where adaptive.
        align: bring members into the dominant expert's order first.
        similarity: what groups experts.
        adaptive: rank experts over all layers together.

    Returns:
        A new model, as `m_smoe`.

    Raises:
        ValueError, UnknownExperts: as `m_smoe`.

    Source: the averaging baseline of Li et al. (2023), section 4.
    """
    plan = plan_m_smoe(
        model, trace, n_experts=n_experts, similarity=similarity, merge_weights="uniform", adaptive=adaptive,
        owner="average_experts",
    )  # fmt: skip
    return apply_plan(model, plan, average_group(Aligner("weight" if align else "none")))


@method(family="expert_merging", paper="not-all-experts-are-equal")
def drop_experts(
    model: nn.Module,
    trace: RoutingTrace,
    *,
    n_experts: Annotated[int, Range(1, 512)] = 4,
    by: Annotated[str, Choice("frequency", "probability", "random", "reversed")] = "frequency",
    router: Annotated[str, Choice("drop", "map")] = "drop",
    adaptive: bool = False,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
) -> nn.Module:
    """Keep the experts that are used most and delete the others.

    Args:
        model: as `m_smoe`.
        trace: `record_routing(model)` over calibration text.
        n_experts: experts that each layer keeps.
        by: what decides: "frequency" (share of routed slots), "probability" (mean router probability), or a control:
            "random", "reversed" (the least used stay).
        router: "drop" deletes the router rows too, so that softmax and top-k renormalise over those that stay; "map"
            keeps all rows and leads those of a deleted expert to the kept one whose router logits are most alike.
        adaptive: rank experts over all layers together (router="map" only).
        seed: of by="random".

    Returns:
        A new model: with "drop" of the very same class, with fewer experts in its configuration (and fewer chosen
        per token if less than top-k remain); with "map" as `m_smoe`.

    Raises:
        ValueError: as `m_smoe`; adaptive with router="drop"; "drop" on a router with groups of experts, or on a
            list of experts.

    Source: Lu et al. (2024) use frequency as a baseline to reconstruction loss; Lucky-Lance/Expert_Sparsity.
    """
    usage = usage_of(trace, model)
    check_n_experts(n_experts, usage, "drop_experts")
    layers = expert_view(model)
    scores = usage
    if by == "probability":
        scores = {layer.name: trace.layer(i).probs.mean(0) for i, layer in enumerate(layers)}
    elif by == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {name: torch.rand(len(shares), generator=generator) for name, shares in usage.items()}
    elif by == "reversed":
        scores = {name: -shares for name, shares in usage.items()}
    if router == "drop" and adaptive:
        raise ValueError('adaptive keeps another number in each layer, which needs router="map" (drop_experts)')
    kept = dominant_experts(scores, n_experts, adaptive=adaptive)
    if router == "drop":
        return _without_rows(model, kept, n_experts)
    plan = {}
    for number, layer in enumerate(layers):
        groups = group_by_similarity(kept[layer.name], expert_similarity(layer, trace.layer(number).logits))
        plan[layer.name] = LayerPlan(groups, tuple((1.0, *(0.0,) * (len(group) - 1)) for group in groups))
    return apply_plan(model, plan, average_group(Aligner("none")))


def _without_rows(model: nn.Module, kept: dict[str, list[int]], n_experts: int) -> nn.Module:
    """Copy a transformers model with the kept experts and router rows only."""
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
    config.num_experts_per_tok = min(config.num_experts_per_tok, n_experts)
    for layer in expert_view(model):
        experts, gate, rows = shell(layer.experts), shell(layer.block.gate), torch.tensor(kept[layer.name])
        for module in (experts, gate):
            _keep_rows(module, rows)
            module.num_experts = n_experts
        experts.config, gate.top_k = config, config.num_experts_per_tok
        memo |= {id(layer.experts): experts, id(layer.block.gate): gate}
    new = copy.deepcopy(model, memo)
    for layer in expert_view(new):
        if hasattr(layer.block, "top_k"):
            layer.block.top_k = config.num_experts_per_tok
    if hasattr(new, "num_experts"):  # what the balance loss counts with
        new.num_experts, new.num_experts_per_tok = n_experts, config.num_experts_per_tok
    return new


def _keep_rows(module: nn.Module, rows: Tensor) -> None:
    """Every parameter and buffer of fused experts and of their router has one entry an expert on its first axis."""
    module._parameters = {
        name: nn.Parameter(p.detach()[rows].clone(), requires_grad=p.requires_grad)
        for name, p in module._parameters.items()
    }
    module._buffers = {name: b[rows].clone() for name, b in module._buffers.items()}
