"""HC-SMoE: join experts bottom up by what they output on average, with no training afterwards."""

from collections.abc import Iterable
from typing import Annotated

from torch import nn

from notebook_kit.catalog import method
from notebook_kit.expert_merging.align_experts import Aligner, average_group
from notebook_kit.expert_merging.apply import apply_plan
from notebook_kit.expert_merging.clusters import agglomerate, led_by_usage
from notebook_kit.expert_merging.outputs import Inputs, calibration_inputs, output_statistics
from notebook_kit.expert_merging.plan import LayerPlan, check_n_experts, merge_weights_of, usage_of
from notebook_kit.expert_merging.router_rows import mean_rows
from notebook_kit.expert_merging.view import expert_view
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routing import RoutingTrace

LINKAGES = ("average", "single", "complete", "ward")


@method(family="expert_merging", paper="hc-smoe")
def hc_smoe(
    model: nn.Module,
    trace: RoutingTrace,
    *,
    n_experts: Annotated[int, Range(1, 512)] = 4,
    linkage: Annotated[str, Choice(*LINKAGES)] = "average",
    merge_weights: Annotated[str, Choice("frequency", "uniform", "dominant")] = "frequency",
    align: bool = False,
    router: Annotated[str, Choice("map", "mean", "sum")] = "map",
    n_calibration: Annotated[int, Range(64, 16384, log=True)] = 2048,
    batches: Iterable | None = None,
    inputs: Inputs | None = None,
) -> nn.Module:
    """Cluster experts hierarchically by their mean output over all tokens, then average each cluster by usage.

        o_i = 1/T Σ_t E_i(x_t) [d], over all calibration tokens, routed to expert i or not
        d(A, B) = 1 / (|A| |B|) Σ_{a∈A, b∈B} ‖o_a − o_b‖       (average linkage)

    The two nearest clusters join until n_experts are left; W = Σ_i f_i W_i / Σ_i f_i.

    Args:
        model: as `m_smoe`.
        trace: `record_routing(model)` over calibration text.
        n_experts: clusters of each layer.
        linkage: distance of two clusters: mean, nearest or farthest pair, or Ward's growth of the spread within.
        merge_weights: by usage, all alike, or the most used member alone.
        align: permute units before averaging; the paper does not.
        router: "map" keeps all rows and leads them to the clusters; "mean" averages the rows of a cluster into one,
            so that the model is of its original class, and each cluster counts once in the softmax; "sum" keeps all
            rows and chooses clusters by the sum of their rows' probabilities.
        n_calibration: tokens that experts run on.
        batches: inputs to run; the text of the trace by default.
        inputs: from `calibration_inputs`, to save running the model again.

    Returns:
        A new model, as `m_smoe`; with router="mean", of the very same class, with fewer experts.

    Raises:
        ValueError: as `m_smoe`; router="mean" where rows cannot be deleted, as in `drop_experts`; router="sum" on a
            list of experts or a router without a softmax.

    Source: Chen et al. (2024), section 3; wazenmai/HC-SMoE, `hcsmoe/merging/clustering.py`. Its "complete" linkage
        joins the farthest pair of clusters, which is a slip: here all linkages are scipy's.
    """
    if inputs is None:
        inputs = calibration_inputs(model, trace, batches, most=n_calibration)
    plan = plan_hc_smoe(model, trace, inputs, n_experts=n_experts, linkage=linkage, merge_weights=merge_weights)
    combine = average_group(Aligner("weight" if align else "none"))
    if router == "mean":
        return mean_rows(model, plan, combine)
    return apply_plan(model, plan, combine, router=router)


def plan_hc_smoe(
    model: nn.Module,
    trace: RoutingTrace,
    inputs: Inputs,
    *,
    n_experts: int = 4,
    linkage: str = "average",
    merge_weights: str = "frequency",
) -> dict[str, LayerPlan]:
    """Decide which experts join, and with what weight; arguments as `hc_smoe`.

    Returns:
        Block name to `LayerPlan`.
    """
    usage = usage_of(trace, model)
    check_n_experts(n_experts, usage, "hc_smoe")
    plan = {}
    for layer in expert_view(model):
        _, means = output_statistics(layer, inputs[layer.name][0])
        groups = led_by_usage(agglomerate(means, n_experts, linkage), usage[layer.name])
        plan[layer.name] = LayerPlan(groups, merge_weights_of(usage[layer.name], groups, merge_weights))
    return plan
