"""Balanced assignment, exactly and fast: each token to one expert, at most `slots` tokens an expert, largest total.

    maximise Σ_t a_{t, e(t)}        at most C tokens in each expert

Experts get prices. At the right prices every token may take the expert of largest a - price, and no expert is over
full; the assignment is then the best one there is. Prices found by descent come close, and the few tokens that are
still too many in an expert move along shortest paths: from an over-full expert, over others, to one that has room,
where a step i -> j costs what the token of i that minds least would lose in j. Such moves keep the assignment best for
its loads, so in the end it is exact. The graph has N nodes, not T; a general solver works on T columns.

Source: successive shortest paths as in Ahuja, Magnanti and Orlin 1993, chapter 9.
"""

from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

STEPS = 150  # of the descent of prices; more changes the time, never the answer


def balanced_assignment(scores: Float[Tensor, "tokens experts"], slots: int) -> Int[Tensor, " tokens"]:
    """Give each token an expert.

    Args:
        scores: affinities a, without NaN.
        slots: C; slots * experts must be at least the number of tokens.

    Returns:
        The expert of each token.
    """
    n_tokens, n_experts = scores.shape
    if n_tokens == 0:
        return torch.zeros(0, dtype=torch.int64, device=scores.device)
    limit = torch.finfo(torch.float32).max
    a = scores.detach().double().cpu().clamp(-limit, limit)
    # Empty slots belong to tokens that do not mind where they are: now every expert is to be exactly full.
    a = torch.cat([a, a.new_zeros(slots * n_experts - n_tokens, n_experts)])
    experts = by_prices(a, slots)
    _move(a.numpy(), experts.numpy(), slots)
    return experts[:n_tokens].to(scores.device)


def by_prices(a: Tensor, slots: int) -> Int[Tensor, " tokens"]:
    """Every token takes the expert of largest a - price, at prices that leave few experts over full."""
    price, step = a.new_zeros(a.shape[1]), 0.5 * float(a.std(correction=0)) or 1.0
    fewest, best = len(a) + 1, None
    for _ in range(STEPS):
        experts = (a - price).argmax(1)
        excess = torch.bincount(experts, minlength=a.shape[1]) - slots
        too_many = int(excess.clamp_min(0).sum())
        if too_many < fewest:
            fewest, best = too_many, experts
        if too_many <= a.shape[1] // 4:
            break
        price = price + step * excess.clamp_max(slots) / slots
        step *= 0.93
    return best


def _move(a: np.ndarray, experts: np.ndarray, slots: int) -> None:
    """Move tokens along shortest paths until no expert is over full; changes `experts`."""
    n_experts = a.shape[1]
    counts = np.bincount(experts, minlength=n_experts)
    cost = np.full((n_experts, n_experts), np.inf)  # what the cheapest token of i loses in j
    stale = range(n_experts)
    while (counts > slots).any():
        for i in stale:
            members = a[experts == i]
            cost[i] = (members[:, i : i + 1] - members).min(0) if len(members) else np.inf
        path = _cheapest_path(cost, counts > slots, counts < slots)
        # Tokens that lose the same go together: equal rows would otherwise move one by one.
        movers = []
        for i, j in pairwise(path):
            members = np.flatnonzero(experts == i)
            movers.append(members[a[members, i] - a[members, j] == cost[i, j]])
        room = min(counts[path[0]] - slots, slots - counts[path[-1]], *map(len, movers))
        for j, tokens in zip(path[1:], movers, strict=True):
            experts[tokens[:room]] = j
        counts[path[0]] -= room
        counts[path[-1]] += room
        stale = path


def _cheapest_path(cost: np.ndarray, start: np.ndarray, goal: np.ndarray) -> list[int]:
    """Bellman and Ford's path from some expert of `start` to one of `goal`; costs may be negative, circles are not."""
    distance, before = np.where(start, 0.0, np.inf), np.full(len(cost), -1)
    for _ in range(len(cost)):
        over = distance[:, None] + cost
        via = over.argmin(0)
        shorter = over[via, np.arange(len(cost))] < distance - 1e-12
        if not shorter.any():
            break
        distance = np.where(shorter, over.min(0), distance)
        before = np.where(shorter, via, before)
    path = [int(np.where(goal, distance, np.inf).argmin())]
    while not start[path[0]]:
        path.insert(0, int(before[path[0]]))
    return path
