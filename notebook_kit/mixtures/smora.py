"""SMoRA: every single rank of one wide LoRA is an expert, and each token switches on k of them.

    s = softmax(x W_rᵀ)   [T, R]          S_t = the k largest of s_t + b          b: a bias that evens the load
    y_t = W x_t + (alpha / k) B (G(x_t) ⊙ A x_t)          A [R, d_in], B [d_out, R]
    G_i = k s_i / Σ_S s  for i in S_t ("renormalised"),  or s_i ("raw"),  and 0 elsewhere

A mixture of N LoRAs of rank q is one LoRA of rank N q with gates that are constant over blocks of q. `granularity` is
this q, at the same number of ranks and of active ranks: q = rank is a plain LoRA, q = 1 SMoRA. With 8 of 64 ranks
active a token chooses among C(64, 8) = 4,426,165,368 changes of W, with blocks of 8 among 8.

b is moved after each training batch against the load, b_i <- b_i + bias_rate sign(mean(c) - c_i), and never counts in
the weights: the router is the kit's `LossFreeBias`.

Limits. No official code was found; the form of G is ours. Raw softmax gates over R ranks are about 1 / R and shrink
the change; renormalised ones have mean 1, so an even router is an ordinary LoRA of the k picked ranks. With one block
active a renormalised gate would be the constant 1 and its router would learn nothing: refused, use gate="raw".

Paper: Zhao et al. 2025, section 3 (scores, bias); bias rate after Wang et al. 2024.
"""

from functools import partial
from typing import Annotated

from torch import nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures.lora_experts import LoRAExperts
from notebook_kit.routers import LossFreeBias


@method(family="mixtures", paper="smora")
class SMoRA(LoRAExperts):
    """One wide LoRA whose ranks, or blocks of ranks, are switched for each token by a router.

    Args:
        host: nn.Linear or transformers' Conv1D.
        rank: R, of the wide LoRA.
        k: active ranks a token.
        granularity: q, ranks in a block; divides rank and k.
        scores: softmax over the blocks, or a sigmoid for each.
        gate: "renormalised": the active gates have mean 1; "raw": the scores themselves.
        alpha: strength; the scale is alpha / k. None is k: a scale of 1.
        dropout: share of the entries of x that the ranks do not see in training.
        bias_rate: step of the bias that evens the load; for runs of some hundred steps 0.01 does better.
        dispatch: how it is computed; the result is the same.

    Raises:
        ValueError: k above rank, a granularity that does not divide both, a renormalised gate on one of several
            blocks, or blocks larger than min(d_in, d_out).

    Source: Zhao et al. 2025, section 3.
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        rank: Annotated[int, Range(1, 1024, log=True)] = 64,
        k: Annotated[int, Range(1, 1024, log=True)] = 8,
        granularity: Annotated[int, Range(1, 1024, log=True)] = 1,
        scores: Annotated[str, Choice("softmax", "sigmoid")] = "softmax",
        gate: Annotated[str, Choice("renormalised", "raw")] = "renormalised",
        alpha: Annotated[float | None, Range(0.125, 4096, log=True)] = None,
        dropout: Annotated[float, Range(0, 0.9)] = 0.0,
        bias_rate: Annotated[float, Range(0, 1)] = 1e-3,
        dispatch: Annotated[str, Choice("auto", "masked", "sorted", "gathered")] = "auto",
    ):
        if k > rank or rank % granularity or k % granularity:
            raise ValueError(
                f"k={k} must be at most rank={rank}, and granularity={granularity} must divide both (SMoRA)"
            )
        blocks, active = rank // granularity, k // granularity
        renormalised = gate == "renormalised"
        if renormalised and active == 1 < blocks:
            raise ValueError(
                f"one block of {blocks} is active: a renormalised gate is the constant 1, and the router gets no "
                "gradient from the task; use gate='raw', or a smaller granularity (SMoRA)"
            )
        rules = {"k": active, "scores": scores, "normalize": renormalised, "bias_rate": bias_rate}
        rules |= {"routed_scaling_factor": float(active) if renormalised else 1.0}
        parts = {"n_experts": blocks, "rank": granularity, "scaling": 1.0 if alpha is None else alpha / k}
        router = partial(LossFreeBias, n_experts=blocks, **rules)
        super().__init__(host, router=router, dropout=dropout, dispatch=dispatch, **parts)
        self.k, self.gate, self.scores = k, gate, scores

    @property
    def constant(self) -> bool:
        """Whether the weight of a single block is 1 for every token; a raw sigmoid is not."""
        return self.gate == "renormalised" or self.scores == "softmax"
