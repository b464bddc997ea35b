"""Composition of Experts: many whole models served as one; a prompt's category, not the prompt, chooses the model.

    m = argmax P(m | x)            category router: a classifier, trained apart from the experts' scores
    k = map(m)                     table from `compose`: the hosted experts under a parameter budget, exactly
    y = E_k(x)                     one expert answers; H(P) > threshold sends the prompt to the general expert

To learn directly which expert is best for a prompt is harder: that label jumps between neighbouring prompts, the
category does not. A new expert or category is one more column or row of scores and another `compose`.

Limits. As good as the categories are: two kinds of prompts in one category share an expert. Entropy is in nats.

Source: Jain et al. 2024, sections 3 and 4; no official code was found. Of the text embedder in front of the router the
kit makes no difference: `category_router` is any module that gives category logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.mixtures.expert_budget import Composition, compose


@dataclass(frozen=True)
class PromptRoute:
    """Where prompts went: probabilities of the categories, the likeliest, who was unsure, the expert."""

    probs: Float[Tensor, "prompts categories"]
    categories: Int[Tensor, " prompts"]
    uncertain: Bool[Tensor, " prompts"]
    experts: Int[Tensor, " prompts"]


@method(family="mixtures", paper="coe")
class CompositionOfExperts(nn.Module):
    """Whole models behind a category router and a table made under a budget.

    Args:
        experts: modules with outputs of one shape; kept as they are.
        category_router: module from prompts to category logits.
        scores: s, of each expert on each category, higher is better.
        sizes: b, of each expert; None counts its parameters.
        traffic: n, weight of each category; None weighs all alike.
        general: expert of uncertain prompts; None takes the best on average that fits the budget.
        budget: B, most that the hosted experts may have together, in the unit of `sizes`; None hosts what helps.
        threshold: entropy in nats above which a prompt goes to the general expert, ln M is never; None is without.

    Raises:
        ValueError: a budget too small, or sizes, scores and experts that do not fit.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        category_router: nn.Module,
        scores: Float[Tensor, "categories experts"],
        *,
        sizes: Sequence[float] | None = None,
        traffic: Sequence[float] | None = None,
        general: int | None = None,
        budget: Annotated[float | None, Range(0, 1e15)] = None,
        threshold: Annotated[float | None, Range(0, 20)] = None,
    ):
        super().__init__()
        if len(experts) != scores.shape[1]:
            raise ValueError(
                f"scores has {scores.shape[1]} columns, there are {len(experts)} experts (CompositionOfExperts)"
            )
        self.experts, self.category_router = nn.ModuleList(experts), category_router
        counted = [sum(p.numel() for p in expert.parameters()) for expert in experts]
        self.sizes = [float(size) for size in (counted if sizes is None else sizes)]
        self.scores, self.traffic, self.threshold = scores.detach().clone().cpu(), traffic, threshold
        self._asked = general
        self.general: int | None = None
        self.composition = self.recompose(budget)

    def recompose(self, budget: float | None = None) -> Composition:
        """Solve for another budget; no weight changes.

        Args:
            budget: B; None is the size of all experts.
        """
        budget = sum(self.sizes) if budget is None else budget
        general = self._asked
        if general is None and self.threshold is not None:
            weights = torch.ones(len(self.scores)) if self.traffic is None else torch.as_tensor(self.traffic)
            mean = weights.double() @ self.scores.double()
            fits = torch.tensor(self.sizes, dtype=torch.float64) <= budget
            general = int(mean.where(fits, -torch.inf).argmax()) if fits.any() else None
        host = [] if self.threshold is None or general is None else [general]
        found = compose(self.scores, self.sizes, budget, traffic=self.traffic, host=host)
        self.composition, self.general = found, general
        return found

    @torch.no_grad()
    def route(self, x: Tensor) -> PromptRoute:
        """Choose an expert for each prompt.

        Args:
            x: prompts, as `category_router` takes them; the first axis counts them.

        Raises:
            ValueError: logits of another number of categories, or that are no numbers.
        """
        logits = self.category_router(x).float()
        if logits.shape[-1] != len(self.scores):
            raise ValueError(f"the router knows {logits.shape[-1]} categories, scores {len(self.scores)} (PromptRoute)")
        if logits.isnan().any():
            raise ValueError("the category router gave NaN logits (CompositionOfExperts)")
        probs = logits.softmax(-1)
        categories = probs.argmax(-1) if probs.numel() else probs.new_zeros(0, dtype=torch.int64)
        experts = self.composition.mapping.to(categories.device)[categories]
        uncertain = torch.zeros_like(categories, dtype=torch.bool)
        if self.threshold is not None:
            uncertain = entropy(probs) > self.threshold
            experts = experts.where(~uncertain, self.general)
        return PromptRoute(probs, categories, uncertain, experts)

    def forward(self, x: Tensor) -> Tensor:
        """Answer each prompt by its one expert.

        Args:
            x: prompts.
        """
        experts = self.route(x).experts
        if not len(x):
            return self.experts[self.composition.hosted[0]](x)
        rows = [(experts == k).nonzero().squeeze(1) for k in self.composition.hosted]
        asked = [(k, chosen) for k, chosen in zip(self.composition.hosted, rows, strict=True) if len(chosen)]
        answers = torch.cat([self.experts[k](x[chosen]) for k, chosen in asked])
        return answers[torch.cat([chosen for _, chosen in asked]).argsort()]

    def active_size(self, x: Tensor) -> float:
        """The mean size of the experts that answer these prompts."""
        return torch.tensor(self.sizes, dtype=torch.float64)[self.route(x).experts.cpu()].mean().item()


def entropy(probs: Float[Tensor, "prompts categories"]) -> Float[Tensor, " prompts"]:
    """Entropy in nats, at most ln M even after rounding.

    Args:
        probs: rows that sum to one.
    """
    return torch.special.entr(probs).sum(-1).clamp(0, float(torch.tensor(float(probs.shape[-1])).log()))
