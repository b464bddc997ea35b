"""M-SMoE: merge the experts of a sparse mixture, following what its router says about them."""

from collections.abc import Iterable
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.alignment.taps import each
from notebook_kit.catalog import method
from notebook_kit.expert_merging.align_experts import Aligner, average_group
from notebook_kit.expert_merging.apply import apply_plan
from notebook_kit.expert_merging.fisher_average import expert_fishers, fisher_average
from notebook_kit.expert_merging.outputs import Inputs, calibration_inputs, output_statistics, trace_batches
from notebook_kit.expert_merging.plan import (
    LayerPlan,
    check_n_experts,
    cosine_similarity,
    dominant_experts,
    group_by_similarity,
    merge_weights_of,
    usage_of,
)
from notebook_kit.expert_merging.view import ExpertLayer, expert_view
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routing import RoutingTrace
from notebook_kit.weights import at_least_float32

SIMILARITIES = ("router-logits", "router-weight", "weight")


@method(family="expert_merging", paper="m-smoe")
def m_smoe(
    model: nn.Module,
    trace: RoutingTrace,
    *,
    n_experts: Annotated[int, Range(1, 512)] = 4,
    align: Annotated[bool | str, Choice(True, False, "weight", "sketch", "activation")] = True,
    similarity: Annotated[str, Choice(*SIMILARITIES, "output")] = "router-logits",
    merge_weights: Annotated[str, Choice("frequency", "uniform", "reversed", "random", "fisher")] = "frequency",
    adaptive: bool = False,
    signs: bool = True,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
    batches: Iterable | None = None,
) -> nn.Module:
    """Merge experts that the router treats alike, each group into its most used member's order.

    In every layer with N experts of width f:

    1. usage f_i: expert i's share of the routed (token, slot) pairs; the most used experts are *dominant*;
    2. similarity S_ij = ½ (1 + cos(H_i, H_j)), H_i expert i's router logits over all tokens; every other expert
       joins the dominant expert it is most similar to;
    3. align: a member's hidden units are permuted (and signed) to match its dominant expert's, which changes no
       function: C = G_A G_Bᵀ + |U_A U_Bᵀ + D_Aᵀ D_B| [f, f], one linear assignment (of two-matrix experts without a
       gate, as in Switch: C = U_A U_Bᵀ + D_Aᵀ D_B, permutations only);
    4. merge a group: W = Σ_i f_i π_i(W_i) / Σ_i f_i for gate, up and down;
    5. the router keeps its N rows; rows of a group lead to one stored expert, and where top-k meets it twice its
       weights add up.

    Args:
        model: Mixtral, Qwen2/3-MoE, OLMoE, DeepSeek-V3, gpt-oss or Switch Transformers of transformers, or modules
            with a list of experts.
        trace: `record_routing(model)` over calibration text.
        n_experts: experts that each layer stores afterwards; on average where adaptive.
        align: permute units before averaging: True or "weight" (weights alone), "sketch" (weights projected to 256
            dimensions: faster where d is larger), "activation", False.
        similarity: what groups experts: router logits on the trace, router rows, the experts' raw weights, or the mean
            cosine of their outputs on calibration tokens.
        merge_weights: how members count: by usage, all alike, by 1 − usage, at random, or entry by entry by Fisher
            information (`fisher_average`).
        adaptive: rank experts over all layers together, so that each layer gets its own number.
        signs: use the free sign of gated units when aligning by weights or activations.
        seed: of merge_weights="random".
        batches: inputs for align="activation", similarity="output" and merge_weights="fisher"; the text of the trace
            by default.

    Returns:
        A new model of the same class (transformers: a subclass that save_pretrained and from_pretrained carry, once
        `notebook_kit.expert_merging` is imported, or with trust_remote_code=True) with fewer stored experts. `model`
        is not modified.

    Raises:
        ValueError: an empty trace or one of another model, n_experts above the number of experts, no batches.
        UnknownExperts: experts stored in a way that is not known.

    Source: Li et al. (2023), section 3; UNITES-Lab/MC-SMoE, `mcsmoe/merging`. It aligns to expert 0, here to the
        group's dominant expert; its Mixtral code does not align at all. It adds 1e-7 to the denominator; here a group
        without any usage is averaged uniformly. Its adaptive ranking keeps scores strictly above a threshold and
        loses groups to ties; here the budget is met exactly. The sign rule is this kit's.
    """
    how = {True: "weight", False: "none"}.get(align, align)
    if batches is not None:  # they may be needed twice
        batches = list(each(batches, "m_smoe"))
    inputs = calibration_inputs(model, trace, batches) if how == "activation" or similarity == "output" else None
    plan = plan_m_smoe(
        model,
        trace,
        n_experts=n_experts,
        similarity=similarity,
        merge_weights="frequency" if merge_weights == "fisher" else merge_weights,
        adaptive=adaptive,
        seed=seed,
        inputs=inputs,
    )
    aligner = Aligner(how, signs=signs, inputs=inputs)
    if merge_weights == "fisher":
        texts = trace_batches(trace, next(model.parameters()).device) if batches is None else batches
        return apply_plan(model, plan, fisher_average(aligner, expert_fishers(model, texts)))
    return apply_plan(model, plan, average_group(aligner))


def plan_m_smoe(
    model: nn.Module,
    trace: RoutingTrace,
    *,
    n_experts: int = 4,
    similarity: str = "router-logits",
    merge_weights: str = "frequency",
    adaptive: bool = False,
    seed: int = 0,
    inputs: Inputs | None = None,
    owner: str = "m_smoe",
) -> dict[str, LayerPlan]:
    """Decide which experts join, and with what weight; arguments as `m_smoe`.

    `inputs`, from `calibration_inputs`, is what similarity="output" looks at.

    Returns:
        Block name to `LayerPlan`.
    """
    usage = usage_of(trace, model)
    check_n_experts(n_experts, usage, owner)
    dominant = dominant_experts(usage, n_experts, adaptive=adaptive)
    plan, generator = {}, torch.Generator().manual_seed(seed)
    for number, layer in enumerate(expert_view(model)):
        if similarity == "output":
            s = (1 + output_statistics(layer, inputs[layer.name][0])[0]) / 2
        else:
            s = expert_similarity(layer, trace.layer(number).logits, similarity)
        groups = group_by_similarity(dominant[layer.name], s)
        weights = merge_weights_of(usage[layer.name], groups, merge_weights, generator)
        plan[layer.name] = LayerPlan(groups, weights)
    return plan


def expert_similarity(
    layer: ExpertLayer, logits: Float[Tensor, "tokens experts"], basis: str = "router-logits"
) -> Float[Tensor, "experts experts"]:
    """How alike the experts of a layer are, S_ij in [0, 1].

    Args:
        layer: from `expert_view`.
        logits: the router's, on calibration tokens.
        basis: "router-logits" (columns of the logits), "router-weight" (router rows) or "weight" (all of an
            expert's weights as they lie, so that two permuted copies look different).
    """
    if basis == "router-logits":
        return cosine_similarity(logits.T)
    if basis == "router-weight":
        return cosine_similarity(layer.router)
    # Inner products add up over the matrices, which are never laid side by side.
    matrices = [name for name in layer.parts if not name.endswith("_bias")]
    flat = (at_least_float32(getattr(layer, name).flatten(1)) for name in matrices)
    products = sum(part @ part.T for part in flat)
    norms = products.diagonal().sqrt().clamp_min(1e-12)
    return ((1 + (products / (norms[:, None] * norms)).clamp(-1, 1)) / 2).fill_diagonal_(1.0)
