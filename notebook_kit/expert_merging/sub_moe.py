"""Sub-MoE: cluster experts by what they output, and merge each cluster inside the subspace that it shares."""

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.expert_merging.align_experts import Aligner, average_group
from notebook_kit.expert_merging.apply import apply_plan
from notebook_kit.expert_merging.clusters import k_means, led_by_usage, share_budget
from notebook_kit.expert_merging.factored import KINDS, Factors, factor_experts
from notebook_kit.expert_merging.outputs import Inputs, calibration_inputs, hidden_units, output_statistics
from notebook_kit.expert_merging.plan import LayerPlan, check_n_experts, merge_weights_of, usage_of
from notebook_kit.expert_merging.subspace import merge_in_subspace, whitening_of
from notebook_kit.expert_merging.view import ExpertLayer, expert_view
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routing import RoutingTrace
from notebook_kit.weights import at_least_float32


@method(family="expert_merging", paper="sub-moe")
def sub_moe(
    model: nn.Module,
    trace: RoutingTrace,
    *,
    n_experts: Annotated[int, Range(1, 512)] = 4,
    rank: Annotated[int | None, Range(1, 1024, log=True)] = None,
    whitening: Annotated[str, Choice("none", "diagonal", "full")] = "none",
    align: bool = False,
    axis: Annotated[str, Choice("output", "input")] = "output",
    merge_weights: Annotated[str, Choice("frequency", "uniform")] = "frequency",
    adaptive: bool = False,
    n_calibration: Annotated[int, Range(64, 16384, log=True)] = 2048,
    batches: Iterable | None = None,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
    inputs: Inputs | None = None,
) -> nn.Module:
    """Merge experts that output alike: one joint SVD a cluster, and a usage-weighted mean of its V blocks.

    1. Every expert runs on every calibration token; Sim(i, j) = mean cosine of E_i(x) and E_j(x), and k-means on the
       outputs, each token's scaled to length 1, so that squared distance is 2 − 2 Sim;
    2. in a cluster, for gate, up and down: [W_1 ... W_n] = U Σ Vᵀ, and W = U_r Σ_r (Σ_i f_i V_i / Σ_i f_i)ᵀ
       (`merge_in_subspace`), f_i expert i's usage.

    Without a rank, step 2 is exactly the usage-weighted average: what helps then is the clustering. With a rank, each
    matrix is stored as two factors, r (out + in) numbers instead of out · in: that saves only where r is below
    out · in / (out + in).

    Args:
        model: as `m_smoe`.
        trace: `record_routing(model)` over calibration text.
        n_experts: clusters of each layer; on average where adaptive.
        rank: r of every stored matrix, at most the smaller side of a matrix; None stores whole matrices.
        whitening: weigh directions by how inputs use them before the SVD: by the second moment of the inputs routed
            to each expert, or its diagonal. Changes nothing without a rank.
        align: bring members into the most used one's order first. gate and up share U over hidden units, which have
            no common order until this is done.
        axis: what the shared basis of a cluster spans.
        merge_weights: by usage, or all alike.
        adaptive: share the clusters of all layers by how much the outputs of their experts differ, mean of 1 − Sim.
        n_calibration: tokens that experts run on.
        batches: inputs to run; the text of the trace by default.
        seed: of k-means.
        inputs: from `calibration_inputs`, to save running the model again.

    Returns:
        A new model, as `m_smoe`; with a rank, one with factored experts.

    Raises:
        ValueError: as `m_smoe`; a rank that matrices do not have; whitening with axis="input".

    Source: Li et al. (2025), read second-hand. The router is kept and its rows mapped, as in M-SMoE; the paper's own
        rule was not to be had. Its rule for an "adaptive" number of clusters is not given either; `adaptive` is ours.
    """
    if inputs is None:
        inputs = calibration_inputs(model, trace, batches, most=n_calibration)
    plan = plan_sub_moe(
        model, trace, inputs, n_experts=n_experts, merge_weights=merge_weights, adaptive=adaptive, seed=seed
    )
    aligner = Aligner("weight" if align else "none")
    if rank is None:
        return apply_plan(model, plan, average_group(aligner))
    experts = {}
    for layer in expert_view(model):
        x, chosen = inputs[layer.name]
        pairs = zip(plan[layer.name].groups, plan[layer.name].weights, strict=True)
        experts[layer.name] = [
            _merge(layer, group, weights, aligner, (at_least_float32(x), chosen), rank, whitening, axis)
            for group, weights in pairs
        ]
    return factor_experts(model, experts, {name: layer.expert_map for name, layer in plan.items()})


def plan_sub_moe(
    model: nn.Module,
    trace: RoutingTrace,
    inputs: Inputs,
    *,
    n_experts: int = 4,
    merge_weights: str = "frequency",
    adaptive: bool = False,
    seed: int = 0,
) -> dict[str, LayerPlan]:
    """Decide which experts join, and with what weight: step 1 of `sub_moe`.

    Returns:
        Block name to `LayerPlan`.
    """
    usage = usage_of(trace, model)
    check_n_experts(n_experts, usage, "sub_moe")
    similar = {layer.name: output_statistics(layer, inputs[layer.name][0])[0] for layer in expert_view(model)}
    counts = share_budget(similar, n_experts) if adaptive else dict.fromkeys(similar, n_experts)
    plan = {}
    for name, cosine in similar.items():
        groups = led_by_usage(k_means(cosine, counts[name], seed=seed), usage[name])
        plan[name] = LayerPlan(groups, merge_weights_of(usage[name], groups, merge_weights))
    return plan


@torch.no_grad()
def _merge(
    layer: ExpertLayer,
    group: tuple[int, ...],
    weights: tuple[float, ...],
    aligner: Aligner,
    seen: tuple[Tensor, Tensor],
    rank: int,
    whitening: str,
    axis: str,
) -> Factors:
    """Step 2 for one cluster."""
    members = [aligner(layer, e, group[0]) for e in group]
    most = min(members[0]["down"].shape)
    if rank > most:
        raise ValueError(f"rank must be in [1, {most}] for the experts of {layer.name!r}, got {rank} (sub_moe)")
    scales: dict[str, list[Tensor] | None] = dict.fromkeys(KINDS)
    if whitening != "none":
        x, chosen = seen
        routed = [x[(chosen == e).any(-1)] for e in group]
        level = x.square().sum(0).mean().item() / len(layer)
        scales["gate"] = scales["up"] = [whitening_of(one, whitening, scale=level) for one in routed]
        hidden = [hidden_units(layer, w, one) for w, one in zip(members, routed, strict=True)]
        level = max(one.square().sum(0).mean().item() for one in hidden)
        scales["down"] = [whitening_of(one, whitening, scale=level) for one in hidden]
    merged: dict = {}
    for name in members[0]:
        parts = [member[name] for member in members]
        if name in KINDS:
            basis = merge_in_subspace(parts, weights, rank=rank, axis=axis, whitening=scales[name])
            merged[name] = (*basis, None)
        else:
            merged[name] = sum(f * part for f, part in zip(weights, parts, strict=True))
    return merged
