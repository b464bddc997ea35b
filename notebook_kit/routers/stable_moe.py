"""StableMoE: learn to route, distil what was learned into a router of token ids, and then never change a route again.

Stage 1 (about the first tenth of training)          a = x Wᵀ, e(t) = argmax_i a_ti, w_t = σ(a_{t,e(t)})
    balance = 1/T Σ_t (n_{e(t)} - n̄)/n̄ σ(a_{t,e(t)})       n_i tokens of expert i, n̄ = T/N
    distil  = 1/T Σ_t cross entropy(C v_{id(t)}, e(t))      own embedding v [ids, 50], centroids C [N, 50]
    loss    = balance_coef balance + distill_coef distil
Stage 2, and evaluation always                       e(t) = argmax C v_{id(t)}, w_t = σ(a_{t,e(t)}), no losses

The balance loss lowers the scores of over-full experts and raises those of thin ones. In stage 2 the route of an id is
constant: an argmax has no gradient, so v and C stand still while W still learns how much each answer counts.

A full expert (capacity_factor) drops its last claims; with `MoE(..., residual=True)` they pass unchanged, and
y = σ(a) E(x) + (1 - σ(a)) x. With residual experts E = x + F that is x + MoE(F): see `BalancedAssignment`.

Official code sums both losses over tokens, as it does the task's; here they are means, as tasks' losses are in this
kit: the same balance between them. Its other distilled routers (bigrams, a convolution, a transformer) are not here.

Source: Dai et al. 2022, sections 3.1 to 3.3, equations 1 to 9; Hunter-DDM/stablemoe `fairseq/modules/moe_layer.py`.
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.routers._claims import capacity, top_k, within_capacity
from notebook_kit.routers.router import Router
from notebook_kit.routing import Routing


@method(family="routers", paper="stable-moe")
class StableMoE(Router):
    """Each token goes to one expert: in stage 1 by its hidden state, from stage 2 on by its id alone.

    Args:
        d_model: width of the tokens.
        n_experts: N.
        vocab_size: number of ids.
        distill_dim: width of the distilled router's embedding.
        distill_steps: training calls after which stage 2 begins by itself (the paper: 10 % of all);
            None: when `begin_stage_2()` is called.
        balance_coef: times the balance loss of stage 1.
        distill_coef: times the distillation loss of stage 1.
        capacity_factor: an expert's slots relative to an even share; n_experts is no limit.
    """

    needs_tokens = True

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        vocab_size: Annotated[int, Range(1, 10_000_000)] = 256,
        distill_dim: Annotated[int, Range(1, 4096)] = 50,
        distill_steps: Annotated[int | None, Range(1, 100_000_000)] = None,
        balance_coef: Annotated[float, Range(0, 10)] = 0.3,
        distill_coef: Annotated[float, Range(0, 10)] = 0.3,
        capacity_factor: Annotated[float, Range(0.05, 512, log=True)] = 2.0,
    ):
        super().__init__(d_model, n_experts)
        nn.init.orthogonal_(self.weight, gain=0.1)
        self.embedding = nn.Embedding(vocab_size, distill_dim)  # v
        self.centroids = nn.Parameter(nn.init.orthogonal_(torch.empty(n_experts, distill_dim), gain=0.1))  # C
        self.k, self.distill_steps, self.capacity_factor = 1, distill_steps, capacity_factor
        self.balance_coef, self.distill_coef = balance_coef, distill_coef
        self.register_buffer("stage", torch.tensor(1))
        self.register_buffer("calls", torch.tensor(0))

    def begin_stage_2(self) -> None:
        """From now on route by token ids, in training too."""
        self.stage.fill_(2)

    def distilled(self, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens experts"]:
        """Score every expert for token ids: C v_id."""
        return F.linear(self.embedding(ids), self.centroids)

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        *,
        mask: Bool[Tensor, " tokens"] | None = None,
        tokens: Int[Tensor, "*batch"] | None = None,
    ) -> Routing:
        """Route tokens; in training it counts calls, for `distill_steps`."""
        routing = self.route(self.logits(x), mask=mask, tokens=tokens)
        if self.training:
            self.calls += 1
            if self.distill_steps is not None and self.calls >= self.distill_steps:
                self.begin_stage_2()
        return routing

    def route(
        self,
        logits: Float[Tensor, "tokens experts"],
        *,
        mask: Bool[Tensor, " tokens"] | None = None,
        tokens: Int[Tensor, "*batch"] | None = None,
    ) -> Routing:
        """Decide from the logits in stage 1 of training, else from the ids.

        Args:
            logits: a = x Wᵀ.
            mask: True for real tokens.
            tokens: ids, [tokens] or [sequences, length].
        """
        self.check_logits(logits, mask)
        ids = self.check_tokens(tokens, len(logits), self.embedding.num_embeddings, mask)
        a = logits.float()
        learning = self.training and int(self.stage) == 1
        chosen = top_k(a.detach(), 1) if learning else self._table(ids)
        claimed = chosen if mask is None else chosen.where(mask[:, None], -1)
        n_tokens = len(a) if mask is None else int(mask.sum())
        slots = capacity(n_tokens, self.n_experts, 1, self.capacity_factor)
        experts = claimed.where(within_capacity(claimed, self.n_experts, slots), -1)
        scores = a.sigmoid()
        asked = scores.gather(1, chosen)
        loss = self._loss(asked, ids, chosen, claimed, max(n_tokens, 1)) if learning else a.new_zeros(())
        return Routing(logits, scores, asked * (experts >= 0), experts, loss, claimed)

    def _distilled_rows(self, ids: Int[Tensor, " tokens"]) -> tuple[Tensor, Tensor]:
        """The distilled scores, and the row of them that each token reads; few ids are scored once for all tokens."""
        n_ids = self.embedding.num_embeddings
        if n_ids < len(ids):
            return self.distilled(torch.arange(n_ids, device=ids.device)), ids
        return self.distilled(ids), torch.arange(len(ids), device=ids.device)

    @torch.no_grad()
    def _table(self, ids: Int[Tensor, " tokens"]) -> Int[Tensor, "tokens 1"]:
        scores, row = self._distilled_rows(ids)
        return top_k(scores, 1)[row]

    def _loss(self, asked: Tensor, ids: Tensor, chosen: Tensor, claimed: Tensor, n_tokens: int) -> Tensor:
        real = claimed >= 0
        counts = torch.bincount(claimed.reshape(-1) + 1, minlength=self.n_experts + 1)[1:]
        even = n_tokens / self.n_experts  # n̄
        balance = ((counts - even) / even)[chosen] * asked * real
        scores, row = self._distilled_rows(ids)
        distil = -scores.float().log_softmax(1)[row, chosen[:, 0]][:, None] * real
        return (self.balance_coef * balance + self.distill_coef * distil).sum() / n_tokens

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stage={int(self.stage)}, distill_steps={self.distill_steps}"
