"""Groups of experts that compute alike: k-means and agglomerative clustering of a few points."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from scipy.cluster.hierarchy import linkage as scipy_linkage
from torch import Tensor

Groups = tuple[tuple[int, ...], ...]


def k_means(gram: Float[Tensor, "n n"], k: int, *, restarts: int = 10, max_iter: int = 100, seed: int = 0) -> Groups:
    """Cluster n points of which only the inner products are known: minimise J = Σ_c Σ_{j∈c} ‖y_j − mean_c‖².

    Squared distances to a mean follow from G = Y Yᵀ alone, so that points with millions of coordinates cost nothing
    here. k-means++ starts; the best of the restarts.

    Args:
        gram: G.
        k: clusters; none stays empty.
        restarts: of Lloyd's iteration.
        max_iter: rounds of each.
        seed: of the starts.

    Returns:
        k groups in the order of their first member, members rising.
    """
    g, n = gram.double().cpu(), len(gram)
    diagonal = g.diagonal()
    generator = torch.Generator().manual_seed(seed)
    best, labels = torch.inf, torch.arange(n)
    for _ in range(restarts if k < n else 0):
        chosen = [int(torch.randint(n, (), generator=generator))]
        while len(chosen) < k:  # k-means++: far points are likely starts
            squared = (diagonal[:, None] + diagonal[chosen] - 2 * g[:, chosen]).amin(1).clamp_min(0)
            squared[chosen] = 0
            free = torch.ones(n, dtype=torch.double).index_fill(0, torch.tensor(chosen), 0)
            odds = squared if squared.sum() > 0 else free
            chosen.append(int(torch.multinomial(odds, 1, generator=generator)))
        distance = diagonal[:, None] + diagonal[chosen] - 2 * g[:, chosen]
        current = None
        for _ in range(max_iter):
            new = _filled(distance, k)
            if current is not None and torch.equal(new, current):
                break
            current = new
            share = torch.nn.functional.one_hot(current, k).double()
            share = share / share.sum(0)
            distance = diagonal[:, None] - 2 * g @ share + ((g @ share) * share).sum(0)
        j = distance[torch.arange(n), current].sum().item()
        if j < best - 1e-12:
            best, labels = j, current
    return groups_of(labels.tolist())


def agglomerate(points: Float[Tensor, "n d"], k: int, linkage: str = "average") -> Groups:
    """Cluster points bottom up, Euclidean distance: the two nearest clusters join until k are left.

    Args:
        points: one row each.
        k: clusters.
        linkage: distance of two clusters: "average", "single" (nearest pair), "complete" (farthest pair), "ward".
    """
    n = len(points)
    members = {i: [i] for i in range(n)}
    if n > 1:
        for step, (a, b, *_) in enumerate(scipy_linkage(points.double().cpu().numpy(), linkage)[: n - k]):
            members[n + step] = members.pop(int(a)) + members.pop(int(b))
    labels = {member: number for number, group in enumerate(members.values()) for member in group}
    return groups_of([labels[i] for i in range(n)])


def share_budget(cosines: Mapping[str | int, Float[Tensor, "_ _"]], n_experts: int) -> dict[str | int, int]:
    """Share L · n_experts clusters among L layers: more where experts' outputs differ more.

    A layer's diversity is its mean of 1 − cos over pairs; shares are proportional to it by Webster's rule, at least 1
    and at most all.

    Args:
        cosines: layer to the cosines of its experts' outputs.
        n_experts: clusters of a layer, on average.

    Returns:
        Layer to clusters; they add up to L · n_experts.
    """
    diversity = {name: max((1 - cosine).mean().item(), 0.0) + 1e-12 for name, cosine in cosines.items()}
    most = {name: len(cosine) for name, cosine in cosines.items()}
    counts = dict.fromkeys(cosines, 1)
    for _ in range(n_experts * len(counts) - len(counts)):  # each goes where clusters are scarcest for the diversity
        open_ = [name for name in counts if counts[name] < most[name]]
        counts[max(open_, key=lambda name: diversity[name] / (counts[name] + 0.5))] += 1
    return counts


def groups_of(labels: Sequence[int]) -> Groups:
    """Labels to groups, in the order of their first member."""
    groups: dict[int, list[int]] = {}
    for member, label in enumerate(labels):
        groups.setdefault(label, []).append(member)
    return tuple(map(tuple, groups.values()))


def led_by_usage(groups: Groups, usage: Float[Tensor, " experts"]) -> Groups:
    """The most used member of each group first."""
    return tuple(tuple(sorted(group, key=lambda e: (-usage[e].item(), e))) for group in groups)


def _filled(distance: Float[Tensor, "n k"], k: int) -> Tensor:
    """Nearest cluster of each point; an empty cluster takes the point that is farthest from its own."""
    labels = distance.argmin(1)
    for c in range(k):
        if not (labels == c).any():
            own = distance[torch.arange(len(labels)), labels].clone()
            own[torch.bincount(labels, minlength=k)[labels] == 1] = -torch.inf
            labels[own.argmax()] = c
    return labels
