"""Expert choice: each expert takes its C most probable tokens, so the load is even by construction.

    p = softmax(x Wᵀ) over experts   [T, N]          C = T k / N          expert i serves the C tokens of largest p_ti

k is the mean number of experts a token gets (the paper's capacity factor); a token gets 0 to N of them, with the
weights p_ti. No balance loss, nothing to tune. C is rounded up; of equal probabilities the earlier token wins.

Limit. Whether a token is served depends on all other tokens of the call, later ones too. In a decoder that leaks
the future while training and cannot be repeated while generating, so it is refused there unless asked for.

Source: Zhou et al. 2022, section 3.2; the variant that caps experts per token (equation 2) is not here.
"""

from typing import Annotated

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.routers._claims import best_first, capacity
from notebook_kit.routers.router import Router
from notebook_kit.routing import Routing


@method(family="routers", paper="expert-choice")
class ExpertChoice(Router):
    """Each expert takes the same number of tokens, those that it is most probable for.

    Args:
        d_model: width of the tokens.
        n_experts: N.
        k: mean experts a token.

    Raises:
        ValueError: k > n_experts.
    """

    causal = False

    def __init__(self, d_model: int, n_experts: int, *, k: Annotated[int, Range(1, 512)] = 2):
        super().__init__(d_model, n_experts)
        self.check_k(k)
        self.k = k

    def route(self, logits: Float[Tensor, "tokens experts"], *, mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Decide from the logits of all tokens together.

        Args:
            logits: z.
            mask: True for real tokens.
        """
        self.check_logits(logits, mask)
        p = logits.float().softmax(1)
        offered = p.detach() if mask is None else p.detach().masked_fill(~mask[:, None], -1)
        n_tokens = len(p) if mask is None else int(mask.sum())
        taken = _best_tokens(offered, capacity(n_tokens, self.n_experts, self.k, 1.0))
        experts = best_first(taken, p.detach())
        unused = experts < 0
        weights = p.gather(1, experts.clamp_min(0)).masked_fill(unused, 0)
        return Routing(logits, p, weights, experts, p.new_zeros(()))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}"


def _best_tokens(scores: Float[Tensor, "tokens experts"], slots: int) -> Bool[Tensor, "tokens experts"]:
    """True for the `slots` largest of each column; of equal scores the earlier token wins."""
    if slots == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _kth_largest(scores, slots)
    taken = scores >= threshold
    if (taken.sum(0) == slots).all():
        return taken
    above, equal = scores > threshold, scores == threshold
    return above | (equal & (equal.cumsum(0) <= slots - above.sum(0)))


def _kth_largest(scores: Float[Tensor, "tokens experts"], k: int) -> Float[Tensor, " experts"]:
    """The k-th largest of each column."""
    columns = scores.T.contiguous()
    if columns.device.type == "cpu":  # numpy's selection is several times faster than torch's topk and kthvalue
        return torch.from_numpy(np.partition(columns.numpy(), len(scores) - k, axis=1)[:, -k].copy())
    return columns.topk(k, dim=1).values[:, -1]
