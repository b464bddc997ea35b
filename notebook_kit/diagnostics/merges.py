"""Numbers about merges: where experts disagree, what each method keeps of whom, and the land around three models."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit import merging
from notebook_kit.adapters import read_adapter
from notebook_kit.adapters.read import Source
from notebook_kit.catalog import entry_of
from notebook_kit.diagnostics.weights import product_svd, task_vectors
from notebook_kit.weights import Weights, check, expert_weights, flatten, unflatten


def known_merges() -> dict[str, Callable]:
    """Every merging method of the kit by name, without loading the other rooms."""
    found = {name: entry_of(getattr(merging, name)) for name in merging.__all__}
    return {name: entry.object for name, entry in found.items() if entry is not None and entry.family == "merging"}


def needs_no_data(method: Callable) -> bool:
    """Whether base, experts and hyperparameters are all that a merge must be given."""
    parameters = list(inspect.signature(method).parameters.values())[2:]
    return all(parameter.default is not parameter.empty for parameter in parameters)


def sign_conflicts(base: Weights, experts: Sequence[Weights], *, density: float = 1.0):
    """Count, tensor by tensor, where experts push the same entry in opposite directions.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i; τ_i = θ_i − θ₀.
        density: share of each task vector that counts, the largest of each tensor by magnitude, in (0, 1].

    Returns:
        DataFrame: tensor, entries, and shares of them: conflict (both signs are there), agree (two experts or more,
        one sign), alone (one expert), nobody.

    Raises:
        IncompatibleWeights: the experts do not fit the base.
        ValueError: density outside (0, 1].
    """
    import pandas as pd

    _check_density(density)
    vectors = task_vectors(base, experts)
    rows = []
    for key in vectors.tensors:
        signs = vectors._signs(key, density)
        up, down = (signs > 0).sum(dim=0), (signs < 0).sum(dim=0)
        n = max(signs.shape[1], 1)
        one_sign = (up == 0) | (down == 0)
        counts = {
            "conflict": (~one_sign).sum(),
            "agree": (one_sign & (up + down > 1)).sum(),
            "alone": (up + down == 1).sum(),
            "nobody": (up + down == 0).sum(),
        }
        rows.append({"tensor": key, "entries": signs.shape[1]} | {name: int(c) / n for name, c in counts.items()})
    return pd.DataFrame(rows, columns=["tensor", "entries", "conflict", "agree", "alone", "nobody"])


def kept_shares(
    base: Weights, experts: Sequence[Weights], merged: Weights, *, density: float = 0.2
) -> Float[np.ndarray, "tensors experts"]:
    """Measure what a merge kept of each expert: the share of its largest changes that go the same way in the merge.

    It does not depend on how strong the merge is. By chance it is 0.5; of an expert that is ignored, 0.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i.
        merged: what a method made of them.
        density: share of each expert's entries that is looked at, the largest of each tensor, in (0, 1].

    Returns:
        One share for each floating tensor and expert; NaN where the expert changed nothing.

    Raises:
        IncompatibleWeights: the weights do not fit the base.
        ValueError: density outside (0, 1].
    """
    _check_density(density)
    check(base, [merged], names=["merged"])
    vectors = task_vectors(base, experts)
    table = np.full((len(vectors.tensors), len(vectors.names)), np.nan)
    for row, key in enumerate(vectors.tensors):
        signs = vectors._signs(key, density)
        change = (merged[key].to(vectors.tau[key].dtype) - base[key].to(vectors.tau[key].dtype)).reshape(-1).sign()
        total = signs.abs().sum(dim=1)
        same = ((signs * change) > 0).sum(dim=1)
        table[row] = torch.where(total > 0, same / total, torch.nan).numpy()
    return table


def change_spectra(base: Weights, models: Mapping[str, Weights], tensor: str) -> dict[str, Float[np.ndarray, " k"]]:
    """Give the singular values of what each model changed in one matrix: experts before, merges after.

    Args:
        base: state dict θ₀.
        models: name to state dict.
        tensor: a matrix of the base.

    Returns:
        Name to singular values of θ − θ₀, in falling order.

    Raises:
        IncompatibleWeights: a model does not fit the base.
        ValueError: no such matrix.
    """
    vectors = task_vectors(base, list(models.values()), list(models))
    return dict(zip(vectors.names, vectors.singular_values(tensor), strict=True))


# ------------------------------------------------------------------ the plane of three models
@dataclass(frozen=True)
class Plane:
    """The plane through three models, with distances as in weight space.

    θ(x, y) = θ_a + x e₁ + y e₂; e₁ points from a to b, e₂ is perpendicular to it and points towards c's side.

    Args:
        like: state dict of the first model, whose other tensors all points share.
        origin: the first model as one vector.
        axes: e₁ and e₂.
        corners: the three models' names to their (x, y).
    """

    like: Weights = field(repr=False)
    origin: Float[Tensor, " d"] = field(repr=False)
    axes: Float[Tensor, "2 d"] = field(repr=False)
    corners: dict[str, tuple[float, float]]

    def at(self, x: float, y: float) -> dict[str, Tensor]:
        """The weights at a point of the plane."""
        return unflatten(self.origin + x * self.axes[0] + y * self.axes[1], self.like)

    def project(self, weights: Weights) -> tuple[float, float, float]:
        """Where a model's shadow falls: x, y, and its distance from the plane."""
        check(self.like, [weights])
        away = flatten(weights) - self.origin
        x, y = (self.axes @ away).tolist()
        return x, y, float((away - x * self.axes[0] - y * self.axes[1]).norm())


