"""Which experts to host under a budget, and which of them serves which category: one integer programme, solved exactly.

    maximise   Σ_m n_m Σ_k s_mk z_mk          s_mk score of expert k on category m, n_m its share of the traffic
    such that  Σ_k z_mk = 1,  z_mk <= y_k,  Σ_k b_k y_k <= B,  y_k in {0, 1}

For fixed y the best z is at a corner, so z may be continuous. Of several optima the one with the smallest hosted size
is returned; a category that several hosted experts serve alike goes to the smallest of them, then to the lowest index.

Source: Jain et al. 2024, category-to-expert mapping. HiGHS through scipy; its default gap (1e-4) is switched off.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Composition:
    """What `compose` decided: hosted experts, the expert of each category, the value and the size."""

    hosted: tuple[int, ...]
    mapping: Int[Tensor, " categories"]
    value: float
    size: float


def compose(
    scores: Float[Tensor, "categories experts"],
    sizes: Sequence[float],
    budget: float,
    *,
    traffic: Sequence[float] | None = None,
    host: Sequence[int] = (),
) -> Composition:
    """Choose the hosted experts and each category's expert.

    Args:
        scores: s, higher is better.
        sizes: b, of each expert, such as its parameters.
        budget: B, in the same unit.
        traffic: n, weight of each category, >= 0; None weighs all alike.
        host: experts that must be hosted whether a category needs them or not.

    Returns:
        Composition; `.value` is Σ n s, in the units of `traffic` (None: the mean score).

    Raises:
        ValueError: shapes that do not fit, scores or weights that are no numbers, or a budget too small for any expert
            (names the smallest) or for `host`.
    """
    s, b, n = _checked(scores, sizes, traffic, host)
    fixed = sorted(set(host))
    least = b[fixed].sum() if fixed else b.min()
    if least > budget:
        what = f"experts {fixed}, which must be hosted, need" if fixed else f"the smallest, expert {b.argmin()}, needs"
        raise ValueError(f"no expert fits the budget {budget:g}: {what} {least:g}; raise it (compose)")
    gain = n[:, None] * s
    hosted = _solve(gain, b, budget, fixed)
    # Two goals in turn: the value, then the size.
    smaller = _solve(gain, b, budget, fixed, at_least=_value(gain, hosted))
    if _value(gain, smaller) >= _value(gain, hosted) - 1e-12 * np.abs(gain).sum():
        hosted = smaller
    order = sorted(hosted, key=lambda k: (b[k], k))
    mapping = np.asarray(order)[s[:, order].argmax(1)]
    used = tuple(sorted({*mapping.tolist(), *fixed}))
    value = gain[np.arange(len(s)), mapping].sum()
    return Composition(used, torch.from_numpy(mapping).long(), float(value), float(b[list(used)].sum()))


def _value(gain: np.ndarray, hosted: Sequence[int]) -> float:
    return float(gain[:, list(hosted)].max(1).sum())


def _solve(gain: np.ndarray, b: np.ndarray, budget: float, fixed: list[int], at_least: float | None = None) -> list:
    """The hosted experts of largest value; or, given the value, of smallest size."""
    from scipy import optimize, sparse

    m, k = gain.shape
    unit = np.abs(gain).max() or 1.0
    worth = np.concatenate([1e3 * gain.ravel() / unit, np.zeros(k)])  # HiGHS stops at an absolute gap of 1e-6
    size = np.concatenate([np.zeros(m * k), b / (b.max() or 1.0)])
    one_expert = sparse.hstack([sparse.kron(sparse.eye(m), np.ones((1, k))), sparse.csr_matrix((m, k))])
    only_hosted = sparse.hstack([sparse.eye(m * k), -sparse.kron(np.ones((m, 1)), sparse.eye(k))])
    rules = [
        optimize.LinearConstraint(one_expert, 1, 1),
        optimize.LinearConstraint(only_hosted, -np.inf, 0),
        optimize.LinearConstraint(size[None], -np.inf, budget / (b.max() or 1.0)),
    ]
    if at_least is not None:
        slack = 1e-9 * m
        rules.append(optimize.LinearConstraint(worth[None], 1e3 * (at_least / unit - slack), np.inf))
    low = np.zeros(m * k + k)
    low[m * k + np.asarray(fixed, dtype=int)] = 1
    integral = np.ones(m * k + k)  # z could be continuous; HiGHS then repairs solutions, and says so
    while True:
        found = optimize.milp(
            -worth if at_least is None else size,
            constraints=rules,
            bounds=optimize.Bounds(low, 1),
            integrality=integral,
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise RuntimeError(f"HiGHS found no composition: {found.message} (compose)")
        y = np.flatnonzero(found.x[m * k :] > 0.5)
        if b[y].sum() <= budget:
            return y.tolist()
        # Over by less than the solver's tolerance: this set is forbidden, and the rest searched again.
        cover = np.zeros((1, m * k + k))
        cover[0, m * k + y] = 1
        rules.append(optimize.LinearConstraint(cover, -np.inf, len(y) - 1))


def _checked(scores: Tensor, sizes, traffic, host) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    s = scores.detach().double().cpu().numpy()
    b = np.asarray(sizes, dtype=np.float64)
    n = np.full(len(s), 1 / max(len(s), 1)) if traffic is None else np.asarray(traffic, dtype=np.float64)
    if not s.size or b.shape != s.shape[1:] or n.shape != s.shape[:1]:
        raise ValueError(
            f"scores is [categories, experts] = {list(s.shape)}, so there must be {s.shape[1]} sizes and {s.shape[0]} "
            f"traffic weights, got {b.size} and {n.size} (compose)"
        )
    for name, array, low in (("scores", s, -np.inf), ("sizes", b, 0), ("traffic", n, 0)):
        if not np.isfinite(array).all() or (array < low).any():
            raise ValueError(f"{name} must be finite{' and not negative' if low == 0 else ''} (compose)")
    if any(not 0 <= expert < len(b) for expert in host):
        raise ValueError(f"host names experts 0 to {len(b) - 1}, got {list(host)} (compose)")
    return s, b, n


def win_rates(
    scores: Float[Tensor, "prompts experts"], categories: Int[Tensor, " prompts"], n_categories: int
) -> Float[Tensor, "categories experts experts"]:
    """How often expert a beats expert b on a category's prompts; a tie counts one half for each.

    It stands in for a judge that compares answers in pairs. `mean_win_rate` makes it a score.

    Args:
        scores: of each answer, higher is better.
        categories: of each prompt, 0 to n_categories - 1.
        n_categories: M.

    Raises:
        ValueError: a category without a prompt.
    """
    beats = (scores[:, :, None] > scores[:, None]).double() + 0.5 * (scores[:, :, None] == scores[:, None]).double()
    counts = torch.bincount(categories, minlength=n_categories)
    if len(counts) != n_categories or not counts.all():
        raise ValueError(
            f"every category 0 to {n_categories - 1} needs a prompt, got counts {counts.tolist()} (win_rates)"
        )
    total = beats.new_zeros(n_categories, *beats.shape[1:]).index_add_(0, categories, beats)
    return (total / counts[:, None, None]).float()


def mean_win_rate(rates: Float[Tensor, "categories experts experts"]) -> Float[Tensor, "categories experts"]:
    """Each expert's win rate over the others; 0.5 where it is alone.

    Args:
        rates: from `win_rates`.
    """
    others = rates.shape[-1] - 1
    return (rates.sum(-1) - 0.5) / others if others else rates[..., 0]


def agreeing_labels(
    embeddings: Float[Tensor, "prompts d"],
    known: Float[Tensor, "known d"],
    labels: Int[Tensor, " known"],
    *,
    k: int = 5,
    share: float = 1.0,
) -> Int[Tensor, " prompts"]:
    """Label prompts by their nearest labelled neighbours, where these agree; -1 where they do not.

    Args:
        embeddings: of the prompts without a category.
        known: embeddings of the curated prompts.
        labels: their categories.
        k: neighbours that are asked.
        share: of them that must say the same, in (0, 1].
    """
    near = torch.cdist(embeddings.float(), known.float()).topk(min(k, len(known)), largest=False).indices
    votes = labels[near]
    winner = votes.mode(1).values
    return winner.where((votes == winner[:, None]).float().mean(1) >= share - 1e-6, -1)
