"""What M2N2 is measured against: CMA-ES, MAP-Elites, and trying every point of the arc between two models.

All take a budget of evaluations and return an `Evolved`: the best, its score, and the best score so far after each
evaluation, so that curves of different methods can be laid over each other.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.hyperparameters import Range, hyperparameters, validate
from notebook_kit.merging.flat_space import FlatSpace
from notebook_kit.merging.niches import mix
from notebook_kit.weights import Weights, check


class Evolved(NamedTuple):
    """The best found: `flat` Float[d] (weights or coefficients), its score, and the best so far, Float[evaluations]."""

    flat: Tensor
    score: float
    history: Tensor


def cma_es(
    start: Float[Tensor, " d"],
    score: Callable[[Float[Tensor, " d"]], float],
    *,
    sigma: Annotated[float, Range(1e-8, 100, log=True)] = 0.2,
    evals: Annotated[int, Range(1, 1_000_000)] = 200,
    pop_size: Annotated[int | None, Range(2, 4096)] = None,
    bounds: tuple[float, float] | None = None,
    diagonal: bool = False,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
) -> Evolved:
    """Maximise a score by CMA-ES (Hansen's `cma`): a Gaussian cloud that learns its own shape.

    Args:
        start: centre of the first cloud: a few merge coefficients, or all weights of a small model.
        score: vector -> number, higher is better.
        sigma: standard deviation of the first cloud.
        evals: evaluations at most; whole generations only.
        pop_size: vectors in a generation; None is 4 + ⌊3 ln d⌋.
        bounds: (lowest, highest) of every entry.
        diagonal: learn d variances and no correlations, for thousands of parameters.
        seed: of the draws; numpy's global state is left alone.

    Returns:
        Evolved.

    Raises:
        ImportError: `cma` is not installed.
        ValueError: a setting is out of range, or the budget is less than one generation.

    Source:
        Hansen, 2016, arXiv 1604.00772; CMA-ES/pycma.
    """
    settings = {"sigma": sigma, "evals": evals, "pop_size": pop_size, "diagonal": diagonal, "seed": seed}
    validate(hyperparameters(cma_es), settings)
    try:
        import cma
    except ImportError:
        raise ImportError("cma_es needs the package cma: pip install cma") from None
    # cma would seed numpy's global generator; its own draws, and no others, come from `draw`.
    draw = np.random.default_rng(seed).standard_normal
    options = {"seed": math.nan, "randn": lambda *shape: draw(shape), "verbose": -9, "CMA_diagonal": diagonal}
    options |= {"popsize": pop_size} if pop_size else {}
    options |= {"bounds": list(bounds)} if bounds else {}
    solver = cma.CMAEvolutionStrategy(start.double().cpu().numpy(), sigma, options)
    if solver.popsize > evals:
        raise ValueError(f"evals must be at least one generation, {solver.popsize}, got {evals} (cma_es)")
    best, flat, history = -float("inf"), start, []
    while len(history) + solver.popsize <= evals and not solver.stop():
        cloud = solver.ask()
        scores = [float(score(start.new_tensor(x))) for x in cloud]
        solver.tell(cloud, [-value for value in scores])
        for x, value in zip(cloud, scores, strict=True):
            if value > best:
                best, flat = value, start.new_tensor(x)
            history.append(best)
    return Evolved(flat, best, torch.tensor(history))


def map_elites(
    base: Weights,
    experts: Sequence[Weights],
    *,
    score_points: Callable[[dict[str, Tensor]], Tensor],
    groups: Sequence[Tensor],
    bins: Annotated[int, Range(1, 100)] = 10,
    mutation_std: Annotated[float, Range(0, 1)] = 0.0,
    evals: Annotated[int, Range(1, 1_000_000)] = 1000,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
) -> Evolved:
    """Evolve a grid of elites: a cell for each pair of accuracies on two groups of points, its best stays.

    Args:
        base: state dict to be like.
        experts: the first parents.
        score_points: as `m2n2`.
        groups: two masks, Bool[points], such as odd and even digits; the grid's axes.
        bins: cells along each axis.
        mutation_std: of noise added to a child.
        evals: evaluations, the experts' among them.
        seed: of the draws.

    Returns:
        Evolved: read `flat` with `FlatSpace(base).weights(flat)`.

    Raises:
        IncompatibleWeights, ValueError: as `m2n2`; or there are not two groups, each of at least one point.

    Source:
        Mouret and Clune, 2015, arXiv 1504.04909, as in SakanaAI/natural_niches, map_elites_fn.py.
    """
    settings = {"bins": bins, "mutation_std": mutation_std, "evals": evals, "seed": seed}
    validate(hyperparameters(map_elites), settings)
    check(base, experts)
    if len(groups) != 2 or not all(bool(group.any()) for group in groups):
        raise ValueError(f"groups must be two masks with a point each, got {len(groups)} (map_elites)")
    generator = torch.Generator().manual_seed(seed)
    cells: dict[tuple[int, int], tuple[float, Tensor]] = {}
    space = FlatSpace(base)
    history, waiting = [], list(space.flatten(experts))
    while len(history) < evals:
        if waiting:
            child = waiting.pop(0)
        else:
            chances, rows = (torch.tensor([q for q, _ in cells.values()]), [row for _, row in cells.values()])
            chances = chances + 1e-12
            two = torch.multinomial(chances, 2, replacement=len(rows) < 2, generator=generator)
            w, d = torch.rand(1, generator=generator), len(rows[0])
            k = torch.randint(d, (1,), generator=generator)
            child = mix(rows[int(two[0])][None], rows[int(two[1])][None], w, k)[0]
            child = child + mutation_std * torch.randn(d, generator=generator).to(child)
        scores = score_points(space.weights(child)).float()
        cell = tuple(min(int(float(scores[group].mean()) * bins), bins - 1) for group in groups)
        quality = float(scores.mean())
        if cell not in cells or quality > cells[cell][0]:
            cells[cell] = (quality, child)
        history.append(max(q for q, _ in cells.values()))
    best, flat = max(cells.values(), key=lambda entry: entry[0])
    return Evolved(flat, best, torch.tensor(history))


def slerp_search(
    base: Weights,
    experts: Sequence[Weights],
    *,
    score_points: Callable[[dict[str, Tensor]], Tensor],
    evals: Annotated[int, Range(2, 1_000_000)] = 100,
) -> Evolved:
    """Try evenly spaced points of the arc between two models: brute force with one knob.

    Args:
        base: state dict to be like.
        experts: exactly two.
        score_points: as `m2n2`.
        evals: points tried, both ends among them (official code: 10 000).

    Returns:
        Evolved: of equally good points the first.

    Raises:
        IncompatibleWeights, ValueError: as `check`; or there are not two experts.
    """
    validate(hyperparameters(slerp_search), {"evals": evals})
    check(base, experts)
    if len(experts) != 2:
        raise ValueError(f"slerp_search needs exactly two experts, got {len(experts)}")
    space = FlatSpace(base)
    a, b = space.flatten(experts).split(1)
    nowhere = torch.tensor([a.shape[1]])
    best, flat, history = -1.0, a[0], []
    for t in torch.linspace(0, 1, evals):
        child = mix(a, b, t[None], nowhere)[0]
        value = float(score_points(space.weights(child)).float().mean())
        if value > best:
            best, flat = value, child
        history.append(best)
    return Evolved(flat, best, torch.tensor(history))
