"""LoRAMoE: two groups of LoRA experts, pulled apart by a loss, so that new tasks do not overwrite old knowledge.

    p = softmax(x Rᵀ)   [T, N]                        y = W x + (alpha / r) Σ_i p_i B_i A_i x      all experts, no top-k
    Q_bn = Σ_t p_btn   over the tokens of sample b      I_bn = 1 + δ if group(n) = type(b), else 1 - δ
    loss = balance_coef * var(Z) / mean(Z)²,   Z = I ⊙ Q   [samples, N]

W [d_out, d_in] is frozen: in the paper the linear layers of the feed-forward block, not of the attention. Experts
0 .. N/2 - 1 are group 1, the others group 0; the type of each sample, 0 or 1, comes with the data.

Mind the direction. Z is constant, and the loss 0, where Q is proportional to 1 / I: a sample's own group gets the
smaller share, (1 - δ) : (1 + δ) of the other's. The groups part as the paper says, but with the names exchanged; which
of them holds the knowledge is only a label. attract=True turns I round, so that a sample draws its own group.

Paper: Dou et al. 2023, equations 5 to 8. It divides by the mean; the official code, and this, by its square, so that
the length of a sample does not matter. The code also counts padding; here `sample_labels(mask=...)` leaves it out.
The code's defaults are 8 experts and no loss; the paper's 6 experts and 0.1 are the defaults here.
"""

from functools import partial
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures.labelled_router import LabelledRouter, Rows
from notebook_kit.mixtures.lora_experts import LoRAExperts
from notebook_kit.routers import cv_squared


@method(family="mixtures", paper="loramoe")
def localized_balance_loss(
    amounts: Float[Tensor, "samples experts"],
    types: Int[Tensor, " samples"],
    *,
    imbalance: Annotated[float, Range(0, 0.9)] = 0.1,
    attract: bool = False,
    form: Annotated[str, Choice("cv_squared", "var/mean")] = "cv_squared",
) -> Float[Tensor, ""]:
    """Ask for an even load inside each group of experts, and an uneven one between the groups.

    Args:
        amounts: Q, what each expert got of each sample.
        types: 0 or 1 for each sample.
        imbalance: δ; 0 is an even load over all experts.
        attract: a sample draws the experts of its own group instead of the others'.
        form: var / mean² of the code, or var / mean of the paper.

    Returns:
        Scalar, 0 at its optimum; 0 for one expert.

    Raises:
        ValueError: an odd number of experts, or a type that is neither 0 nor 1.
    """
    n = amounts.shape[1]
    if n == 1:
        return amounts.sum() * 0
    if n % 2:
        raise ValueError(f"two groups need an even number of experts, got {n} (localized_balance_loss)")
    if len(types) and not bool(((types == 0) | (types == 1)).all()):
        raise ValueError(f"types must be 0 or 1, got {types.unique().tolist()} (localized_balance_loss)")
    group = (torch.arange(n, device=amounts.device) < n // 2).long()  # group 1 first, as in the code
    matched = group[None, :] == types[:, None]
    sign = -1 if attract else 1
    Z = amounts * (1 + sign * imbalance * (2 * matched.float() - 1))
    loss = cv_squared(Z.flatten())
    return loss if form == "cv_squared" else loss * Z.mean()


class SoftGate(LabelledRouter):
    """All experts for every token, weighed by a softmax; its loss is the localised balance.

    Args:
        d_model: width of the tokens.
        n_experts: N.
        balance_coef: times the loss.
        imbalance: δ.
        attract: which way the loss pulls.
    """

    def __init__(self, d_model: int, n_experts: int, *, balance_coef=0.1, imbalance=0.1, attract=False):
        super().__init__(d_model, n_experts)
        self.k, self.balance_coef, self.imbalance, self.attract = n_experts, balance_coef, imbalance, attract

    def choose(
        self, z: Float[Tensor, "tokens experts"], p: Float[Tensor, "tokens experts"]
    ) -> tuple[Float[Tensor, "tokens experts"], Int[Tensor, "tokens experts"]]:
        """Return p, and all experts."""
        return p, torch.arange(self.n_experts, device=p.device).expand_as(p)

    def loss(
        self, z: Float[Tensor, "tokens experts"], weights: Float[Tensor, "tokens experts"], rows: Rows
    ) -> Float[Tensor, ""]:
        """Return the localised balance of the samples' shares; the layers' losses are summed.

        Args:
            z: not looked at.
            weights: p, 0 for padding.
            rows: labels are the types of the samples.

        Raises:
            ValueError: in training, no types.
        """
        labels, mask = rows.labels, rows.mask
        if not self.balance_coef or self.n_experts == 1 or (labels is None and not self.training):
            return weights.new_zeros(())
        if labels is None:
            raise ValueError(
                "the localised balance needs the type of each sample: run the model inside `with sample_labels(model, "
                "types):`, or set balance_coef=0 (LoRAMoE)"
            )
        keep = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
        samples = torch.arange(len(labels), device=labels.device) if rows.sequences is None else rows.sequences
        if not keep.any():
            return weights.sum() * 0
        known, row = samples[keep].unique(return_inverse=True)  # a sample of padding only is none
        Q = weights.new_zeros(len(known), self.n_experts).index_add(0, row, weights[keep])
        types = labels.new_zeros(len(known)).index_put((row,), labels[keep])
        return self.balance_coef * localized_balance_loss(Q, types, imbalance=self.imbalance, attract=self.attract)


@method(family="mixtures", paper="loramoe")
class LoRAMoE(LoRAExperts):
    """LoRA experts in two groups beside a frozen linear layer, all of them used, weighed by a soft router.

    Args:
        host: nn.Linear or transformers' Conv1D.
        n_experts: N, even; the first half is group 1. One expert is a plain LoRA.
        rank: of each expert.
        alpha: strength; the scale is alpha / rank.
        dropout: share of the entries of x that the experts do not see in training; 0.05 in the official script.
        balance_coef: times the localised balance loss; then training needs `sample_labels`. The official script has 0.
        imbalance: δ, how far the groups are pulled apart; 0 asks for an even load.
        attract: False as published: a sample's own group gets less. True: it gets more.

    Raises:
        ValueError: an odd number of experts, or rank above min(d_in, d_out).

    Source: Dou et al. 2023, equations 3 to 8.
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        n_experts: Annotated[int, Range(1, 64)] = 6,
        rank: Annotated[int, Range(1, 1024, log=True)] = 4,
        alpha: Annotated[float, Range(0.125, 4096, log=True)] = 32,
        dropout: Annotated[float, Range(0, 0.9)] = 0.0,
        balance_coef: Annotated[float, Range(0, 10)] = 0.1,
        imbalance: Annotated[float, Range(0, 0.9)] = 0.1,
        attract: bool = False,
    ):
        if n_experts > 1 and n_experts % 2:
            raise ValueError(f"two groups need an even n_experts, got {n_experts} (LoRAMoE)")
        rules = {"balance_coef": balance_coef, "imbalance": imbalance, "attract": attract}
        parts = {"n_experts": n_experts, "rank": rank, "scaling": alpha / rank}
        # Every expert serves every token: there is nothing to leave out.
        router = partial(SoftGate, n_experts=n_experts, **rules)
        super().__init__(host, router=router, dropout=dropout, dispatch="masked", **parts)
