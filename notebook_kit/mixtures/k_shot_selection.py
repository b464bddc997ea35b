"""What K examples of a task can tell: which LoRAs to take, and how to keep them different.

1. score   acc_m: share of right answers;  ppl_m = mean_k exp( -1/|y_k| Σ_j log P_m(y_kj | ...) ) over answer tokens
2. group   the n that minimise  Σ_{pairs} Σ_{tensors} |cos(vec A_a, vec A_b)|, A and B each a tensor of its own

An expert that guesses letters has a fair accuracy and a bad perplexity of the reasoning: so both count. A negated copy
of an expert is still its copy: so |cos|.

Source: Yang et al. 2024, sections 3.2 and 3.3, and the official scripts compute_ppl and group_diversity. How accuracy
and perplexity are combined is not in the code: here by ranks, with a weight. The scripts' perplexity ends in an
undefined name. For the open data see `k_shot_data`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from notebook_kit.adapters import adapter_on
from notebook_kit.adapters.read import Source
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures.adapter_bank import read_bank

EXHAUSTIVE = 100_000  # groups that are tried one by one; above, the group grows greedily


def answer_perplexity(
    logits: Float[Tensor, "shots length vocab"],
    targets: Int[Tensor, "shots length"],
    mask: Bool[Tensor, "shots length"],
) -> Float[Tensor, " shots"]:
    """Return each shot's perplexity over the tokens of its answer.

    Args:
        logits: at each position, of the token that `targets` has there.
        targets: the true tokens.
        mask: True for the answer's tokens, its end token included; the prompt's do not count.

    Raises:
        ValueError: a shot has no answer token.
    """
    counts = mask.sum(1)
    if not bool((counts > 0).all()):
        raise ValueError(f"shot {int((counts == 0).nonzero()[0])} has no answer token: mask must be True somewhere")
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets.where(mask, 0), reduction="none")
    return (losses.where(mask, 0).sum(1) / counts).exp()


@torch.no_grad()
def score_adapters(
    model: nn.Module, experts: Sequence[Source], measure: Callable[[Callable], tuple[float, float]]
) -> tuple[Float[Tensor, " experts"], Float[Tensor, " experts"]]:
    """Measure every LoRA of a bank on the shots.

    Args:
        model: that they were trained on; unchanged.
        experts: what `read_adapter` reads.
        measure: (the model with one expert in it, called like the model) -> accuracy, perplexity.

    Returns:
        Accuracies and perplexities.
    """
    base, rows = model.state_dict(), []
    for expert in read_bank(experts):
        weights = adapter_on(base, expert)
        rows.append(measure(lambda *inputs, w=weights, **named: functional_call(model, w, inputs, named)))
    accuracy, perplexity = torch.tensor(rows, dtype=torch.float32).T
    return accuracy, perplexity


def shortlist(
    accuracy: Float[Tensor, " experts"],
    perplexity: Float[Tensor, " experts"],
    *,
    size: Annotated[int, Range(1, 1000)] = 8,
    weight: Annotated[float, Range(0, 1)] = 0.5,
) -> list[int]:
    """Take the experts of the best rank in accuracy and perplexity, best first.

    Args:
        accuracy: higher is better.
        perplexity: lower is better.
        size: how many; at most all.
        weight: of accuracy's rank; the rest is perplexity's.

    Returns:
        Indices; of equals the one of lower perplexity first, then the lower index.

    Raises:
        ValueError: an expert whose figures are no numbers.
    """
    broken = torch.isnan(accuracy) | torch.isnan(perplexity)
    if broken.any():
        raise ValueError(
            f"expert {int(broken.nonzero()[0])} has accuracy or perplexity NaN: it gives no numbers on the shots; "
            "leave it out of the bank (shortlist)"
        )
    better = (accuracy[None] > accuracy[:, None]).sum(1), (perplexity[None] < perplexity[:, None]).sum(1)
    ranks = weight * better[0] + (1 - weight) * better[1]
    keys = zip(ranks.tolist(), perplexity.tolist(), range(len(ranks)), strict=True)
    return [index for *_, index in sorted(keys)][:size]


def adapter_similarity(experts: Sequence[Source]) -> Float[Tensor, "experts experts"]:
    """Sum |cos| between two LoRAs' tensors, over A and B of all layers; the diagonal counts the tensors.

    Args:
        experts: what `read_adapter` reads, of equal ranks in a layer.

    Raises:
        ValueError: two ranks in one layer: such factors have no cosine.
    """
    bank = read_bank(experts)
    total = 0
    for name in sorted({name for expert in bank for name in expert.factors}):
        for side in (0, 1):
            parts = [expert.factors[name][side] if name in expert.factors else None for expert in bank]
            like = next(part for part in parts if part is not None)
            if any(part is not None and part.shape != like.shape for part in parts):
                raise ValueError(f"{name}: experts of different ranks or sizes cannot be compared factor by factor")
            rows = torch.stack([torch.zeros_like(like) if part is None else part.to(like) for part in parts])
            rows = F.normalize(rows.flatten(1).float(), dim=1)
            total = total + (rows @ rows.T).abs()
    return total


def diverse_group(
    similarity: Float[Tensor, "experts experts"],
    candidates: Sequence[int],
    *,
    n_experts: Annotated[int, Range(1, 64)] = 4,
    diversity: Annotated[str, Choice("most", "none", "least")] = "most",
) -> list[int]:
    """Choose the n candidates that resemble each other least.

    Args:
        similarity: from `adapter_similarity`.
        candidates: indices, best first.
        n_experts: n; at most all candidates.
        diversity: "most" minimises the sum over pairs, "least" maximises it, "none" takes the first n.

    Returns:
        Indices in the order of the candidates. Every group is tried up to 100,000 groups; of equals the one whose
        candidates come first. Above, the group grows from the best pair, one at a time.
    """
    n = min(n_experts, len(candidates))
    if diversity == "none" or n <= 1 or n == len(candidates):
        return list(candidates)[:n]
    index = torch.as_tensor(list(candidates), device=similarity.device)
    pairs = similarity[index][:, index].double() * (1 if diversity == "most" else -1)
    pairs = pairs - torch.diag(pairs.diagonal())
    if math.comb(len(index), n) <= EXHAUSTIVE:
        groups = torch.combinations(torch.arange(len(index), device=similarity.device), n)
        sums = sum(pairs[groups[:, i], groups[:, j]] for i in range(n) for j in range(i + 1, n))
        best = groups[int((sums <= sums.min() + 1e-12).nonzero()[0])].tolist()
    else:
        cost = pairs.clone().fill_diagonal_(torch.inf)
        best = [*divmod(int(cost.argmin()), len(index))]
        while len(best) < n:
            added = pairs[best].sum(0)
            added[best] = torch.inf
            best.append(int(added.argmin()))
    return [int(index[i]) for i in sorted(best)]
