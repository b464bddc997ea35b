"""What networks compute, compared: CKA of layers, correlations of units, and what ZipIt made of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.alignment import PermutationSpec, Zipped, feature_correlation, unit_activations, zipit
from notebook_kit.hyperparameters import Range
from notebook_kit.weights import Weights


def cka(x: Float[Tensor, "rows n"], y: Float[Tensor, "rows m"]) -> float:
    """How alike two layers are as a whole: linear centred kernel alignment.

        CKA = ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖), columns of X and Y centred

    It asks whether inputs lie alike in both layers, whatever the axes: a rotation or a permutation of units changes
    nothing, nor does a common factor.

    Args:
        x: activations of one layer.
        y: activations of another on the same inputs.

    Returns:
        A number in [0, 1]; 0 if a layer never varies.

    Source: Kornblith et al. (2019), "Similarity of Neural Network Representations Revisited", arXiv 1905.00414.
    """
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    scale = ((x.T @ x).norm() * (y.T @ y).norm()).item()
    return float((x.T @ y).norm() ** 2 / scale) if scale > 0 else 0.0


def layer_cka(spec: PermutationSpec, model_a: nn.Module, model_b: nn.Module, batches: Iterable) -> pd.DataFrame:
    """CKA of every layer of one network with every layer of another.

    Args:
        spec: from `permutation_spec`; its permutations are the layers. Of convolutions the mean over each map is
            compared.
        model_a: its layers are the rows.
        model_b: its layers are the columns.
        batches: inputs that both see.

    Returns:
        DataFrame: CKA in [0, 1].
    """
    batches = list(batches)
    layers = [unit_activations(spec, model, batches, per_input=True) for model in (model_a, model_b)]
    values = [[cka(x, y) for y in layers[1].values()] for x in layers[0].values()]
    return pd.DataFrame(values, index=list(spec.sizes), columns=list(spec.sizes))


def unit_correlation(
    spec: PermutationSpec, perm: str, model_a: nn.Module, model_b: nn.Module, batches: Iterable
) -> Float[Tensor, "n n"]:
    """Correlation of every unit of one network with every unit of the other, on the same inputs.

    Args:
        spec: from `permutation_spec`.
        perm: whose units.
        model_a: its units are the rows.
        model_b: its units are the columns.
        batches: inputs that both see.
    """
    batches = list(batches)
    return feature_correlation(*(unit_activations(spec, m, batches, perms=[perm])[perm] for m in (model_a, model_b)))


@dataclass(frozen=True)
class ZipView:
    """One look at zipped networks.

    Args:
        zipped: from `zipit`.
        scores: task to score, for the networks as they were ("own") and zipped.
        perm: the layer shown, None when nothing is zipped.
        correlation: of its units in all networks, group by group, Float[units, units].
        kinds: kind of group to number: "alone", "across" (one of each of two networks or more), "within" (several of
            one network), "both".
    """

    zipped: Zipped = field(repr=False)
    scores: pd.DataFrame
    perm: str | None
    correlation: np.ndarray = field(repr=False)
    kinds: dict[str, int]


def zip_view(
    spec: PermutationSpec,
    models: Sequence[nn.Module],
    batches: Sequence,
    score: Callable[[Sequence[Weights]], Mapping[str, float]],
    *,
    reduction: Annotated[float, Range(0, 1, step=0.05)] = 0.5,
    alpha: Annotated[float, Range(0, 1, step=0.05)] = 0.3,
    beta: Annotated[float, Range(0, 1, step=0.05)] = 0.125,
    depth: Annotated[int | None, Range(0, 4096)] = None,
    layer: Annotated[int, Range(0, 4095)] = 0,
) -> ZipView:
    """Zip networks and look at the groups of one layer and at the scores.

    Args:
        spec: of the networks.
        models: to be zipped.
        batches: inputs.
        score: one state dict a network -> task to score, higher is better.
        reduction: as `zipit`.
        alpha: as `zipit`.
        beta: as `zipit`.
        depth: as `zipit`.
        layer: number of the permutation that is shown; the last zipped one where it is beyond.

    Returns:
        ZipView.
    """
    zipped = zipit(spec, models, batches, reduction=reduction, alpha=alpha, beta=beta, depth=depth)
    scores = pd.DataFrame({"own": score([m.state_dict() for m in models]), "zipped": score(zipped.weights)})
    names = list(zipped.groups)
    perm = names[min(layer, len(names) - 1)] if names else None
    if perm is None:
        return ZipView(zipped, scores, None, np.zeros((0, 0)), {})
    features = [unit_activations(spec, model, batches, perms=[perm])[perm] for model in models]
    correlation = feature_correlation(torch.cat(features, dim=1)).cpu().numpy()
    groups = zipped.groups[perm].numpy()
    order = np.argsort(groups.ravel(), kind="stable")
    return ZipView(zipped, scores, perm, correlation[np.ix_(order, order)], group_kinds(groups))


def group_kinds(groups: np.ndarray) -> dict[str, int]:
    """Count groups by what they hold.

    Args:
        groups: Int[models, n], merged unit of each unit.

    Returns:
        "alone", "across", "within", "both" to number of groups.
    """
    members = np.stack([np.bincount(row, minlength=groups.max() + 1) for row in groups])  # [models, groups]
    size, networks = members.sum(0), (members > 0).sum(0)
    several = (members > 1).any(0)
    return {
        "alone": int((size == 1).sum()),
        "across": int(((networks > 1) & ~several).sum()),
        "within": int(((networks == 1) & several).sum()),
        "both": int(((networks > 1) & several).sum()),
    }
