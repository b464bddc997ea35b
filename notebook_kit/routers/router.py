"""The shape every router has: `logits(x)` scores the experts, `route(logits)` decides.

Deciding is a function of the logits alone, so a recorded trace can be routed again by any router without the model.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.routing import Routing


class Router(nn.Module):
    """Base of the routers: z = x Wᵀ, one row of W for each expert.

    Args:
        d_model: width of the tokens.
        n_experts: N.

    Raises:
        ValueError: a size below 1.
    """

    causal = True  # False where a token's experts depend on later tokens of its sequence

    def __init__(self, d_model: int, n_experts: int):
        super().__init__()
        if d_model < 1 or n_experts < 1:
            raise ValueError(f"d_model and n_experts must be at least 1, got {d_model} and {n_experts} ({self._name})")
        self.d_model, self.n_experts = d_model, n_experts
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.normal_(self.weight, std=0.02)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def logits(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens experts"]:
        """Score every expert for every token, in the precision of the weight."""
        if x.shape[-1] != self.d_model:
            raise ValueError(f"tokens must have width d_model={self.d_model}, got {x.shape[-1]} ({self._name})")
        return F.linear(x.to(self.weight.dtype), self.weight)

    def route(self, logits: Float[Tensor, "tokens experts"], *, mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Decide from the logits.

        Args:
            logits: z, any floating dtype; computed with in float32.
            mask: True for real tokens; padding gets no expert and counts nowhere. None means all are real.
        """
        raise NotImplementedError(f"{self._name} does not say how it routes")

    def forward(self, x: Float[Tensor, "tokens d_model"], *, mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Route tokens.

        Args:
            x: tokens, any floating dtype.
            mask: True for real tokens.
        """
        return self.route(self.logits(x), mask=mask)

    def check_k(self, k: int) -> None:
        """Raise ValueError if k is more than the number of experts."""
        if k > self.n_experts:
            raise ValueError(f"k must be at most n_experts={self.n_experts}, got {k} ({self._name})")

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, n_experts={self.n_experts}"
