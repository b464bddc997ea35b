"""Numbers about routing between adapters: do tasks that are alike share skills, do their gradients agree, who votes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.mixtures import Glider

Domain = tuple[Tensor, Tensor | str]  # the model's input, and the query


def skill_similarity(weights: Float[Tensor, "tasks heads skills"]) -> Float[Tensor, "tasks tasks"]:
    """Return the cosine between what two tasks take of the skills, over all heads, beyond what the mean task takes.

    Args:
        weights: w of one layer, from `mixtures.task_weights`.
    """
    rows = (weights - weights.mean(0)).flatten(1).double()
    rows = F.normalize(rows, dim=1)
    return (rows @ rows.T).float()


def pair_table(
    similarity: Float[Tensor, "tasks tasks"], overlap: Float[Tensor, "tasks tasks"], names: Sequence[str] | None = None
) -> pd.DataFrame:
    """List all pairs of tasks with the similarity of their skills and of the tasks themselves.

    Args:
        similarity: of the skills.
        overlap: of the tasks.
        names: of the tasks; numbers if None.

    Returns:
        DataFrame: pair, overlap, similarity.
    """
    a, b = torch.triu_indices(len(similarity), len(similarity), 1)
    names = [str(i) for i in range(len(similarity))] if names is None else list(names)
    pairs = [f"{names[i]} and {names[j]}" for i, j in zip(a.tolist(), b.tolist(), strict=True)]
    return pd.DataFrame(
        {"pair": pairs, "overlap": overlap[a, b].cpu().numpy(), "similarity": similarity[a, b].cpu().numpy()}
    )


def gradient_alignment(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batches: Sequence[Any], *, without: str = ".Z"
) -> Float[Tensor, "tasks tasks"]:
    """Return the cosine between the gradients of tasks, on the parameters that they share.

    Args:
        model: its gradients are left as they were.
        loss: (model, batch) -> scalar.
        batches: one for each task.
        without: parameters whose name ends so are a task's own and do not count.
    """
    shared = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith(without)]
    rows = []
    for batch in batches:
        gradients = torch.autograd.grad(loss(model, batch), shared, allow_unused=True)
        parts = zip(gradients, shared, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in parts]))
    unit = F.normalize(torch.stack(rows), dim=1)
    return unit @ unit.T


@torch.no_grad()
def routing_matrix(
    glider: Glider, inputs: Mapping[str, tuple[Tensor, Tensor | str]], *, layer: int = 0
) -> pd.DataFrame:
    """Return how much weight the tokens of each domain give to each expert.

    Args:
        glider: asked anew for each domain; its last vote is put back.
        inputs: domain to (the model's input, the query).
        layer: which of the bank's layers.

    Returns:
        DataFrame: a row a domain, a column an expert; rows sum to 1.
    """
    before = [bank.router.vote for bank in glider.layers.values()], glider.similarity
    rows, (_, chosen) = {}, list(glider.layers.items())[layer]
    try:
        for domain, (x, query) in inputs.items():
            glider(x, query=query)
            routing = chosen.routing
            zeros = routing.weights.new_zeros(len(routing), glider.n_experts)
            rows[domain] = zeros.scatter_add(1, routing.experts.clamp_min(0), routing.weights).mean(0).cpu().numpy()
    finally:
        for bank, vote in zip(glider.layers.values(), before[0], strict=True):
            bank.router.vote = vote
        glider.similarity = before[1]
    return pd.DataFrame.from_dict(rows, orient="index")


def weight_curve(
    glider: Glider,
    groups: Mapping[str, Mapping[str, Domain]],
    score: Callable[[nn.Module, str], float],
    weights: Sequence[float | None],
) -> pd.DataFrame:
    """Measure a bank under different weights of the global vote.

    Args:
        glider: its own weight is put back.
        groups: name of a group (held-in, held-out) to its domains, each with (input, query); the query is asked.
        score: (glider, domain) -> higher is better.
        weights: a; None is the rule.

    Returns:
        DataFrame: weight (None for the rule), and for each group the mean score of its domains.
    """
    before, rows = glider.weight, []
    try:
        for weight in weights:
            glider.weight = weight
            row = {"weight": weight}
            for group, domains in groups.items():
                scores = []
                for domain, (_, query) in domains.items():
                    glider.ask(query)
                    scores.append(score(glider, domain))
                row[group] = sum(scores) / len(scores)
            rows.append(row)
    finally:
        glider.weight = before
    return pd.DataFrame(rows)


def plane(embeddings: Float[Tensor, "n d"], *others: Float[Tensor, "_ d"]) -> list[Float[Tensor, "_ 2"]]:
    """Project embeddings on the plane of their two main directions, and others onto the same plane."""
    mean = embeddings.mean(0)
    axes = torch.linalg.svd(embeddings - mean, full_matrices=False).Vh[:2]
    return [(rows - mean) @ axes.T for rows in (embeddings, *others)]
