"""Numbers about routing between whole models: budgets and rivals, adaptation by domain, embeddings, letters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from notebook_kit.mixtures.composition_of_experts import entropy
from notebook_kit.mixtures.expert_budget import Composition, compose
from notebook_kit.mixtures.meta_dmoe import MetaDMoE


@dataclass(frozen=True)
class ModelRoster:
    """What is known of whole models and of test prompts, so that any budget can be tried without running a model.

    Args:
        scores: of each expert on each category, from other prompts than these.
        sizes: parameters of each expert.
        correct: 1 where an expert answers a test prompt rightly, or any score.
        probs: the category router's, of the test prompts.
        categories: the true ones.
        experts: names.
        names: of the categories.
    """

    scores: Float[Tensor, "categories experts"]
    sizes: list[float]
    correct: Float[Tensor, "prompts experts"]
    probs: Float[Tensor, "prompts categories"]
    categories: Int[Tensor, " prompts"]
    experts: list[str]
    names: list[str]


@dataclass(frozen=True)
class Served:
    """A composition, and how it serves the test prompts: accuracy, mean active size, share of fallbacks."""

    composition: Composition
    accuracy: float
    active: float
    fallback: float


def serve(roster: ModelRoster, budget: float, *, threshold: float | None = None) -> Served:
    """Compose under a budget and serve the test prompts, from what the roster knows.

    Args:
        roster: of the models.
        budget: parameters that may be hosted.
        threshold: entropy in nats above which the best expert on average (that fits) answers; None is without.

    Raises:
        ValueError: the budget is too small for any expert.
    """
    sizes = torch.tensor(roster.sizes, dtype=torch.float64)
    general = int(roster.scores.double().mean(0).where(sizes <= budget, -torch.inf).argmax())
    host = () if threshold is None or sizes[general] > budget else (general,)
    found = compose(roster.scores, roster.sizes, budget, host=host)
    chosen, unsure = found.mapping[roster.probs.argmax(1)], torch.zeros(len(roster.probs), dtype=torch.bool)
    if host:
        unsure = entropy(roster.probs) > threshold
        chosen = chosen.where(~unsure, general)
    accuracy = roster.correct.gather(1, chosen[:, None]).mean().item()
    return Served(found, accuracy, sizes[chosen].mean().item(), unsure.float().mean().item())


def budget_curve(roster: ModelRoster, budgets: Sequence[float]) -> pd.DataFrame:
    """Serve under every budget, beside the best single expert that fits.

    Args:
        roster: of the models.
        budgets: at least the smallest expert's size.

    Returns:
        DataFrame: budget, accuracy, active, hosted, single.
    """
    rows = []
    for budget in budgets:
        served = serve(roster, budget)
        rivals = {"single": rival_accuracies(roster, budget)["best single"]}
        facts = {"budget": budget, "accuracy": served.accuracy, "active": served.active}
        rows.append({**facts, "hosted": len(served.composition.hosted), **rivals})
    return pd.DataFrame(rows)


def rival_accuracies(
    roster: ModelRoster, budget: float, *, direct: Int[Tensor, " prompts"] | None = None
) -> dict[str, float]:
    """Accuracies of other ways to choose, among the experts that fit the budget one by one.

    Args:
        roster: of the models.
        budget: parameters.
        direct: expert that a per-prompt classifier chose for each test prompt, of all experts.

    Returns:
        random, best single, direct (if given), composition, oracle per category (no budget), oracle per prompt.
    """
    fits = [k for k, size in enumerate(roster.sizes) if size <= budget]
    single = max(fits, key=lambda k: (roster.scores[:, k].mean().item(), -roster.sizes[k]))
    means = torch.stack([roster.correct[roster.categories == m].mean(0) for m in range(len(roster.names))])
    shares = torch.bincount(roster.categories, minlength=len(roster.names)) / len(roster.categories)
    found = {"random": roster.correct[:, fits].mean().item(), "best single": roster.correct[:, single].mean().item()}
    if direct is not None:
        found["direct, per prompt"] = roster.correct.gather(1, direct[:, None]).mean().item()
    found["composition"] = serve(roster, budget).accuracy
    found["oracle per category"] = (means.amax(1) * shares).sum().item()
    return found | {"oracle per prompt": roster.correct.amax(1).mean().item()}


def neighbour_agreement(x: Float[Tensor, "prompts d"], labels: Int[Tensor, " prompts"], *, k: int = 5) -> float:
    """How often a prompt's k nearest neighbours carry its own label; low is a label that jumps.

    Args:
        x: embeddings.
        labels: of the prompts.
        k: neighbours, the prompt itself not counted.
    """
    distance = torch.cdist(x, x).fill_diagonal_(torch.inf)
    near = distance.topk(k, largest=False).indices
    return (labels[near] == labels[:, None]).float().mean().item()


def adaptation_table(
    model: MetaDMoE,
    domains: Mapping[str, tuple[Tensor, Tensor]],
    *,
    n_support: int = 24,
    inner_lr: float | None = None,
    inner_steps: int | None = None,
) -> pd.DataFrame:
    """Adapt to each domain's first pictures, without their labels, and score all its pictures.

    Args:
        model: adapted; comes back with its own settings.
        domains: name to (pictures, labels).
        n_support: pictures in the support batch.
        inner_lr: instead of the model's.
        inner_steps: instead of the model's.

    Returns:
        DataFrame indexed by domain: before, after (accuracy).
    """
    kept = model.inner_lr, model.inner_steps
    model.inner_lr = kept[0] if inner_lr is None else inner_lr
    model.inner_steps = kept[1] if inner_steps is None else inner_steps
    try:
        rows = {}
        for name, (x, y) in domains.items():
            weights = model.adapt(x[:n_support])
            with torch.no_grad():
                before, after = ((model(x, weights=w).argmax(1) == y).float().mean().item() for w in (None, weights))
            rows[name] = {"before": before, "after": after}
    finally:
        model.inner_lr, model.inner_steps = kept
    return pd.DataFrame.from_dict(rows, orient="index")


@torch.no_grad()
def expert_attention(model: MetaDMoE, domains: Mapping[str, tuple[Tensor, Tensor]]) -> pd.DataFrame:
    """Which expert tokens the aggregator listens to in each domain: attention, mean over heads, tokens and pictures.

    Args:
        model: with an `ExpertAggregator`.
        domains: name to (pictures, labels).
    """
    rows = {
        n: model.aggregator.attention(model.expert_features(x)).mean((0, 1)).cpu().numpy()
        for n, (x, _) in domains.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def ranking_scores(
    a: Float[Tensor, "pairs d"], b: Float[Tensor, "pairs d"], groups: Int[Tensor, " pairs"]
) -> pd.DataFrame:
    """How well partners find each other, by cosine, within each group.

    Args:
        a: embeddings of one side.
        b: of the other; row i belongs to row i.
        groups: domain of each pair; only texts of the same domain are candidates.

    Returns:
        DataFrame indexed by group: recall (the partner comes first), f1 (at the best threshold over all pairs), ratio
            (mean similarity of partners over that of strangers), pairs.
    """
    rows = {}
    a, b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
    for group in groups.unique().tolist():
        s = a[groups == group] @ b[groups == group].T
        own = torch.eye(len(s), dtype=torch.bool, device=s.device)
        recall = (s.argmax(1) == torch.arange(len(s), device=s.device)).float().mean().item()
        ratio = (s[own].mean() / s[~own].mean()).item() if len(s) > 1 else float("nan")
        rows[group] = {"recall": recall, "f1": best_f1(s.flatten(), own.flatten()), "ratio": ratio, "pairs": len(s)}
    return pd.DataFrame.from_dict(rows, orient="index")


def best_f1(similarity: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """F1 at the threshold that makes it largest.

    Args:
        similarity: higher means more alike.
        positive: which are partners.
    """
    similarity, positive = similarity.cpu(), positive.cpu()
    order = similarity.argsort(descending=True)
    hits = positive[order].double().cumsum(0)
    named = torch.arange(1, len(order) + 1, dtype=torch.float64)
    # A threshold cannot part equal similarities: only the last of a run counts.
    last = torch.cat([similarity[order].diff() != 0, torch.ones(1, dtype=torch.bool)])
    return (2 * hits / (named + positive.sum()))[last].max().item()


def plane(u: Float[Tensor, "n d"]) -> np.ndarray:
    """The two directions of largest variance of normalised embeddings [n, 2], signs fixed.

    Args:
        u: embeddings.
    """
    u = F.normalize(u.detach().float(), dim=-1)
    u = u - u.mean(0)
    _, _, v = torch.linalg.svd(u, full_matrices=False)
    v = v[:2] * v[:2].gather(1, v[:2].abs().argmax(1, keepdim=True)).sign()
    return (u @ v.T).cpu().numpy()


def letter_table(mask: Bool[Tensor, "n experts"], questions: Sequence[str], experts: Sequence[str]) -> pd.DataFrame:
    """How often each expert is asked for, by question.

    Args:
        mask: experts of each picture and question.
        questions: of the rows.
        experts: names.
    """
    return (
        pd.DataFrame(mask.double().cpu().numpy(), columns=list(experts))
        .groupby(np.asarray(questions), sort=False)
        .mean()
    )
