"""Metrics-weighted averaging: checkpoints of one run are averaged, the better ones with more weight.

    select   the last n checkpoints, or every q-th of them
    metric   loss ℓ_c (lower is better) or step t_c (later is better)
    weigh    power    u_c = ℓ_c^(−p)             or (rank of t_c)^p
             linear   u_c = max(0, 1 − p z_c)
             softmax  u_c = exp(−p z_c)
             w_c = u_c / Σ u
    merge    θ = Σ_c w_c θ_c

z_c = (ℓ_c − min ℓ)/(max ℓ − min ℓ), for steps (max t − t_c)/(max t − min t): 0 for the best checkpoint, 1 for the
worst. p ≥ 0: the penalty; 0 is the uniform average. Yu & Choi, 2025, have one such formula with one penalty factor for
any number of checkpoints; its text was not at hand, so the forms here are named for what they are, not after the paper.
Power ignores the unit of the loss and is mild where losses are close; linear and softmax ignore its offset too. Above
p = 1 the linear form drops all checkpoints with z_c ≥ 1/p.

The checkpoints may be whole state dicts or the adapters alone. For LoRA, `space="factors"` averages A and B, each by
itself; `space="product"` averages what they do, Σ w_c B_c A_c (see `lora_products`).
"""

import functools
import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range, hyperparameters, validate
from notebook_kit.merging.average import average
from notebook_kit.merging.lora_products import average_products
from notebook_kit.weights import Weights, check

Metric = Annotated[str, Choice("loss", "steps")]
Form = Annotated[str, Choice("linear", "power", "softmax")]
Penalty = Annotated[float, Range(0, 10)]


def select_checkpoints(
    count: int, *, n_last: Annotated[int, Range(1, 100)] = 10, stride: Annotated[int, Range(1, 20)] = 1
) -> list[int]:
    """Choose the last checkpoints.

    Args:
        count: how many there are, in the order of training.
        n_last: how many to take, fewer where there are fewer.
        stride: take every so many-th, counted back from the last.

    Returns:
        Their indices, ascending.

    Raises:
        ValueError: n_last or stride is out of range.
    """
    validate(hyperparameters(select_checkpoints), {"n_last": n_last, "stride": stride})
    return list(range(count - 1, -1, -stride))[:n_last][::-1]


def checkpoint_weights(
    metrics: Sequence[float], *, metric: Metric = "loss", form: Form = "linear", penalty: Penalty = 0.7
) -> list[float]:
    """Turn one figure a checkpoint into weights that sum to 1.

    Args:
        metrics: a loss (lower is better) or a step (later is better) for each checkpoint.
        metric: which of the two they are.
        form: as in the module's formulas.
        penalty: p, at least 0.

    Returns:
        One weight a checkpoint, at least 0.

    Raises:
        ValueError: there is none, one is NaN or Inf, or the power form met a loss that is not positive; a form or
            metric that is not there.
    """
    validate(_schema(), {"metric": metric, "form": form, "penalty": penalty})
    values = [float(value) for value in metrics]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"metrics must hold a finite {metric} for each checkpoint, got {values} (checkpoint_weights)")
    m = torch.tensor(values, dtype=torch.float64)
    if form == "power":
        if metric == "loss" and float(m.min()) <= 0:
            raise ValueError(
                f"the power form needs losses above 0, got {float(m.min()):g}: use form='linear' (checkpoint_weights)"
            )
        # As a power of logarithms, so that a large penalty overflows nothing.
        size = -m.log() if metric == "loss" else (torch.unique(m, return_inverse=True)[1] + 1).double().log()
        return torch.softmax(penalty * size, dim=0).tolist()
    worse = m - m.min() if metric == "loss" else m.max() - m
    z = worse / worse.max() if float(worse.max()) > 0 else torch.zeros_like(m)
    u = (1 - penalty * z).clamp_(min=0) if form == "linear" else torch.exp(-penalty * z)
    return (u / u.sum()).tolist()


@functools.cache
def _schema():
    return hyperparameters(checkpoint_weights)


@method(family="merging", paper="mwa")
def metrics_weighted(
    base: Weights,
    experts: Sequence[Weights],
    *,
    metrics: Sequence[float],
    metric: Metric = "loss",
    form: Form = "linear",
    penalty: Penalty = 0.7,
    n_last: Annotated[int, Range(1, 100)] = 10,
    stride: Annotated[int, Range(1, 20)] = 1,
    space: Annotated[str, Choice("factors", "product")] = "factors",
) -> dict[str, Tensor]:
    """Average the checkpoints of one run, weighted by a metric that training gives for nothing.

    Args:
        base: state dict, or adapter weights, that sets keys, shapes and dtypes.
        experts: the checkpoints, in the order of training.
        metrics: one figure a checkpoint, of all `experts`: mean training loss before it, or its step.
        metric: what `metrics` holds: "loss", lower is better, or "steps", later is better.
        form: of the weights: "linear", "power" or "softmax".
        penalty: how sharply worse checkpoints lose weight; 0 is the uniform average.
        n_last: checkpoints used, at most.
        stride: use every so many-th, counted back from the last.
        space: "factors" averages tensor by tensor; "product" averages LoRA's products B A, back at the same rank.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: `metrics` does not have one finite entry per checkpoint; a loss is not positive and the form is
            "power"; NaN or Inf in a tensor; no LoRA factors while `space` is "product".

    Source:
        Yu & Choi, 2025, arXiv 2504.18580; the forms are reconstructions, see above.
    """
    check(base, experts)
    if len(metrics) != len(experts):
        raise ValueError(f"metrics must have one entry per checkpoint, {len(experts)}, got {len(metrics)}")
    chosen = select_checkpoints(len(experts), n_last=n_last, stride=stride)
    weights = checkpoint_weights([metrics[c] for c in chosen], metric=metric, form=form, penalty=penalty)
    merge = average if space == "factors" else average_products
    return merge(base, [experts[c] for c in chosen], weights=weights)
