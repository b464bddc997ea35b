"""What alignment did: which units moved, how alike the networks became, and what the line between them scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.alignment import (
    Permutations,
    PermutationSpec,
    activation_matching,
    path_scores,
    permute,
    similarity,
    weight_matching,
)
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.weights import Weights, at_least_float32, check, float_keys


def moved_units(spec: PermutationSpec, permutations: Mapping[str, Tensor]) -> pd.DataFrame:
    """Say which units changed place.

    Args:
        spec: of the network.
        permutations: from a matching.

    Returns:
        DataFrame: permutation, units, moved (number that changed place), share, flipped (number with sign −1).
    """
    rows = []
    signs = getattr(permutations, "signs", {})
    for perm, index in permutations.items():
        moved = int((index != torch.arange(len(index))).sum())
        flipped = int((signs[perm] < 0).sum()) if perm in signs else 0
        rows.append((perm, spec.sizes[perm], moved, moved / spec.sizes[perm], flipped))
    return pd.DataFrame(rows, columns=["permutation", "units", "moved", "share", "flipped"])


def tensor_similarity(a: Weights, versions: Mapping[str, Weights]) -> pd.DataFrame:
    """Hold networks against a, tensor by tensor.

    Args:
        a: state dict.
        versions: name to state dict, such as {"naive": b, "aligned": permute(spec, permutations, b)}.

    Returns:
        DataFrame: tensor, version, cosine in [−1, 1], distance (Euclidean norm of the difference).
    """
    rows = []
    for key in float_keys(a):
        x = at_least_float32(a[key]).flatten()
        for version, weights in versions.items():
            y = at_least_float32(weights[key]).flatten()
            norm = float(x.norm() * y.norm())
            rows.append((key, version, float(x @ y) / norm if norm > 0 else 0.0, float((x - y).norm())))
    return pd.DataFrame(rows, columns=["tensor", "version", "cosine", "distance"])


def matching_cost(spec: PermutationSpec, a: Weights, b: Weights, permutations: Mapping[str, Tensor]) -> pd.DataFrame:
    """Say how alike the units of a and b are, before and after a matching.

    Args:
        spec: of the network.
        a: state dict whose order is kept.
        b: state dict that was matched to it.
        permutations: from a matching.

    Returns:
        DataFrame: permutation, before and after: mean cosine of a unit of a with the unit of b in its place, over all
        weights that make and read it.
    """
    rows = []
    for perm in spec.sizes:
        before = unit_similarity(spec, perm, a, b, Permutations())
        after = unit_similarity(spec, perm, a, b, permutations)
        rows.append((perm, float(before.diagonal().mean()), float(after.diagonal().mean())))
    return pd.DataFrame(rows, columns=["permutation", "before", "after"])


def unit_similarity(
    spec: PermutationSpec, perm: str, a: Weights, b: Weights, permutations: Mapping[str, Tensor]
) -> Float[Tensor, "n n"]:
    """Cosine of unit i of a with unit j of the permuted b, over all weights that make and read them.

    Args:
        spec: of the network.
        perm: the permutation whose units are compared.
        a: state dict.
        b: state dict.
        permutations: applied to b first; empty for b as it is.

    Returns:
        S in [−1, 1]; a good matching has its large entries on the diagonal.
    """
    moved = permute(spec, permutations, b)
    nothing = Permutations()
    c, norm_a, norm_b = (similarity(spec, perm, *pair, nothing)[0] for pair in ((a, moved), (a, a), (moved, moved)))
    scale = (norm_a.diagonal().clamp(min=0).sqrt()[:, None] * norm_b.diagonal().clamp(min=0).sqrt()[None]).clamp(
        min=1e-12
    )
    return (c / scale).clamp(-1, 1)


def path_frame(
    score: Callable[[Weights], float], a: Weights, versions: Mapping[str, Weights], *, points: int = 11
) -> pd.DataFrame:
    """Score the straight lines from a to several networks.

    Args:
        score: state dict to a number, higher is better.
        a: state dict at t = 0.
        versions: name to state dict at t = 1.
        points: places on each line.

    Returns:
        DataFrame: version, t, score, chord (the straight line between the ends' scores).
    """
    frames = []
    for version, weights in versions.items():
        t, values = (x.numpy() for x in path_scores(score, a, weights, points=points))
        chord = (1 - t) * values[0] + t * values[-1]
        frames.append(pd.DataFrame({"version": version, "t": t, "score": values, "chord": chord}))
    return pd.concat(frames, ignore_index=True)


@dataclass(frozen=True)
class AlignmentView:
    """One look at two networks before and after matching.

    Args:
        method: how they were matched.
        permutations: what brings b into a's order.
        aligned: b in that order.
        perm: the permutation shown.
        before: cosine of its units, b as it is, Float[n, n].
        after: the same, b in a's order.
        path: `path_frame` of "naive" and "aligned", or None without a score.
        t: place on the line that is marked.
    """

    method: str
    permutations: Permutations
    aligned: dict[str, Tensor] = field(repr=False)
    perm: str
    before: np.ndarray = field(repr=False)
    after: np.ndarray = field(repr=False)
    path: pd.DataFrame | None = field(repr=False)
    t: float

    @property
    def barriers(self) -> dict[str, float]:
        """Version to barrier: how far its line dips below the chord, in units of the score."""
        if self.path is None:
            return {}
        dip = (self.path["chord"] - self.path["score"]).clip(lower=0)
        return {
            str(version): float(value) for version, value in dip.groupby(self.path["version"], sort=False).max().items()
        }


def alignment_view(
    a: Weights,
    b: Weights,
    spec: PermutationSpec,
    score: Callable[[Weights], float] | None = None,
    *,
    method: Annotated[str, Choice("weight", "activation", "straight-through", "none")] = "weight",
    layer: Annotated[int, Range(0, 4095)] = 0,
    t: Annotated[float, Range(0, 1, step=0.05)] = 0.5,
    points: Annotated[int, Range(3, 51)] = 11,
    signs: bool = True,
    seed: Annotated[int, Range(0, 99)] = 0,
    models: Sequence | None = None,
    batches: Sequence | None = None,
    found: Mapping[str, Permutations] | None = None,
    cache: dict | None = None,
) -> AlignmentView:
    """Match b to a and look at the units of one layer and at the line between the two.

    Args:
        a: state dict whose order is kept.
        b: state dict that is brought into it.
        spec: from `permutation_spec`.
        score: state dict to a number, higher is better; without it there is no line to draw.
        method: match by weights, by activations (needs models and batches), straight through (slow: needs to be in
            `found`), or not at all.
        layer: number of the permutation whose units are shown, in the order of the spec.
        t: place on the line to mark.
        points: places on the line where it is scored.
        signs: use the free sign of gated units, where the spec has them.
        seed: of the visiting order.
        models: the two models, for activations.
        batches: inputs, for activations.
        found: method to permutations that are known already, such as {"straight-through": straight_through(...)}.
        cache: remembers matchings and lines from call to call.

    Returns:
        AlignmentView.

    Raises:
        ValueError: no such layer; activations without models and batches; straight-through that is not in `found`.
    """
    names = list(spec.sizes)
    if layer >= len(names):
        raise ValueError(f"layer must be in [0, {len(names) - 1}], got {layer} (alignment_view)")
    cache = {} if cache is None else cache

    def known(key, make):
        if key not in cache:
            cache[key] = make()
        return cache[key]

    if "checked" not in cache:
        check(a, [b], names=["b"])
        cache["checked"] = True
    how = (method, signs, seed)
    permutations = (found or {}).get(method) or known(
        ("permutations", *how), lambda: _match(spec, a, b, method, signs, seed, models, batches)
    )
    aligned = known(("aligned", *how), lambda: permute(spec, permutations, b))
    perm = names[layer]
    before = known(("units", perm), lambda: unit_similarity(spec, perm, a, b, Permutations()).cpu().numpy())
    after = known(("units", perm, *how), lambda: unit_similarity(spec, perm, a, b, permutations).cpu().numpy())
    path = None
    if score is not None:
        lines = {"naive": (b, ()), "aligned": (aligned, how)}
        if method == "none":
            del lines["aligned"]
        path = pd.concat(
            [
                known(("path", points, *key), lambda name=name, w=w: path_frame(score, a, {name: w}, points=points))
                for name, (w, key) in lines.items()
            ],
            ignore_index=True,
        )
    return AlignmentView(method, permutations, aligned, perm, before, after, path, t)


def _match(spec, a, b, method, signs, seed, models, batches) -> Permutations:
    if method == "weight":
        return weight_matching(spec, a, b, signs=signs, seed=seed)
    if method == "none":
        return Permutations({perm: torch.arange(n) for perm, n in spec.sizes.items()})
    if method == "straight-through":
        raise ValueError('method="straight-through" takes long: give found={"straight-through": straight_through(...)}')
    if models is None or batches is None:
        raise ValueError('method="activation" needs models=(model_a, model_b) and batches=[...] (alignment_view)')
    return activation_matching(spec, *models, batches, signs=signs)
