"""Top-k: each token takes the k experts of highest probability, with the rules of Mixtral, Switch or GShard.

    p = softmax(x Wᵀ)   [T, N], float32         S_t = the k largest of p_t         y_t = Σ_{i in S_t} w_ti E_i(x_t)

| convention | weights w               | when an expert is full            | balance loss counts | papers use         |
|------------|-------------------------|-----------------------------------|---------------------|--------------------|
| mixtral    | p_i / Σ_S p             | the claim is lost                 | all k picks         | k 2, no capacity   |
| switch     | p_i                     | the claim is lost                 | the first pick      | k 1, capacity 1.25 |
| gshard     | p_i / Σ of the served p | the other expert takes its weight | the first pick      | k 2, capacity 1    |

Capacity: an expert has C = ceil(k T/N * capacity_factor) slots for the T tokens of the call; all first choices queue
before any second choice. A claim that finds no slot has weight 0 and expert -1. A token without any expert gets 0
from the layer, so only the residual connection carries it (some older codes pass it through unchanged instead).

Limits. With k = 1 a divided weight is the constant 1, and the router gets no gradient from the task: refused.
Under a capacity a token's second choice can depend on later tokens, whose first choices queue before it; with
priority "batch", which is made for images, its first can as well, so that is refused in a causal model.

Sources: Fedus et al. 2021, section 2; Lepikhin et al. 2020, algorithm 1; Jiang et al. 2024, section 2.1; batch
priority: Riquelme et al. 2021, section 4. transformers' Switch counts capacity for each sequence apart and its
Mixtral block jitters the experts' input too; fairseq's GShard gate samples second experts in evaluation as well.
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routers._claims import capacity, top_k, within_capacity
from notebook_kit.routers.losses import load_balancing_loss, log_normalizer, z_loss
from notebook_kit.routers.router import Router
from notebook_kit.routing import Routing


@method(family="routers", paper=("switch", "gshard", "mixtral", "v-moe"))
class TopK(Router):
    """Each token takes its k most probable experts; `convention` says how their outputs are weighed.

    Args:
        d_model: width of the tokens.
        n_experts: N.
        k: experts a token; 1 for Switch.
        convention: whose rules for weights and loss: "mixtral", "switch" or "gshard".
        normalize: divide the picked probabilities by their sum; None is the convention's (all but Switch do).
        capacity_factor: an expert's slots relative to an even share; None is no limit.
        eval_capacity_factor: the same in evaluation; None is as in training. Switch 1.25 and 2.
        priority: who queues first: "token" in token order, "batch" by falling probability of the first choice.
        second_policy: choices after the first, in training: "all" plain, "sampling" drawn by adding Gumbel noise,
            "random" kept with probability min(1, 2 w). Evaluation is always plain.
        jitter: in training the router sees x times a uniform number in [1 - jitter, 1 + jitter]; Switch used 0.01.
        balance_coef: times the balance loss; Switch and GShard 0.01, Mixtral's configuration 0.001.
        z_coef: times the z-loss; ST-MoE 0.001.

    Raises:
        ValueError: k > n_experts, "switch" with k > 1, or weights that would be the constant 1.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        k: Annotated[int, Range(1, 512)] = 2,
        convention: Annotated[str, Choice("mixtral", "switch", "gshard")] = "mixtral",
        normalize: Annotated[bool | None, Choice(True, False)] = None,
        capacity_factor: Annotated[float | None, Range(0.05, 16, log=True)] = None,
        eval_capacity_factor: Annotated[float | None, Range(0.05, 16, log=True)] = None,
        priority: Annotated[str, Choice("token", "batch")] = "token",
        second_policy: Annotated[str, Choice("all", "sampling", "random")] = "all",
        jitter: Annotated[float, Range(0, 0.5)] = 0.0,
        balance_coef: Annotated[float, Range(0, 1)] = 0.01,
        z_coef: Annotated[float, Range(0, 0.1)] = 0.0,
    ):
        super().__init__(d_model, n_experts)
        self.check_k(k)
        if convention == "switch" and k > 1:
            raise ValueError(
                f"Switch routes to k=1 expert, got k={k}; for raw weights of more experts: normalize=False"
            )
        self.normalize = convention != "switch" if normalize is None else normalize
        if self.normalize and k == 1 and n_experts > 1:
            raise ValueError(
                "normalize with k=1 makes every weight the constant 1, so the router gets no gradient from the task; "
                "use normalize=False (or convention='switch'), or k of at least 2 (TopK)"
            )
        limited = capacity_factor is not None or eval_capacity_factor is not None
        self.causal = not (limited and priority == "batch")
        self.k, self.convention, self.priority = k, convention, priority
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.second_policy, self.jitter, self.balance_coef, self.z_coef = second_policy, jitter, balance_coef, z_coef

    def logits(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens experts"]:
        """Score every expert for every token; with jitter in training."""
        if self.training and self.jitter > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        return super().logits(x)

    def route(self, logits: Float[Tensor, "tokens experts"], *, mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Decide from the logits.

        Args:
            logits: z.
            mask: True for real tokens.
        """
        self.check_logits(logits, mask)
        z = logits.float()
        p = z.softmax(1)
        picks = self._pick(z)
        weights = p.gather(1, picks)
        if self.normalize:
            weights = weights / weights.sum(1, keepdim=True)
        claimed = self._claim(picks, weights, mask)
        experts = claimed
        factor = self.capacity_factor
        if not self.training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        if factor is not None:
            n_tokens = len(z) if mask is None else int(mask.sum())
            slots = capacity(n_tokens, self.n_experts, self.k, factor)
            first = p.gather(1, picks[:, :1])[:, 0] if self.priority == "batch" else None
            served = within_capacity(claimed, self.n_experts, slots, first)
            experts = claimed.where(served, -1)
        if experts is not picks:
            weights = weights * (experts >= 0)
            if self.normalize and self.convention == "gshard":
                weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return Routing(logits, p, weights, experts, self._loss(z, p, picks, mask), claimed)

    def _pick(self, z: Float[Tensor, "tokens experts"]) -> Int[Tensor, "tokens k"]:
        if not (self.training and self.second_policy == "sampling") or self.k == 1:
            return top_k(z.detach(), self.k)
        # Gumbel: the largest of z + noise is a draw from softmax(z); the first choice stays the plain one.
        first = top_k(z.detach(), 1)
        noisy = z.detach() - torch.empty_like(z).exponential_().log()
        return torch.cat([first, top_k(noisy.scatter(1, first, -torch.inf), self.k - 1)], 1)

    def _claim(self, picks: Tensor, weights: Tensor, mask: Tensor | None) -> Int[Tensor, "tokens k"]:
        if self.training and self.second_policy == "random" and self.k > 1:
            # Always true for the first choice: it is not asked.
            asked = torch.rand_like(weights) < 2 * weights
            asked[:, 0] = True
            picks = picks.where(asked, -1)
        return picks if mask is None else picks.where(mask[:, None], -1)

    def _loss(self, z: Tensor, p: Tensor, picks: Tensor, mask: Tensor | None) -> Float[Tensor, ""]:
        loss = z.new_zeros(())
        if self.balance_coef:
            counted = picks if self.convention == "mixtral" else picks[:, :1]
            loss = loss + self.balance_coef * load_balancing_loss(p, counted, mask=mask)
        if self.z_coef:
            loss = loss + self.z_coef * z_loss(z, mask=mask, normalizer=log_normalizer(z, p, picks))
        return loss

    def extra_repr(self) -> str:
        limit = "" if self.capacity_factor is None else f", capacity_factor={self.capacity_factor:g}"
        return f"{super().extra_repr()}, k={self.k}, convention={self.convention!r}{limit}"
