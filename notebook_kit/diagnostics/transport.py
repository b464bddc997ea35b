"""Two networks joined by transport plans or by PLeaS: how soft the plans are, what the result scores, what it costs."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.alignment import Features, Split, Transported, incoming, ot_fusion, pleas, split_widths
from notebook_kit.alignment.transport_flow import RESIDUAL
from notebook_kit.hyperparameters import Choice, Range


def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model that carries other weights.

    Args:
        model: gives the architecture; not modified.
        weights: state dict.
    """
    result = copy.deepcopy(model)
    result.load_state_dict(weights)
    return result


def partners(plan: Float[Tensor, "units_b units_a"]) -> float:
    """Over how many units a unit of b is spread: the mean over rows of exp(entropy); 1 for a hard plan."""
    rows = incoming(plan)
    return float(torch.special.entr(rows).sum(1).exp().mean())


def plan_table(plans: Mapping[str, Float[Tensor, "units_b units_a"]]) -> pd.DataFrame:
    """Say how soft transport plans are.

    Args:
        plans: layer to plan, such as `ot_fusion(...).plans`.

    Returns:
        DataFrame: layer, units_b, units_a, partners (over how many units one of b is spread).
    """
    rows = [(name, *plan.shape, partners(plan)) for name, plan in plans.items()]
    return pd.DataFrame(rows, columns=["layer", "units_b", "units_a", "partners"])


def epsilon_curve(
    model_a: nn.Module,
    model_b: nn.Module,
    score: Callable[[nn.Module], float],
    *,
    features: Features,
    grid: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    **settings,
) -> pd.DataFrame:
    """Fuse two networks at several epsilons, and with exact plans.

    Args:
        model_a: sets the shapes of the result.
        model_b: is carried over.
        score: model to a number, higher is better.
        features: from `record_features`.
        grid: epsilons.
        settings: more arguments of `ot_fusion`.

    Returns:
        DataFrame: method, epsilon (0 for exact plans), score, partners (mean over the plans).
    """
    rows = []
    for epsilon in (0.0, *grid):
        how = {"method": "exact"} if epsilon == 0 else {"method": "sinkhorn", "epsilon": epsilon}
        fused = ot_fusion(model_a, model_b, features=features, **how, **settings)
        value = float(score(with_weights(model_a, fused)))
        rows.append((how["method"], epsilon, value, np.mean([partners(plan) for plan in fused.plans.values()])))
    return pd.DataFrame(rows, columns=["method", "epsilon", "score", "partners"])


@dataclass(frozen=True)
class FusionView:
    """One look at a fusion by transport.

    Args:
        weights: the fused state dict, with its plans.
        layer: name of the layer shown.
        plan: its plan, Float[units_b, units_a].
        method: "sinkhorn" or "exact".
        epsilon: of the plans.
        score: of the fused network, or None without a score.
        curve: from `epsilon_curve`, or None.
    """

    weights: Transported = field(repr=False)
    layer: str
    plan: Tensor = field(repr=False)
    method: str
    epsilon: float
    score: float | None
    curve: pd.DataFrame | None = field(repr=False)


def fusion_view(
    model_a: nn.Module,
    model_b: nn.Module,
    score: Callable[[nn.Module], float] | None = None,
    *,
    epsilon: Annotated[float, Range(1e-3, 10, log=True)] = 0.08,
    method: Annotated[str, Choice("sinkhorn", "exact")] = "sinkhorn",
    layer: Annotated[int, Range(0, 4095)] = 0,
    t: Annotated[float, Range(0, 1, step=0.05)] = 0.5,
    align: Annotated[str, Choice("activation", "weight")] = "activation",
    residual: Annotated[str, Choice(*RESIDUAL)] = "mean",
    qk: Annotated[str, Choice("separate", "shared", "joint")] = "separate",
    features: Features,
    curve: pd.DataFrame | None = None,
) -> FusionView:
    """Fuse two networks and look at one layer's plan and at the score.

    Args:
        model_a: sets the shapes of the result.
        model_b: is carried over.
        score: model to a number, higher is better.
        epsilon: how soft the plans are.
        method: soft plans, or exact ones.
        layer: number of the plan shown, in the order in which they are made.
        t: share of b in the result.
        align: compare units by activations or by incoming weights.
        residual: what becomes of two plans where a branch joins the stream.
        qk: plans of queries and keys.
        features: from `record_features(model_a, model_b, batches)`.
        curve: from `epsilon_curve`, to be drawn behind.

    Returns:
        FusionView.

    Raises:
        ValueError: no such layer.
    """
    settings = {"epsilon": epsilon, "method": method, "align": align, "residual": residual, "qk": qk, "t": t}
    fused = ot_fusion(model_a, model_b, features=features, **settings)
    names = list(fused.plans)
    if layer >= len(names):
        raise ValueError(f"layer must be in [0, {len(names) - 1}], got {layer} (fusion_view)")
    value = None if score is None else float(score(with_weights(model_a, fused)))
    return FusionView(fused, names[layer], fused.plans[names[layer]], method, epsilon, value, curve)


