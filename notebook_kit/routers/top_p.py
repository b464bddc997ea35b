"""Top-p: a token takes experts in order of probability until they hold a share p of it; k differs by token.

    P = softmax(z / temperature)   [T, N]     P_(1) >= P_(2) >= ...     t = min{ j : P_(1) + ... + P_(j) >= threshold }
    y = sum over the first t experts of P_i E_i(x)                      always at least one expert, at most N
    loss = balance_coef L_b + entropy_coef L_d
    L_b = N Σ f_i Q_i            f_i share of tokens that use i, Q_i = mean P_i; an even load gives the mean t, not 1
    L_d = -mean over tokens of Σ P_i log P_i (nats); without it the router may stay flat and use many experts

A router that is sure uses one expert, one that is not uses many. The weights are the plain probabilities, so they sum
to something between the threshold and 1; `normalize` divides them by their sum, as Mixtral does.

Limits. There is no upper bound on a token's compute. With `normalize` a token of one expert has the constant weight 1
and teaches the router nothing. A sum within 1e-6 of the threshold counts as reached (float32 rounding).

Source: Huang et al. 2024, section 3.2 (equations 4 to 8). The authors' code tests `>` where the paper has `>=`, and
keeps every expert when rounding leaves no sum above the threshold; here threshold 1 means all experts of non-zero
probability. Coefficients 1e-2 and 1e-4 are the paper's for large models; a small net wants more of the second.
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.routers._claims import top_k
from notebook_kit.routers.losses import load_balancing_loss, log_normalizer
from notebook_kit.routers.router import Router
from notebook_kit.routing import Routing

ROUNDING = 1e-6
SOME, FEWEST = 256, 8  # tokens that are looked at; experts that are cheap to find


@method(family="routers", paper="dynamic-moe")
class TopP(Router):
    """Each token takes the fewest experts that together hold a share `threshold` of its probability.

    Args:
        d_model: width of the tokens.
        n_experts: N.
        threshold: p, the share of probability to reach; near 0 is top-1, 1 is every expert.
        temperature: the logits are divided by it; higher is flatter and uses more experts.
        normalize: divide the picked probabilities by their sum.
        balance_coef: times the balance loss L_b.
        entropy_coef: times the mean entropy L_d.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        threshold: Annotated[float, Range(0.0, 1.0)] = 0.4,
        temperature: Annotated[float, Range(0.05, 20, log=True)] = 1.0,
        normalize: bool = False,
        balance_coef: Annotated[float, Range(0, 1)] = 0.01,
        entropy_coef: Annotated[float, Range(0, 1)] = 1e-4,
    ):
        super().__init__(d_model, n_experts)
        self.threshold, self.temperature, self.normalize = threshold, temperature, normalize
        self.balance_coef, self.entropy_coef = balance_coef, entropy_coef

    def route(self, logits: Float[Tensor, "tokens experts"], *, mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Decide from the logits.

        Args:
            logits: z.
            mask: True for real tokens.
        """
        self.check_logits(logits, mask)
        h = logits.float()
        h = h if self.temperature == 1 else h / self.temperature
        p = h.softmax(1)
        picks, kept = nucleus(p.detach(), self.threshold)
        weights = p.gather(1, picks) * kept
        if self.normalize:
            weights = weights / weights.sum(1, keepdim=True)
        if mask is not None:
            kept = kept & mask[:, None]
            weights = weights * mask[:, None]
        experts = picks.where(kept, -1)
        loss = p.new_zeros(())
        if self.balance_coef:
            loss = loss + self.balance_coef * load_balancing_loss(p, experts, mask=mask)
        if self.entropy_coef:
            normalizer = log_normalizer(h, p, picks)
            loss = loss + self.entropy_coef * entropy_loss(h, mask=mask, probs=p, normalizer=normalizer)
        return Routing(logits, p, weights, experts, loss)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold:g}"


def nucleus(
    probs: Float[Tensor, "tokens experts"], threshold: float
) -> tuple[Int[Tensor, "tokens k_max"], Bool[Tensor, "tokens k_max"]]:
    """Find each token's smallest set of experts that holds the threshold.

    Args:
        probs: P, rows sum to 1.
        threshold: p.

    Returns:
        Experts by falling probability (of equal ones the lowest index first), as many columns as the longest set has;
        and True where a token uses them.
    """
    n_experts = probs.shape[1]
    # A look at some tokens says how many experts nearly all of them need: finding these is cheaper than sorting all.
    some = _sorted(probs[:: max(1, len(probs) // SOME)], threshold)[1].sum(1)
    few = max(FEWEST, int(some.float().quantile(0.99)) + 1) if len(some) else n_experts
    if 2 * few > n_experts:
        return _trimmed(*_sorted(probs, threshold))
    picks = top_k(probs, few)
    kept = _before_threshold(probs.gather(1, picks), threshold)
    # A token whose last place is in use may need more: those rows are sorted whole.
    longer = kept[:, -1]
    if longer.any():
        order, whole = _trimmed(*_sorted(probs[longer], threshold))
        picks, kept = (F.pad(part, (0, order.shape[1] - few)) for part in (picks, kept))
        picks[longer], kept[longer] = order, whole
    return _trimmed(picks, kept)


def _sorted(probs: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    falling, order = probs.sort(dim=1, descending=True, stable=True)
    return order, _before_threshold(falling, threshold)


def _trimmed(picks: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """As many columns as the longest set has, at least one."""
    used = max(int(kept.sum(1).max()), 1) if len(kept) else 1
    return picks[:, :used], kept[:, :used]


def _before_threshold(falling: Float[Tensor, "tokens k"], threshold: float) -> Bool[Tensor, "tokens k"]:
    """Slot j is used iff the mass before it has not reached the threshold: so the first always is."""
    before = falling.cumsum(1) - falling
    kept = falling > 0 if threshold >= 1 else before < threshold - ROUNDING
    kept[:, 0] = True
    return kept


def entropy_loss(
    logits: Float[Tensor, "tokens experts"],
    *,
    mask: Bool[Tensor, " tokens"] | None = None,
    probs: Float[Tensor, "tokens experts"] | None = None,
    normalizer: Float[Tensor, " tokens"] | None = None,
) -> Float[Tensor, ""]:
    """-mean over tokens of Σ P log P, in nats: 0 for a sure router, log N for a flat one.

    With P = softmax(h) this is the mean of logsumexp h - Σ P h, which needs no logarithm of each P.

    Args:
        logits: h of all experts, used or not; log P is one of them.
        mask: True for real tokens.
        probs: P, where it is there already.
        normalizer: logsumexp h, where it is known already (`log_normalizer`).
    """
    probs = logits.softmax(1) if probs is None else probs
    normalizer = logits.logsumexp(1) if normalizer is None else normalizer
    if mask is not None:
        logits, probs, normalizer = logits[mask], probs[mask], normalizer[mask]
    inner = torch.dot(probs.flatten(), logits.flatten())
    if not inner.isfinite():  # P h is 0 where P is 0, also where h is -inf
        inner = torch.dot(probs.flatten(), logits.clamp_min(torch.finfo(logits.dtype).min).flatten())
    return (normalizer.sum() - inner) / max(len(logits), 1)
