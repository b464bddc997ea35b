"""What expert merging did: how much experts are used, which join, what is stored afterwards, and what it costs."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from notebook_kit.alignment import permute, random_permutations
from notebook_kit.expert_merging import (
    Aligner,
    LayerPlan,
    apply_plan,
    average_group,
    best_subset,
    calibration_inputs,
    expert_similarity,
    expert_view,
    output_statistics,
    plan_hc_smoe,
    plan_m_smoe,
    plan_sub_moe,
    usage_of,
)
from notebook_kit.expert_merging.align_experts import expert_of, spec_of
from notebook_kit.expert_merging.hc_smoe import LINKAGES
from notebook_kit.expert_merging.m_smoe import SIMILARITIES
from notebook_kit.expert_merging.outputs import Inputs
from notebook_kit.expert_merging.plan import check_n_experts, dominant_experts
from notebook_kit.expert_merging.router_rows import keep_rows
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routing import RoutingTrace


def usage_frame(model: nn.Module, trace: RoutingTrace, plan: Mapping[str, LayerPlan] | None = None) -> pd.DataFrame:
    """Say how much each expert is used.

    Args:
        model: a mixture of experts.
        trace: `record_routing(model)` over calibration text.
        plan: from `plan_m_smoe`; adds the groups.

    Returns:
        DataFrame: layer, expert, usage (share of the layer's routed slots); with a plan group and dominant.
    """
    rows = []
    for name, shares in usage_of(trace, model).items():
        for expert, share in enumerate(shares.tolist()):
            row = {"layer": name, "expert": expert, "usage": share}
            if plan is not None:
                row |= {"group": plan[name].expert_map[expert], "dominant": expert in plan[name].dominant}
            rows.append(row)
    return pd.DataFrame(rows)


def groups_frame(plan: Mapping[str, LayerPlan]) -> pd.DataFrame:
    """List the groups of a plan.

    Returns:
        DataFrame: layer, group, dominant, members, weights.
    """
    rows = [
        (name, number, group[0], group, tuple(round(weight, 4) for weight in weights))
        for name, layer in plan.items()
        for number, (group, weights) in enumerate(zip(layer.groups, layer.weights, strict=True))
    ]
    return pd.DataFrame(rows, columns=["layer", "group", "dominant", "members", "weights"])


def expert_sizes(model: nn.Module) -> pd.DataFrame:
    """Count what each routed layer stores.

    Args:
        model: a mixture of experts, merged or not.

    Returns:
        DataFrame: layer, rows (of the router), experts (stored), parameters (of the stored experts), bytes.
    """
    rows = []
    for layer in expert_view(model):
        tensors = list({id(p): p for p in layer.experts.parameters()}.values())
        parameters = sum(p.numel() for p in tensors)
        rows.append((layer.name, len(layer.router), len(layer), parameters, sum(p.nbytes for p in tensors)))
    return pd.DataFrame(rows, columns=["layer", "rows", "experts", "parameters", "bytes"])


def subset_losses_frame(
    model: nn.Module, trace: RoutingTrace, *, n_experts: int = 4, layer: int = 0, inputs: Inputs | None = None
) -> pd.DataFrame:
    """The loss table behind `drop_experts(by="reconstruction")`, best set first.

    Returns:
        DataFrame: kept, loss.
    """
    inputs = calibration_inputs(model, trace, None, most=2048) if inputs is None else inputs
    one = expert_view(model)[layer]
    _, losses = best_subset(one, inputs[one.name][0], trace, n_experts)
    frame = pd.DataFrame({"kept": losses.keys(), "loss": losses.values()})
    frame = frame[frame["kept"].map(len) == n_experts]
    return frame.sort_values("loss", kind="stable", ignore_index=True)


def similarity_matrix(
    model: nn.Module, trace: RoutingTrace, layer: int = 0, basis: str = "router-logits"
) -> np.ndarray:
    """How alike the experts of one layer are.

    Args:
        model: a mixture of experts.
        trace: `record_routing(model)`.
        layer: number of the routed layer.
        basis: as `m_smoe`'s `similarity`.

    Returns:
        S, Float[experts, experts] in [0, 1].
    """
    usage_of(trace, model)
    return expert_similarity(expert_view(model)[layer], trace.layer(layer).logits, basis).cpu().numpy()


def compare_expert_merges(
    model: nn.Module,
    trace: RoutingTrace,
    score: Callable[[nn.Module], float],
    methods: Mapping[str, Callable],
    *,
    n_experts: Iterable[int] = (8, 6, 4, 2, 1),
) -> pd.DataFrame:
    """Score several ways to shrink a model, at several numbers of experts.

    Args:
        model: a mixture of experts; not modified.
        trace: calibration.
        score: model to a number, higher is better.
        methods: name to a function (model, trace, n_experts=...) -> smaller model.
        n_experts: experts per layer.

    Returns:
        DataFrame: n_experts, method, score, parameters (of all stored experts).
    """
    rows = []
    for n in n_experts:
        for name, merge in methods.items():
            new = merge(model, trace, n_experts=n)
            rows.append((n, name, float(score(new)), int(expert_sizes(new)["parameters"].sum())))
    return pd.DataFrame(rows, columns=["n_experts", "method", "score", "parameters"])


METHODS = ("merge", "hierarchical", "subspace", "drop", "replace", "reconstruction")


@dataclass(frozen=True)
class ExpertMergeView:
    """One look at a merge of experts.

    Args:
        model: the smaller model.
        layer: name of the layer shown.
        usage: of its experts, Float[experts].
        groups: its experts, group by group, the dominant one first.
        dropped: experts that were deleted, in no group.
        similarity: of its experts, Float[experts, experts].
        parameters: stored by all experts of the model, before and after.
        joins: how its experts join bottom up, as scipy's linkage matrix, with "hierarchical".
    """

    model: nn.Module = field(repr=False)
    layer: str
    usage: np.ndarray = field(repr=False)
    groups: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...]
    similarity: np.ndarray = field(repr=False)
    parameters: tuple[int, int]
    joins: np.ndarray | None = field(repr=False, default=None)

    @property
    def order(self) -> list[int]:
        """Experts, group by group; deleted ones last."""
        return [expert for group in self.groups for expert in group] + list(self.dropped)


def expert_merge_view(
    model: nn.Module,
    trace: RoutingTrace,
    *,
    n_experts: Annotated[int, Range(1, 512)] = 4,
    method: Annotated[str, Choice(*METHODS)] = "merge",
    align: Annotated[bool | str, Choice(True, False, "activation")] = True,
    similarity: Annotated[str, Choice(*SIMILARITIES)] = "router-logits",
    merge_weights: Annotated[str, Choice("frequency", "uniform", "reversed")] = "frequency",
    linkage: Annotated[str, Choice(*LINKAGES)] = "average",
    adaptive: bool = False,
    layer: Annotated[int, Range(0, 511)] = 0,
    inputs: Mapping | None = None,
    cache: dict | None = None,
) -> ExpertMergeView:
    """Shrink a mixture of experts and look at one of its layers.

    Args:
        model: a mixture of experts; not modified.
        trace: `record_routing(model)` over calibration text.
        n_experts: experts that each layer stores afterwards; on average where adaptive.
        method: "merge" (M-SMoE), "hierarchical" (HC-SMoE), "subspace" (Sub-MoE's clusters), "drop" (delete the least
            used, router rows too), "replace" (delete, and lead their rows to the most similar expert that stays) or
            "reconstruction" (delete those whose layer output is missed least).
        align: permute hidden units before averaging (where there is averaging).
        similarity: what groups experts (merge and replace).
        merge_weights: how members count (where there is averaging).
        linkage: distance of clusters (hierarchical).
        adaptive: rank experts over all layers together (merge and replace).
        layer: number of the routed layer shown.
        inputs: from `calibration_inputs`; by default made from the trace's text where a method needs them.
        cache: remembers alignments and models from call to call.

    Returns:
        ExpertMergeView.

    Raises:
        ValueError: as the methods; no such layer.
    """
    layers = expert_view(model)
    if layer >= len(layers):
        raise ValueError(f"layer must be in [0, {len(layers) - 1}], got {layer} (expert_merge_view)")
    cache = {} if cache is None else cache
    usage = usage_of(trace, model)
    choices = {"similarity": similarity, "merge_weights": merge_weights, "adaptive": adaptive, "linkage": linkage}
    key = (method, n_experts, align, *choices.values())
    if cache.get("key") != key:  # moving `layer` alone builds no model
        check_n_experts(n_experts, usage, "expert_merge_view")
        if align == "activation" or method in ("hierarchical", "subspace", "reconstruction"):
            inputs = inputs or cache.setdefault("inputs", calibration_inputs(model, trace, None, most=512))
        plan, kept = _decide(model, trace, method, n_experts, choices, inputs)
        if kept is not None:
            cache["model"] = keep_rows(model, kept)
        else:
            how = {True: "weight", False: "none"}.get(align, align) if method != "replace" else "none"
            aligner = cache.setdefault(("aligner", how), Aligner(how, inputs=inputs))
            cache["model"] = apply_plan(model, plan, average_group(aligner))
        cache |= {"key": key, "plan": plan, "kept": kept}
    name = layers[layer].name
    kept = cache["kept"]
    groups = cache["plan"][name].groups if kept is None else tuple((e,) for e in kept[name])
    inside = {expert for group in groups for expert in group}
    dropped = tuple(expert for expert in range(len(usage[name])) if expert not in inside)
    joins = None
    if method in ("hierarchical", "subspace"):
        cosine, means = output_statistics(layers[layer], (inputs or cache["inputs"])[name][0])
        s = (1 + cosine) / 2
        joins = linkage_of(means.cpu().numpy(), linkage) if method == "hierarchical" else None
    else:
        s = expert_similarity(layers[layer], trace.layer(layer).logits, similarity)
    sizes = tuple(int(expert_sizes(m)["parameters"].sum()) for m in (model, cache["model"]))
    return ExpertMergeView(cache["model"], name, usage[name].numpy(), groups, dropped, s.cpu().numpy(), sizes, joins)


def _decide(model, trace, method: str, n_experts: int, choices: dict, inputs) -> tuple[dict | None, dict | None]:
    """A plan of groups, or the experts that are kept when others are deleted."""
    if method == "drop":
        return None, dominant_experts(usage_of(trace, model), n_experts)
    if method == "reconstruction":
        layers = expert_view(model)
        return None, {one.name: best_subset(one, inputs[one.name][0], trace, n_experts)[0] for one in layers}
    if method == "hierarchical":
        used = {name: choices[name] for name in ("linkage", "merge_weights")}
        return plan_hc_smoe(model, trace, inputs, n_experts=n_experts, **used), None
    if method == "subspace":
        return plan_sub_moe(model, trace, inputs, n_experts=n_experts, merge_weights=choices["merge_weights"]), None
    used = {name: choices[name] for name in ("similarity", "merge_weights", "adaptive")}
    plan = plan_m_smoe(model, trace, n_experts=n_experts, **used)
    return (_without_members(plan) if method == "replace" else plan), None


def linkage_of(points: np.ndarray, linkage: str = "average") -> np.ndarray:
    """How points join bottom up: scipy's linkage matrix (first, second, distance, size) of n − 1 rows."""
    from scipy.cluster.hierarchy import linkage as scipy_linkage

    return scipy_linkage(points.astype(np.float64), linkage)


def _without_members(plan: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """The same groups, each represented by its dominant expert alone."""
    return {
        name: LayerPlan(layer.groups, tuple((1.0, *(0.0,) * (len(group) - 1)) for group in layer.groups))
        for name, layer in plan.items()
    }


def usage_entropy(usage: np.ndarray) -> float:
    """Entropy of a layer's usage in bits; log2 of the number of experts where all are used alike."""
    share = usage[usage > 0]
    return float(-(share * np.log2(share)).sum())


def plant_permuted_copies(
    model: nn.Module, usage: Mapping[str, Tensor], *, distinct: int = 4, router_scale: float = 0.02, seed: int = 0
) -> nn.Module:
    """Copy a model so that its experts are permuted copies of a few: a case whose lossless merge is known.

    The most used experts of each layer stay; every other becomes a copy of one of them, its hidden units in a random
    order and with random signs, which changes no function.

    Args:
        model: a mixture of experts; not modified.
        usage: from `usage_of`.
        distinct: experts that stay in each layer; the others copy them in turn.
        router_scale: factor of a copy's router row against its original's: the same direction, so that the router
            treats them alike, and shorter, so that the original is used more.
        seed: of the permutations.

    Returns:
        The planted model.

    Raises:
        ValueError: more distinct experts than there are.
    """
    new = copy.deepcopy(model)
    with torch.no_grad():
        for layer in expert_view(new):
            if not 1 <= distinct <= len(layer):
                raise ValueError(f"distinct must be in [1, {len(layer)}], got {distinct} (plant_permuted_copies)")
            ranked = usage[layer.name].argsort(descending=True, stable=True).tolist()
            spec = spec_of(layer)
            parts = {name: getattr(layer, name).clone() for name in expert_of(layer, 0)}
            for place, e in enumerate(ranked[distinct:]):
                original = ranked[place % distinct]
                permutations = random_permutations(spec, seed=seed + e, signs=layer.signed)
                for name, tensor in permute(spec, permutations, expert_of(layer, original)).items():
                    parts[name][e] = tensor
                for row in layer.router_module.parameters():
                    row[e] = router_scale * row[original]
            layer.write(**parts)
    return new
