"""Serving when experts are known ahead: which to keep in fast memory, and which requests to run together.

*Cache.* A token needs one expert; `capacity` experts fit in fast memory. On a miss one leaves:

| policy  | who leaves                                                            | looks |
|---------|-----------------------------------------------------------------------|-------|
| lru     | the expert not used for longest                                       | back  |
| lfu     | the one used least often so far (of equals the one unused longest)    | back  |
| random  | any                                                                   |       |
| belady  | the one whose next use lies farthest ahead, within the lookahead      | ahead |

Belady's rule is optimal if it sees everything; a router that needs only token ids can see as far as the queue is long.

*Batches.* Every request has one token ready at a time. In order of arrival a batch needs up to as many experts as it
has tokens; grouped by expert it needs one.

Limits. A count of loads, not a clock: a prefetched expert is loaded too, only earlier. How far the lookahead reaches is
yours to say.

Source: Cai et al. 2024, section 4; their repository has no serving code, so the policies are written after the paper's
text and Belady 1966.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range


@dataclass(frozen=True)
class CacheRun:
    """What a cache did: hits [T], and what it held after each token [T, capacity] (-1 is an empty place)."""

    hits: Bool[Tensor, " tokens"]
    held: Int[Tensor, "tokens capacity"]

    @property
    def loads(self) -> int:
        """How many experts were brought in: the misses."""
        return int((~self.hits).sum())

    @property
    def hit_rate(self) -> float:
        """Share of tokens whose expert was there."""
        return float(self.hits.float().mean()) if len(self.hits) else 0.0


@method(family="mixtures", paper="read-me")
def expert_cache(
    sequence: Sequence[int] | Int[Tensor, " tokens"],
    *,
    capacity: Annotated[int, Range(1, 4096)] = 5,
    policy: Annotated[str, Choice("belady", "lru", "lfu", "random")] = "belady",
    lookahead: Annotated[int | None, Range(0, 1_000_000)] = None,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
) -> CacheRun:
    """Replay a sequence of experts through a cache.

    Args:
        sequence: the expert of each token, from 0.
        capacity: experts that fit.
        policy: who leaves on a miss.
        lookahead: how many coming tokens belady knows; None is all. With 0 it is lru.
        seed: of the random policy.

    Raises:
        ValueError: a negative expert.
    """
    experts = sequence.tolist() if isinstance(sequence, Tensor) else list(sequence)
    if min(experts, default=0) < 0:
        raise ValueError(f"experts must be numbered from 0, got {min(experts)} (expert_cache)")
    following, later = [math.inf] * len(experts), {}
    for t in range(len(experts) - 1, -1, -1):
        following[t], later[experts[t]] = later.get(experts[t], math.inf), t
    reach = math.inf if lookahead is None else lookahead
    last: dict[int, int] = {}  # when each expert was used
    uses: dict[int, int] = {}
    draw, places = random.Random(seed), [-1] * capacity

    def farthest(expert: int, now: int) -> tuple:
        ahead = following[last[expert]]
        return (ahead if ahead - now <= reach else math.inf, -last[expert])

    hits, held = [], []
    for now, expert in enumerate(experts):
        hits.append(expert in places)
        if not hits[-1]:
            if -1 in places:
                gone = places.index(-1)
            elif policy == "random":
                gone = draw.randrange(capacity)
            elif policy == "belady":
                gone = max(range(capacity), key=lambda i: farthest(places[i], now))
            else:
                often = uses if policy == "lfu" else {}
                gone = min(range(capacity), key=lambda i: (often.get(places[i], 0), last[places[i]]))
            places[gone] = expert
        last[expert], uses[expert] = now, uses.get(expert, 0) + 1
        held.append(list(places))
    return CacheRun(torch.tensor(hits, dtype=torch.bool), torch.tensor(held, dtype=torch.int64).reshape(-1, capacity))


@dataclass(frozen=True)
class BatchRun:
    """A schedule: each batch's (request, position) pairs, the experts it needs, and each token's wait in batches."""

    batches: list[list[tuple[int, int]]]
    experts: list[set[int]]
    waits: list[int]

    @property
    def loads(self) -> int:
        """Experts to bring in, summed over batches, if nothing stays between them."""
        return sum(map(len, self.experts))


@method(family="mixtures", paper="read-me")
def expert_batches(
    choices: Int[Tensor, "requests tokens"],
    *,
    batch_size: Annotated[int, Range(1, 4096)] = 8,
    policy: Annotated[str, Choice("expert", "arrival")] = "expert",
) -> BatchRun:
    """Schedule the tokens of waiting requests; a request's next token is ready when the one before it is done.

    Args:
        choices: the expert of each request's tokens.
        batch_size: most tokens in a batch.
        policy: "arrival" takes whoever waits longest; "expert" takes the expert that most are waiting for (of equals
            the one waited for longest), and nobody else.

    Raises:
        ValueError: choices that are no table, or a negative expert.
    """
    if choices.ndim != 2 or (choices.numel() and int(choices.min()) < 0):
        raise ValueError(
            f"choices must be [requests, tokens] of experts numbered from 0, got {list(choices.shape)} (expert_batches)"
        )
    table, n_tokens = choices.tolist(), choices.shape[1]
    queue = [(request, 0, 0) for request in range(len(table))] if n_tokens else []  # request, position, ready since
    batches, experts, waits = [], [], []
    while queue:
        taken = queue
        if policy == "expert":
            waiting: dict[int, list] = {}
            for entry in queue:
                waiting.setdefault(table[entry[0]][entry[1]], []).append(entry)
            taken = max(waiting.values(), key=len)  # the first of the longest
        taken = taken[:batch_size]
        chosen, now = set(taken), len(batches)
        waits += [now - since for _, _, since in taken]
        batches.append([(request, position) for request, position, _ in taken])
        experts.append({table[request][position] for request, position, _ in taken})
        ready = [(request, position + 1, now + 1) for request, position, _ in taken if position + 1 < n_tokens]
        queue = [entry for entry in queue if entry not in chosen] + ready
    return BatchRun(batches, experts, waits)
