"""Null experts: m of the n + m experts compute nothing, and a token that picks them among its k computes less.

    z = [x Wᵀ ; x W₀ᵀ]   [T, n + m]     p = softmax(z)     S = the k largest of p     S⁺ = S without the nulls
    y = Σ_{i in S⁺} w_i E_i(x),   w_i = p_i / Σ_{S⁺} p              0 if S⁺ is empty: the residual alone carries on
    loss = balance_coef (n + m) Σ_i f_i P_i,   f_i share of all T k picks,   P_i = mean p_i   (gradient through P)

For f every null gets the nulls' mean count: they are interchangeable, so only their total share is pushed, towards
m / (n + m). An even load then means k n / (n + m) true experts a token in the mean, while single tokens differ.

`install` starts the nulls from the trained gate: W₀ is its rows, repeated. A null is then as attractive as the expert
it shadows, and of equal ones the true expert comes first. Likewise `route` takes logits of the n true experts alone,
such as a recorded trace has, and lets the nulls shadow them. Equal logits also mean that at first every token uses
the same number of true experts; training the nulls makes them differ.

In the Routing a null pick is expert -1 with weight 0; logits and probs keep all n + m columns, nulls last.

Source: Zeng et al. 2024, section 3. Their Mixtral code averages the nulls' counts over the wrong axis of a
[k, n + m] tensor, which changes nothing; their LoRA code, followed here, does what the paper says.
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.routers._claims import top_k
from notebook_kit.routers.router import Router
from notebook_kit.routing import Routing


@method(family="routers", paper="adamoe")
class NullExperts(Router):
    """Each token makes k picks among the experts and m null experts that compute nothing.

    Args:
        d_model: width of the tokens.
        n_experts: n, true experts.
        n_null: m; None is 2 n. With 0 this is the top-k router whose weights sum to 1.
        k: picks a token, nulls included.
        pool_nulls: let the balance loss see the nulls as one pool; False balances each null too.
        balance_coef: times the balance loss.

    Raises:
        ValueError: k > n + m.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        n_null: Annotated[int | None, Range(0, 4096)] = None,
        k: Annotated[int, Range(1, 512)] = 4,
        pool_nulls: bool = True,
        balance_coef: Annotated[float, Range(0, 1)] = 1e-3,
    ):
        super().__init__(d_model, n_experts)
        self.n_null = 2 * n_experts if n_null is None else n_null
        if k > n_experts + self.n_null:
            raise ValueError(f"k must be at most n_experts + n_null={n_experts + self.n_null}, got {k} (NullExperts)")
        self.k, self.pool_nulls, self.balance_coef = k, pool_nulls, balance_coef
        self.null_weight = nn.Parameter(torch.empty(self.n_null, d_model))  # W₀
        nn.init.normal_(self.null_weight, std=0.02)

    @property
    def expected_experts(self) -> float:
        """True experts a token at an even load: k n / (n + m)."""
        return self.k * self.n_experts / (self.n_experts + self.n_null)

    @torch.no_grad()
    def adopt(self, weight: Float[Tensor, "experts d_model"]) -> None:
        """Start the nulls from a trained gate: its rows, repeated.

        Args:
            weight: W of the gate.
        """
        self.null_weight.copy_(shadows(weight.T.to(self.null_weight.dtype), self.n_null).T)

    def logits(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens experts"]:
        """Score the true experts, then the nulls."""
        true = super().logits(x)
        return torch.cat([true, nn.functional.linear(x.to(true.dtype), self.null_weight.to(true.dtype))], 1)

    def route(self, logits: Float[Tensor, "tokens experts"], *, mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Decide from the logits.

        Args:
            logits: z of n + m columns; or of the n true experts, whose shadows the nulls then are.
            mask: True for real tokens.

        Raises:
            ValueError: another number of columns.
        """
        n, m = self.n_experts, self.n_null
        self.check_logits(logits, mask, n, n + m)
        if logits.shape[1] == n and m:
            logits = torch.cat([logits, shadows(logits, m)], 1)
        p = logits.float().softmax(1)
        picks = top_k(logits.detach().float(), self.k)
        true = picks < n
        weights = p.gather(1, picks) * true
        total = weights.sum(1, keepdim=True)
        weights = weights / (total + (total == 0))  # all picks null: weights stay 0
        experts = picks.where(true, -1)
        if mask is not None:
            weights, experts = weights * mask[:, None], experts.where(mask[:, None], -1)
        loss = p.new_zeros(())
        if self.balance_coef:
            nulls = m if self.pool_nulls else 0
            loss = loss + self.balance_coef * pooled_balance_loss(p, picks, n_null=nulls, mask=mask)
        return Routing(logits, p, weights, experts, loss)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n_null={self.n_null}, k={self.k}"


def shadows(columns: Float[Tensor, "rows experts"], n_null: int) -> Float[Tensor, "rows nulls"]:
    """Repeat the columns of n experts until there are n_null of them."""
    return columns[:, torch.arange(n_null, device=columns.device) % columns.shape[1]]


def pooled_balance_loss(
    probs: Float[Tensor, "tokens experts"],
    picks: Int[Tensor, "tokens k"],
    *,
    n_null: int = 0,
    mask: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """(n + m) Σ f_i P_i with the mean count of the nulls for each of them; 1 where all is even.

    Args:
        probs: p of the true experts, then the nulls.
        picks: all k picks, nulls by their own index from n on.
        n_null: m, the last columns, seen as one pool.
        mask: True for real tokens.
    """
    columns = probs.shape[1]
    if mask is not None:
        probs, picks = probs[mask], picks[mask]
    counts = torch.bincount(picks.reshape(-1), minlength=columns).float()
    if n_null:
        counts[columns - n_null :] = counts[columns - n_null :].mean()
    f = counts / max(picks.numel(), 1)
    return columns * (f @ (probs.sum(0) / max(len(probs), 1)))
