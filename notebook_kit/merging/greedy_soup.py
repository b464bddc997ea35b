"""Greedy soup: of several runs at one task, average those that help, found one by one on held-out data.

    sort     the runs by their held-out score, best first
    add      run i joins if  score(mean of those in, and i) ≥ score(mean of those in)

The result is never worse, on the held-out data, than the best single run. Wortsman et al., 2022, recipe 1. The data
that `score` looks at chose the soup: report on other data. `strict` asks for > instead of ≥, so that a run which
changes nothing stays out.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.merging.average import average
from notebook_kit.merging.scored import scored
from notebook_kit.weights import Weights, check

Score = Callable[[dict[str, Tensor]], float]


def greedy_ingredients(
    base: Weights, experts: Sequence[Weights], *, score: Score, strict: bool = False, **_
) -> dict[str, list[int]]:
    """Choose the runs that go into the soup.

    Args:
        base: state dict that sets keys, shapes and dtypes.
        experts: state dicts of runs at one task.
        score: state dict to held-out score, higher is better.
        strict: a run must improve the score to join.

    Returns:
        dict: "ingredients": indices of the experts, in the order in which they joined.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: a score is NaN.
    """
    check(base, experts)
    alone = [scored(score, average(base, [expert])) for expert in experts]
    order = sorted(range(len(experts)), key=lambda i: -alone[i])
    joined, best = [order[0]], alone[order[0]]
    for i in order[1:]:
        new = scored(score, average(base, [experts[j] for j in (*joined, i)]))
        if new > best or (new == best and not strict):
            joined.append(i)
            best = new
    return {"ingredients": joined}


@method(family="merging", paper="model-soups", statistics=greedy_ingredients)
def greedy_soup(
    base: Weights,
    experts: Sequence[Weights],
    *,
    score: Score,
    strict: bool = False,
    ingredients: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Average the runs that raise a held-out score, tried from the best one down.

    Args:
        base: state dict that sets keys, shapes and dtypes.
        experts: state dicts of runs at one task, with other seeds or hyperparameters.
        score: state dict to held-out score, higher is better; called at most 2 K − 1 times.
        strict: a run must improve the score to join; else it may also leave it as it is.
        ingredients: from `greedy_ingredients`, when the model is merged in parts; None finds them.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor.

    Source:
        Wortsman et al., 2022, arXiv 2203.05482, recipe 1.
    """
    if ingredients is None:
        ingredients = greedy_ingredients(base, experts, score=score, strict=strict)["ingredients"]
    return average(base, [experts[i] for i in ingredients])
