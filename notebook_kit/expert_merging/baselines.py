"""Baselines that expert merging must beat: drop the experts that matter least, or average without alignment."""

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import nn

from notebook_kit.catalog import method
from notebook_kit.expert_merging.align_experts import Aligner, average_group
from notebook_kit.expert_merging.apply import apply_plan
from notebook_kit.expert_merging.m_smoe import SIMILARITIES, expert_similarity, plan_m_smoe
from notebook_kit.expert_merging.outputs import Inputs, calibration_inputs
from notebook_kit.expert_merging.plan import LayerPlan, check_n_experts, dominant_experts, group_by_similarity, usage_of
from notebook_kit.expert_merging.reconstruction import best_subset
from notebook_kit.expert_merging.router_rows import keep_rows
from notebook_kit.expert_merging.view import expert_view
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routing import RoutingTrace
from notebook_kit.routing.switch import heard_by


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
    by: Annotated[str, Choice("frequency", "probability", "reconstruction", "random", "reversed")] = "frequency",
    router: Annotated[str, Choice("drop", "map", "sum")] = "drop",
    adaptive: bool = False,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
    n_calibration: Annotated[int, Range(64, 16384, log=True)] = 2048,
    batches: Iterable | None = None,
    inputs: Inputs | None = None,
) -> nn.Module:
    """Keep the experts that matter most and delete the others.

    Args:
        model: as `m_smoe`.
        trace: `record_routing(model)` over calibration text.
        n_experts: experts that each layer keeps.
        by: what decides: "frequency" (share of routed slots), "probability" (mean router probability),
            "reconstruction" (the set whose layer output is nearest to the whole layer's, see `best_subset`), or a
            control: "random", "reversed" (the least used stay).
        router: "drop" deletes the router rows too, so that softmax and top-k renormalise over those that stay; "map"
            keeps all rows and leads those of a deleted expert to the kept one whose router logits are most alike;
            "sum" does the same, and chooses among kept experts by the sum of the probabilities of their rows.
        adaptive: rank experts over all layers together (not with router="drop").
        seed: of by="random".
        n_calibration: tokens that by="reconstruction" looks at.
        batches: inputs for by="reconstruction"; the text of the trace by default.
        inputs: from `calibration_inputs`, to save running the model again.

    Returns:
        A new model: with "drop" of the very same class, with fewer experts in its configuration (and fewer chosen
        per token if less than top-k remain); with "map" and "sum" as `m_smoe`.

    Raises:
        ValueError: as `m_smoe`; adaptive with router="drop" or by="reconstruction"; "drop" on a router with groups of
            experts, or on a list of experts.

    Source: Lu et al. (2024), section 3.1, with frequency as its baseline; Lucky-Lance/Expert_Sparsity.
    """
    usage = usage_of(trace, model)
    check_n_experts(n_experts, usage, "drop_experts")
    layers = expert_view(model)
    scores = usage
    if by == "probability":
        scores = {layer.name: trace.layer(i).probs[heard_by(trace, i)].mean(0) for i, layer in enumerate(layers)}
    elif by == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {name: torch.rand(len(shares), generator=generator) for name, shares in usage.items()}
    elif by == "reversed":
        scores = {name: -shares for name, shares in usage.items()}
    if router == "drop" and adaptive:
        raise ValueError('adaptive keeps another number in each layer, which needs router="map" (drop_experts)')
    if by == "reconstruction":
        if adaptive:
            raise ValueError('adaptive compares layers, which by="reconstruction" does not (drop_experts)')
        if inputs is None:
            inputs = calibration_inputs(model, trace, batches, most=n_calibration)
        kept = {layer.name: best_subset(layer, inputs[layer.name][0], trace, n_experts)[0] for layer in layers}
    else:
        kept = dominant_experts(scores, n_experts, adaptive=adaptive)
    if router == "drop":
        return keep_rows(model, kept)
    plan = {}
    for number, layer in enumerate(layers):
        groups = group_by_similarity(kept[layer.name], expert_similarity(layer, trace.layer(number).logits))
        plan[layer.name] = LayerPlan(groups, tuple((1.0, *(0.0,) * (len(group) - 1)) for group in groups))
    return apply_plan(model, plan, average_group(Aligner("none")), router=router)
