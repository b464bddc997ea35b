"""How much a router's choice tells about the language: mutual information beside the level chance alone reaches.

    I(L; E) = sum over l, e of p(l, e) log2( p(l, e) / (p(l) p(e)) )      in bits, at most log2(experts)

p is the count over held-out tokens, E a token's first expert, L its window's language. Counts of a finite sample are
never exactly independent, so I > 0 by chance: labels are shuffled to see how far. Tokens of one window share their
label and resemble each other, so whole windows are shuffled; shuffling tokens would make chance look too small.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@torch.no_grad()
def first_experts(model: nn.Module, ids: Int[Tensor, "n length"]) -> Int[Tensor, "layers n length"]:
    """Return the expert with the largest router logit, for each layer and token.

    Args:
        model: a transformers mixture of experts with `output_router_logits`.
        ids: byte ids, 0 to 255.

    Returns:
        Expert indices.
    """
    logits = model(input_ids=ids, output_router_logits=True).router_logits
    return torch.stack([layer.argmax(-1).reshape(ids.shape) for layer in logits])


@torch.no_grad()
def expert_load(model: nn.Module, ids: Int[Tensor, "n length"], k: int) -> Float[Tensor, "layers experts"]:
    """Return each expert's share of the k choices of all tokens; a row sums to 1.

    Args:
        model: a transformers mixture of experts with `output_router_logits`.
        ids: byte ids, 0 to 255.
        k: experts per token.

    Returns:
        Shares, 1 / experts each if the load is even.
    """
    logits = torch.stack(model(input_ids=ids, output_router_logits=True).router_logits)
    chosen = torch.zeros_like(logits).scatter_(-1, logits.topk(k, dim=-1).indices, 1.0)
    return chosen.mean(1) / k


def mutual_information(labels: Int[Tensor, " n"], choices: Int[Tensor, " n"]) -> float:
    """Return the mutual information of two labelings of the same things.

    Args:
        labels: from 0.
        choices: from 0.

    Returns:
        Bits, from 0 to the log2 of the smaller number of values.
    """
    n_labels, n_choices = int(labels.max()) + 1, int(choices.max()) + 1
    counts = torch.bincount(labels * n_choices + choices, minlength=n_labels * n_choices)
    return float(_information(counts.double().reshape(n_labels, n_choices)))


def _information(counts: Float[Tensor, "... labels choices"]) -> Float[Tensor, "..."]:
    joint = counts / counts.sum((-2, -1), keepdim=True)
    independent = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    return torch.where(joint > 0, joint * (joint / independent).log2(), 0.0).sum((-2, -1))


def window_information(
    labels: Int[Tensor, " n"], experts: Int[Tensor, "n length"], *, n_shuffles: int = 200, seed: int = 0
) -> dict[str, float]:
    """Compare the mutual information of language and expert with that of shuffled windows.

    Args:
        labels: the language of each window, from 0.
        experts: the first expert of each token of each window.
        n_shuffles: random orders of the windows' labels, >= 1.
        seed: of the shuffles.

    Returns:
        Bits: "bits" as measured, "chance_mean" and "chance_99" (99th percentile) over the shuffles.
    """
    n_experts, n_labels = int(experts.max()) + 1, int(labels.max()) + 1
    counts = torch.nn.functional.one_hot(experts, n_experts).sum(1).double()  # [n, experts]
    generator = torch.Generator().manual_seed(seed)
    orders = [labels] + [labels[torch.randperm(len(labels), generator=generator)] for _ in range(n_shuffles)]
    members = torch.nn.functional.one_hot(torch.stack(orders), n_labels).double()  # [1 + shuffles, n, labels]
    bits = _information(members.transpose(1, 2) @ counts)
    chance = bits[1:]
    return {"bits": bits[0].item(), "chance_mean": chance.mean().item(), "chance_99": chance.quantile(0.99).item()}
