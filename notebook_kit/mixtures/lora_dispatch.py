"""Three ways to compute a mixture of LoRA experts, with the same result.

    Δy_t = Σ_{i in S_t} w_ti B_i A_i x_t          A [N, r, d_in], B [N, d_out, r], tokens x [T, d_in]

- masked: one wide LoRA with a gate in its middle, Δy = B diag(g(x) ⊗ 1_r) A x. Two products, whatever the experts do;
  it computes all N r ranks.
- sorted: the claims (token, slot) in order of their expert, so that each expert computes its own tokens only.
- gathered: each token takes the factors of its picks along, [T, k, r, d_in + d_out] numbers of memory.

That the first is the second is the observation behind SMoRA (Zhao et al. 2025): a mixture of N LoRAs of rank r is one
LoRA of rank N r whose ranks are switched in blocks. `stack_experts` and `split_experts` go from one to the other.
Counting products, "sorted" is the cheapest, N / k times less than "masked". On a clock, one large product beats many
small ones and their copies until N r is some hundreds (of 2048 tokens of width 512 with 8 experts of rank 8, k = 2:
2 ms masked, 6 sorted, 144 gathered; with 64 such experts of width 1024: 28, 13 and 288). "auto" chooses so.

The official MeteoRA calls the third "bmm", and its plain loop over experts does the work of the second.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from notebook_kit.mixtures.swiglu import _each

Rows = Float[Tensor, "tokens d_in"]
Downs = Float[Tensor, "experts rank d_in"]
Ups = Float[Tensor, "experts d_out rank"]


def masked(
    x: Rows, A: Downs, B: Ups, weights: Float[Tensor, "tokens k"], experts: Int[Tensor, "tokens k"]
) -> Float[Tensor, "tokens d_out"]:
    """Compute every rank for every token, and weigh the ranks of experts that were not picked by 0."""
    n_experts, rank, _ = A.shape
    gates = weights.new_zeros(len(x), n_experts).scatter_add(1, experts.clamp_min(0), weights)  # unused slots weigh 0
    wide_A, wide_B = stack_experts(A, B)
    hidden = F.linear(x, wide_A).unflatten(1, (n_experts, rank)) * gates[:, :, None].to(x.dtype)
    return F.linear(hidden.flatten(1), wide_B)


def by_expert(
    x: Rows, A: Downs, B: Ups, weights: Float[Tensor, "tokens k"], experts: Int[Tensor, "tokens k"]
) -> Float[Tensor, "tokens d_out"]:
    """Sort the claims by expert, compute each expert's tokens, and sum them back."""
    slots, claims = experts.shape[1], experts.reshape(-1)
    order, claim = claims.sort(stable=True)
    unused, *counts = torch.bincount(order + 1, minlength=len(A) + 1).tolist()
    if unused == len(claim):
        return x.new_zeros(len(x), B.shape[1]) + 0 * x.sum()
    claim = claim[unused:]
    token = claim // slots
    hidden = _each(x[token], A, counts) * weights.reshape(-1)[claim, None].to(x.dtype)
    answers = _each(hidden, B, counts)
    return x.new_zeros(len(x), B.shape[1]).index_add(0, token, answers)


def gathered(
    x: Rows, A: Downs, B: Ups, weights: Float[Tensor, "tokens k"], experts: Int[Tensor, "tokens k"]
) -> Float[Tensor, "tokens d_out"]:
    """Copy the factors of each token's picks, then two batched products."""
    picks = experts.clamp_min(0)
    down = A[picks].flatten(1, 2)  # [T, k r, d_in]
    hidden = torch.bmm(down, x[:, :, None])[:, :, 0].unflatten(1, (-1, A.shape[1])) * weights[:, :, None].to(x.dtype)
    up = B[picks].transpose(1, 2).flatten(2, 3)  # [T, d_out, k r]
    return torch.bmm(up, hidden.flatten(1)[:, :, None])[:, :, 0]


def auto(
    x: Rows, A: Downs, B: Ups, weights: Float[Tensor, "tokens k"], experts: Int[Tensor, "tokens k"]
) -> Float[Tensor, "tokens d_out"]:
    """Sort where many ranks stay idle, mask otherwise."""
    n_experts, rank, _ = A.shape
    many = n_experts * rank >= 256 and n_experts >= 8 * experts.shape[1] and rank >= 4
    return (by_expert if many else masked)(x, A, B, weights, experts)


DISPATCH = {"auto": auto, "masked": masked, "sorted": by_expert, "gathered": gathered}


def stack_experts(A: Downs, B: Ups) -> tuple[Float[Tensor, "wide d_in"], Float[Tensor, "d_out wide"]]:
    """Write N LoRA experts of rank r as the factors of one LoRA of rank N r.

    Args:
        A: rows of all experts.
        B: columns of all experts.

    Returns:
        A stacked and B side by side: Σ g_i B_i A_i = B diag(g ⊗ 1_r) A.
    """
    return A.flatten(0, 1), B.transpose(0, 1).flatten(1)


def split_experts(A: Float[Tensor, "wide d_in"], B: Float[Tensor, "d_out wide"], n_experts: int) -> tuple[Downs, Ups]:
    """Cut one LoRA into n_experts blocks of equally many ranks; the way back from `stack_experts`.

    Args:
        A: of the wide LoRA.
        B: of the wide LoRA.
        n_experts: blocks; n_experts = rank makes each rank an expert.

    Raises:
        ValueError: n_experts does not divide the rank.
    """
    if n_experts < 1 or len(A) % n_experts:
        raise ValueError(f"n_experts must divide the rank {len(A)}, got {n_experts} (split_experts)")
    return A.unflatten(0, (n_experts, -1)), B.unflatten(1, (n_experts, -1)).transpose(0, 1)