def plane_of(models: Mapping[str, Weights]) -> Plane:
    """Lay a plane through three models.

    Args:
        models: three names and state dicts, such as base, expert a, expert b.

    Raises:
        ValueError: not three models, or they lie on one line.
        IncompatibleWeights: they do not fit each other.
    """
    if len(models) != 3:
        raise ValueError(f"a plane needs three models, got {len(models)}")
    first, *others = models.values()
    check(first, others, names=list(models)[1:])
    a, b, c = map(flatten, models.values())
    u, v = b - a, c - a
    e1 = u / u.norm().clamp_min(1e-30)
    w = v - (v @ e1) * e1
    if float(u.norm()) == 0 or float(w.norm()) <= 1e-6 * float(v.norm()):
        raise ValueError(f"{', '.join(models)} lie on one line: no plane goes through exactly these")
    e2 = w / w.norm()
    corners = [(0.0, 0.0), (float(u.norm()), 0.0), (float(v @ e1), float(w.norm()))]
    return Plane(first, a, torch.stack([e1, e2]), dict(zip(models, corners, strict=True)))


@dataclass(frozen=True)
class Surface:
    """A score over a plane, computed once.

    Args:
        plane: where.
        x: places along e₁.
        y: places along e₂.
        scores: "mean" and each task to the scores there.
        unit: what is measured.
    """

    plane: Plane
    x: Float[np.ndarray, " nx"]
    y: Float[np.ndarray, " ny"]
    scores: dict[str, Float[np.ndarray, "ny nx"]]
    unit: str = "score"

    def place(self, models: Mapping[str, Weights]):
        """Put models on the map.

        Args:
            models: name to state dict.

        Returns:
            DataFrame: model, x, y, distance (from the plane).
        """
        import pandas as pd

        rows = [(name, *self.plane.project(weights)) for name, weights in models.items()]
        return pd.DataFrame(rows, columns=["model", "x", "y", "distance"])


def score_surface(
    models: Mapping[str, Weights],
    score: Callable[[Weights], float],
    *,
    n: int = 13,
    margin: float = 0.25,
    also: Mapping[str, Weights] | None = None,
    progress: bool = True,
) -> Surface:
    """Score a grid of points in the plane of three models.

    Args:
        models: three names and state dicts.
        score: weights to a number, higher is better; with `.tasks`, each task gets its own surface.
        n: points along each side, n x n scores are computed.
        margin: how far beyond the models the grid reaches, as a share of their extent.
        also: more models whose shadows the grid must reach, such as merges.
        progress: show a bar.

    Raises:
        ValueError, IncompatibleWeights: as `plane_of`; n below 2.
    """
    from tqdm.auto import tqdm

    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    plane = plane_of(models)
    points = [*plane.corners.values(), *(plane.project(weights)[:2] for weights in (also or {}).values())]
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    reach = margin * (high - low)
    x, y = (np.linspace(low[i] - reach[i], high[i] + reach[i], n) for i in (0, 1))
    found: dict[str, np.ndarray] = {}
    unit = "score"
    bar = tqdm(total=n * n, desc="scoring the plane", unit="point", disable=not progress)
    with bar:
        for row, b in enumerate(y):
            for column, a in enumerate(x):
                value = score(plane.at(float(a), float(b)))
                unit = getattr(value, "unit", unit)
                for name, number in {"mean": value, **getattr(value, "tasks", {})}.items():
                    found.setdefault(str(name), np.full((n, n), np.nan))[row, column] = float(number)
                bar.update()
    return Surface(plane, x, y, found, unit)


