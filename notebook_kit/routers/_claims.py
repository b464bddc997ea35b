"""What routers share: picks in order with ties settled, and the queue in front of an expert of limited capacity."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FEW, MANY = 3, 4096  # so few picks, among so many scores, are faster found one by one


def top_k(scores: Float[Tensor, "tokens experts"], k: int) -> Int[Tensor, "tokens k"]:
    """Return the k best experts of each token, best first; of equal scores the lowest index wins.

    A maximum is promised to be the first of equals. A selection leaves ties open, so rows that have one among the
    k + 1 best are sorted by a stable sort.
    """
    if k == 1 or (k <= FEW and scores.numel() >= MANY):
        picks = [scores.max(dim=1, keepdim=True).indices]
        rest = scores.clone() if k > 1 else scores
        while len(picks) < k:
            rest.scatter_(1, picks[-1], -torch.inf)
            value, pick = rest.max(dim=1, keepdim=True)
            picks.append(pick)
        if k == 1 or not torch.isneginf(value).any():  # what was picked before looks like an expert of -inf
            return torch.cat(picks, 1)
    best, picks = _largest(scores, min(k + 1, scores.shape[1]))
    tied = (best[:, 1:] == best[:, :-1]).any(1)
    if tied.any():
        picks[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, : picks.shape[1]]
    return picks[:, :k]


def _largest(scores: Float[Tensor, "tokens experts"], k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk`; on a thread or two numpy needs half the time for some of few, and a fifth for nearly all."""
    n_experts = scores.shape[1]
    fast = 64 * k <= n_experts or scores.numel() < MANY or torch.get_num_threads() > 2
    if fast or not scores.is_cpu or scores.dtype != torch.float32:
        return scores.topk(k, dim=1)
    values = scores.detach().numpy()
    if 2 * k > n_experts:
        picks = torch.from_numpy(np.argsort(-values, axis=1)[:, :k])
        return scores.gather(1, picks), picks
    picks = torch.from_numpy(np.argpartition(values, n_experts - k, axis=1)[:, -k:])
    best, order = scores.gather(1, picks).sort(dim=1, descending=True)
    return best, picks.gather(1, order)


def best_first(
    used: Bool[Tensor, "tokens experts"], scores: Float[Tensor, "tokens experts"]
) -> Int[Tensor, "tokens k_max"]:
    """The experts that each token uses, by falling score, in as many columns as the longest row needs; -1 behind them.

    Args:
        used: any number a token.
        scores: not negative; of equal ones the lowest index comes first.
    """
    counts = used.sum(1)
    k_max = max(int(counts.max()), 1) if len(counts) else 1
    if 2 * k_max > used.shape[1]:
        others = torch.arange(-1, -1 - used.shape[1], -1, device=used.device, dtype=scores.dtype)  # no two are equal
        experts = top_k(torch.where(used, scores, others), k_max)
        return experts.where(torch.arange(k_max, device=used.device) < counts[:, None], -1)
    # The few that are used go side by side first: there is less to sort.
    token, expert = used.nonzero(as_tuple=True)
    place = torch.arange(len(token), device=token.device) - (counts.cumsum(0) - counts)[token]
    experts, found = used.new_full((len(used), k_max), -1, dtype=torch.long), scores.new_full((len(used), k_max), -1)
    experts[token, place], found[token, place] = expert, scores[token, expert]
    return experts.gather(1, found.sort(dim=1, descending=True, stable=True).indices)


def capacity(n_tokens: int, n_experts: int, k: int, capacity_factor: float) -> int:
    """C = ceil(k T / N * capacity_factor): the slots of one expert, where 1.0 is an even share."""
    # Rounding first: 1.1 * 20 is 22.000000000000004 and would open a 23rd slot.
    return math.ceil(round(k * n_tokens / n_experts * capacity_factor, 6))


def within_capacity(
    claimed: Int[Tensor, "tokens k"],
    n_experts: int,
    slots: int,
    priority: Float[Tensor, " tokens"] | None = None,
) -> Bool[Tensor, "tokens k"]:
    """Serve claims until each expert is full: all first choices before any second choice.

    Args:
        claimed: experts asked for, -1 for no claim.
        n_experts: N.
        slots: capacity C of each expert.
        priority: inside a choice, tokens queue by falling priority; None means token order.

    Returns:
        True where a claim is served.
    """
    counts = torch.bincount(claimed.reshape(-1) + 1, minlength=n_experts + 1)[1:]
    served, full = claimed >= 0, counts > slots
    if not full.any():
        return served
    # Only in front of a full expert does the place matter.
    contested = served & full[claimed]
    rows = contested.any(1).nonzero()[:, 0]
    if priority is not None:
        rows = rows[priority[rows].sort(descending=True, stable=True).indices]
    choice, place = contested[rows].T.nonzero(as_tuple=True)  # first choices, then second choices, ...
    token = rows[place]
    queue = claimed[token, choice]
    # Narrow integers are sorted several times faster.
    by_expert, index = (queue.short() if n_experts < 2**15 else queue).sort(stable=True)
    waiting = counts * full
    begin = waiting.cumsum(0) - waiting  # where each expert's queue begins, among the sorted claims
    late = index[torch.arange(len(queue), device=queue.device) - begin[by_expert.long()] >= slots]
    served[token[late], choice[late]] = False
    return served
