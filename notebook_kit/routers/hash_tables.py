"""Tables for hash routing: which expert a token id goes to, for ever. Each is a plain function."""

import heapq

import torch
from jaxtyping import Float, Int
from torch import Tensor


def random_table(vocab_size: int, n_experts: int, seed: int = 0) -> Int[Tensor, " ids"]:
    """Draw an expert for every id."""
    return torch.randint(n_experts, (vocab_size,), generator=torch.Generator().manual_seed(seed), device="cpu")


def balanced_table(counts: Int[Tensor, " ids"], n_experts: int) -> Int[Tensor, " ids"]:
    """Deal ids out, the most frequent first, each to the expert that has the fewest occurrences so far.

    Args:
        counts: how often each id occurs in the training text.
        n_experts: N.

    Returns:
        Table whose largest and smallest load differ by at most the count of the most frequent id.
    """
    table = torch.empty(len(counts), dtype=torch.int64)
    lightest = [(0, expert) for expert in range(n_experts)]
    amounts = counts.tolist()
    for token in counts.sort(descending=True, stable=True).indices.tolist():
        load, expert = lightest[0]
        table[token] = expert
        heapq.heapreplace(lightest, (load + amounts[token], expert))
    return table


def clustered_table(embeddings: Float[Tensor, "ids d"], n_experts: int, seed: int = 0) -> Int[Tensor, " ids"]:
    """Give each cluster of similar ids one expert: k-means, N clusters (the paper's warning example).

    Args:
        embeddings: of all ids.
        n_experts: N.
        seed: of the first centres.
    """
    x = embeddings.detach().float()
    generator = torch.Generator().manual_seed(seed)
    centres = x[torch.randperm(len(x), generator=generator, device="cpu")[torch.arange(n_experts) % len(x)]]
    for _ in range(25):
        table = torch.cdist(x, centres).argmin(1)
        counts = torch.bincount(table, minlength=n_experts)
        sums = torch.zeros_like(centres).index_add_(0, table, x)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
    return table


def dispersed_table(embeddings: Float[Tensor, "ids d"], n_experts: int, seed: int = 0) -> Int[Tensor, " ids"]:
    """Give similar ids different experts: the clusters of `clustered_table`, each dealt out over all experts in turn.

    Args:
        embeddings: of all ids.
        n_experts: N.
        seed: of the first centres.
    """
    by_cluster = clustered_table(embeddings, n_experts, seed).sort(stable=True).indices
    table = torch.empty_like(by_cluster)
    table[by_cluster] = torch.arange(len(by_cluster), device=table.device) % n_experts
    return table
