"""What routers share: picking the k best with ties settled, and the queue in front of an expert of limited capacity."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def top_k(scores: Float[Tensor, "tokens experts"], k: int) -> Int[Tensor, "tokens k"]:
    """Return the k best experts of each token, best first; of equal scores the lowest index wins.

    `torch.topk` leaves ties open, so rows that have one among the k + 1 best are sorted by a stable sort.
    """
    if k == 1:
        return scores.max(dim=1, keepdim=True).indices  # promised to be the first of equals, and several times faster
    best, picks = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    tied = (best[:, 1:] == best[:, :-1]).any(1)
    if tied.any():
        picks[tied] = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, : picks.shape[1]]
    return picks[:, :k]


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
    n_tokens, k = claimed.shape
    order = None if priority is None else priority.sort(descending=True, stable=True).indices
    queue = (claimed if order is None else claimed[order]).T.reshape(-1)  # first choices, then second choices, ...
    # Narrow integers are sorted several times faster.
    by_expert, index = (queue.short() if n_experts < 2**15 else queue).sort(stable=True)
    counts = torch.bincount(queue + 1, minlength=n_experts + 1)
    first = counts.cumsum(0) - counts  # where each expert's queue begins, among the sorted claims
    place = torch.arange(len(queue), device=queue.device) - first[by_expert.long() + 1]
    served = torch.empty_like(queue, dtype=torch.bool)
    served[index] = (place < slots) & (by_expert >= 0)
    served = served.reshape(k, n_tokens).T
    if order is None:
        return served
    kept = torch.empty_like(claimed, dtype=torch.bool)
    kept[order] = served
    return kept
