"""ZipIt on experts: the hidden units of a group are merged with whichever unit does alike, in any of its experts."""

from collections.abc import Iterable
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from notebook_kit.alignment import feature_correlation, greedy_unions
from notebook_kit.catalog import method
from notebook_kit.expert_merging.align_experts import expert_of
from notebook_kit.expert_merging.apply import Combine, Expert, apply_plan
from notebook_kit.expert_merging.m_smoe import SIMILARITIES, plan_m_smoe
from notebook_kit.expert_merging.outputs import Inputs, calibration_inputs, hidden_units
from notebook_kit.expert_merging.view import ExpertLayer
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routing import RoutingTrace
from notebook_kit.weights import at_least_float32


@method(family="expert_merging", paper=("zipit", "hc-smoe"))
@torch.no_grad()
def zipit_experts(
    model: nn.Module,
    trace: RoutingTrace,
    *,
    n_experts: Annotated[int, Range(1, 512)] = 4,
    matching: Annotated[str, Choice("greedy", "fixed-dominant")] = "greedy",
    alpha: Annotated[float, Range(0, 1)] = 1.0,
    beta: Annotated[float, Range(0, 1)] = 1.0,
    similarity: Annotated[str, Choice(*SIMILARITIES)] = "router-logits",
    merge_weights: Annotated[str, Choice("frequency", "uniform", "reversed")] = "frequency",
    signs: bool = True,
    n_calibration: Annotated[int, Range(64, 16384, log=True)] = 1024,
    batches: Iterable | None = None,
) -> nn.Module:
    """Merge each group of experts by merging their most correlated hidden units, within an expert as well as across.

    Groups as in `m_smoe`. In a group of m experts of f hidden units:

    1. run every expert on the same tokens; correlate all m·f hidden activations a = act(gate x) * (up x), or act(up x)
       of experts without a gate;
    2. join units until f groups are left: P [m·f, f] with one 1 in each row; P_i the f rows of expert i. "greedy"
       joins the most correlated pair again and again (`greedy_unions`); "fixed-dominant" leads every unit of the
       others to the dominant expert's unit that it correlates with most;
    3. gate and up rows of a merged unit: the mean over its members;
    4. down: D = Σ_i w_i D_i P_i, the columns of an expert's units SUM, since all of them now read one merged unit;
       experts count by the weights w of the plan, Σ_i w_i = 1.

    Args:
        model: as `m_smoe`.
        trace: `record_routing(model)` over calibration text.
        n_experts: experts that each layer stores afterwards.
        matching: "greedy" or "fixed-dominant".
        alpha: repeat penalty of `greedy_unions`; below 1 large unions wait, and a group of more than two copies is
            not found.
        beta: budget of unions within one expert, as `greedy_unions`.
        similarity: what groups experts, as `m_smoe`.
        merge_weights: how members count in down: by usage, all alike, or by 1 − usage.
        signs: turn each unit of the others to the sign in which it correlates with the dominant expert's, first.
        n_calibration: tokens that are looked at.
        batches: inputs; the text of the trace by default.

    Returns:
        A new model, as `m_smoe`.

    Raises:
        ValueError, UnknownExperts: as `m_smoe`.

    Limits: correlations of m·f units are one matrix: m = 8 experts of f = 14336 would take 105 GB.

    Source: Stoica et al. (2023), section 4, on experts as in Li et al. (2023) and Chen et al. (2024);
        wazenmai/HC-SMoE and UNITES-Lab/MC-SMoE average the down columns over all members, which is right only where
        each expert has one unit in every group. The sign rule is this kit's.
    """
    plan = plan_m_smoe(
        model, trace, n_experts=n_experts, similarity=similarity, merge_weights=merge_weights, owner="zipit_experts"
    )
    inputs = calibration_inputs(model, trace, batches, most=n_calibration)
    return apply_plan(model, plan, zip_group(inputs, matching=matching, alpha=alpha, beta=beta, signs=signs))


def zip_group(
    inputs: Inputs, *, matching: str = "greedy", alpha: float = 1.0, beta: float = 1.0, signs: bool = True
) -> Combine:
    """Combine a group by ZipIt; arguments as `zipit_experts`.

    Args:
        inputs: block name to what its experts receive, from `calibration_inputs`.
    """

    def combine(layer: ExpertLayer, group: tuple[int, ...], weights: tuple[float, ...]) -> Expert:
        experts = [expert_of(layer, e) for e in group]
        x = at_least_float32(inputs[layer.name][0])
        units = [hidden_units(layer, expert, x) for expert in experts]
        if signs and layer.signed:
            units = [units[0], *(_turned(*pair, units[0]) for pair in zip(experts[1:], units[1:], strict=True))]
        correlation = feature_correlation(torch.cat(units, dim=1))
        f = units[0].shape[1]
        if matching == "fixed-dominant":
            places = correlation[:, :f].argmax(1).reshape(len(group), f)
            places[0] = torch.arange(f)
        else:
            places = greedy_unions(correlation, len(group), f, alpha=alpha, beta=beta).reshape(len(group), f)
        return merge_units(experts, weights, places)

    return combine


def merge_units(
    experts: list[dict[str, Tensor]], weights: tuple[float, ...], places: Int[Tensor, "experts f"]
) -> Expert:
    """Steps 3 and 4: gate and up rows meet as means, down columns as sums.

    Args:
        experts: gate [f, d], up [f, d], down [d, f] of each, and biases if there are any; or up and down.
        weights: of each expert; they sum to 1.
        places: merged unit of each unit.
    """
    places = places.to(experts[0]["down"].device)
    size = torch.bincount(places.flatten(), minlength=places.shape[1])
    merged = {name: torch.zeros_like(tensor) for name, tensor in experts[0].items()}
    for expert, weight, place in zip(experts, weights, places, strict=True):
        for name, tensor in expert.items():
            if name == "down":
                merged[name].index_add_(1, place, weight * tensor)
            elif name == "down_bias":
                merged[name] += weight * tensor
            else:
                share = 1 / size[place].to(tensor)
                merged[name].index_add_(0, place, tensor * (share[:, None] if tensor.dim() == 2 else share))
    return tuple(merged.values())


def _turned(
    expert: dict[str, Tensor], z: Float[Tensor, "tokens f"], z_dominant: Float[Tensor, "tokens f"]
) -> Float[Tensor, "tokens f"]:
    """Give each unit of an expert, in place, the sign in which it is most like one of the dominant expert's."""
    c = feature_correlation(z, z_dominant)
    nearest = c.gather(1, c.abs().argmax(1, keepdim=True)).squeeze(1)
    sign = torch.where(nearest < 0, -1.0, 1.0).to(z)
    expert["up"], expert["down"] = sign[:, None] * expert["up"], expert["down"] * sign
    if "up_bias" in expert:
        expert["up_bias"] = sign * expert["up_bias"]
    return z * sign