# ------------------------------------------------------------------ adapters: the trap
def factorwise(adapters: Sequence[Source], weights: Sequence[float] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Add LoRA adapters factor by factor, as peft's `add_weighted_adapter(combination_type="linear")` does: a trap.

    A = Σ_i ±√|w_i s_i| A_i,   B = Σ_i √|w_i s_i| B_i,   ΔW = BA: besides w_i s_i B_i A_i it holds every B_i A_j of two
    adapters. An rsLoRA adapter is multiplied by √rank once more, because the new adapter's alpha is its rank.
    `merge_adapters` gives the true sum.

    Args:
        adapters: what `read_adapter` reads, of one rank.
        weights: one factor an adapter; None means 1 for each.

    Returns:
        Module to left and right, whose product is the ΔW that comes out.

    Raises:
        ValueError: two adapters have different ranks at one module, so that their factors cannot be added.
    """
    sources = [read_adapter(source) for source in adapters]
    factors = expert_weights(weights, len(sources))
    result: dict[str, tuple[Tensor, Tensor]] = {}
    for name in dict.fromkeys(name for source in sources for name in source.factors):
        left, right = 0.0, 0.0
        for weight, source in zip(factors, sources, strict=True):
            if name not in source.factors:
                continue
            scaling = source.scalings.get(name, 1.0)
            root = math.sqrt(abs(weight * scaling))
            B, A = source.factors[name][0] / scaling if scaling else source.factors[name][0], source.factors[name][1]
            if isinstance(left, Tensor) and left.shape != B.shape:
                raise ValueError(f"{name} has ranks {left.shape[1]} and {B.shape[1]}: factors of two ranks have no sum")
            left, right = left + root * B, right + math.copysign(root, weight * scaling) * A
        again = math.sqrt(left.shape[1]) if sources[0].config.get("use_rslora") else 1.0
        result[name] = (again * left, right)
    return result


def factorwise_error(adapters: Sequence[Source], weights: Sequence[float] | None = None):
    """Compare the factor-wise combination with the weighted sum of the changes, module by module.

    Args:
        adapters: what `read_adapter` reads, of one rank.
        weights: one factor an adapter; None means 1 for each.

    Returns:
        DataFrame: module, norm (of the true Σ w_i ΔW_i), factorwise (norm of what comes out), error (norm of the
        difference, as a share of the true norm), scale (the multiple of the true change that comes closest).

    Raises:
        ValueError: as `factorwise`.
    """
    import pandas as pd

    sources = [read_adapter(source) for source in adapters]
    factors = expert_weights(weights, len(sources))
    rows = []
    for name, (left, right) in factorwise(sources, factors).items():
        pairs = [(w, each.factors[name]) for w, each in zip(factors, sources, strict=True) if name in each.factors]
        true_left, true_right = torch.cat([w * l for w, (l, _) in pairs], 1), torch.cat([r for _, (_, r) in pairs])
        true, trap = _norm(true_left, true_right), _norm(left, right)
        gap = _norm(torch.cat([left, -true_left], 1), torch.cat([right, true_right]))
        inner = float(((true_left.T @ left) * (true_right @ right.T)).sum())
        share = {"error": gap / true, "scale": inner / true**2} if true else {"error": math.nan, "scale": math.nan}
        rows.append({"module": name, "norm": true, "factorwise": trap} | share)
    return pd.DataFrame(rows, columns=["module", "norm", "factorwise", "error", "scale"])


def _norm(left: Tensor, right: Tensor) -> float:
    return float(product_svd(left.double(), right.double())[1].norm())


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