def compute_table(model: nn.Module, x: Tensor) -> pd.DataFrame:
    """Count the parameters and multiply-adds of a network's linear and convolutional layers.

    Args:
        model: any network.
        x: one batch; the multiply-adds are for one of its rows.

    Returns:
        DataFrame: layer, parameters (weights and biases), weights, multiply_adds.
    """
    rows = []

    def count(name):
        def hook(layer, args, output):
            spots = output.numel() // (len(x) * output.shape[1 if isinstance(layer, nn.Conv2d) else -1])
            weights = layer.weight.numel()
            rows.append((name, sum(p.numel() for p in layer.parameters()), weights, weights * spots))

        return hook

    handles = [
        layer.register_forward_hook(count(name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return pd.DataFrame(rows, columns=["layer", "parameters", "weights", "multiply_adds"])


def budget_curve(
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Iterable,
    score: Callable[[nn.Module], float],
    *,
    budgets: Sequence[float] = (1.0, 1.25, 1.5, 1.75, 2.0),
    variants: Mapping[str, Mapping] | None = None,
) -> pd.DataFrame:
    """Join two networks by PLeaS at several budgets, with and without the refit.

    Args:
        model_a: one network.
        model_b: the other, of the same architecture.
        batches: inputs to both.
        score: model to a number, higher is better.
        budgets: multiply-adds over those of one network.
        variants: name to arguments of `pleas`; default: "least squares" and "block average".

    Returns:
        DataFrame: variant, budget, cost (multiply-adds used over those of one network), score.
    """
    batches = list(batches)
    variants = variants or {"least squares": {}, "block average": {"least_squares": False}}
    base, rows = _multiply_adds(model_a, batches), []
    for variant, settings in variants.items():
        for budget in budgets:
            joined = pleas(model_a, model_b, **{"batches": batches, **settings}, budget=float(budget))
            rows.append((variant, float(budget), _multiply_adds(joined, batches) / base, float(score(joined))))
    return pd.DataFrame(rows, columns=["variant", "budget", "cost", "score"])


def _multiply_adds(model: nn.Module, batches: Sequence) -> int:
    return int(compute_table(model, batches[0])["multiply_adds"].sum())


@dataclass(frozen=True)
class PleasView:
    """One look at a network that PLeaS made.

    Args:
        model: the network.
        widths: layer to its numbers of units, merged, a's own, b's own.
        cost: its multiply-adds over those of one network.
        score: of the network, or None without a score.
        curve: from `budget_curve`, or None.
    """

    model: nn.Module = field(repr=False)
    widths: dict[str, Split]
    cost: float
    score: float | None
    curve: pd.DataFrame | None = field(repr=False)


def pleas_view(
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Sequence,
    score: Callable[[nn.Module], float] | None = None,
    *,
    budget: Annotated[float, Range(1, 2, step=0.05)] = 1.0,
    least_squares: bool = True,
    ridge: Annotated[float, Range(1e-8, 100, log=True)] = 1e-3,
    align: Annotated[str, Choice("activation", "weight", "none")] = "activation",
    allocation: Annotated[str, Choice("uniform", "late", "score")] = "uniform",
    curve: pd.DataFrame | None = None,
) -> PleasView:
    """Join two networks by PLeaS and look at the units of each layer and at the score.

    Args:
        model_a: one network.
        model_b: the other, of the same architecture.
        batches: inputs to both.
        score: model to a number, higher is better.
        budget: multiply-adds over those of one network.
        least_squares: refit each layer.
        ridge: pull towards the block average.
        align: how units are paired.
        allocation: which layers are kept apart first.
        curve: from `budget_curve`, to be drawn behind.

    Returns:
        PleasView.
    """
    settings = {"budget": budget, "least_squares": least_squares, "ridge": ridge, "align": align}
    joined = pleas(model_a, model_b, batches, allocation=allocation, score=score, **settings)
    cost = _multiply_adds(joined, batches) / _multiply_adds(model_a, batches)
    return PleasView(joined, split_widths(joined), cost, None if score is None else float(score(joined)), curve)
