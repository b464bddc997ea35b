"""The shape every router has: `logits(x)` scores the experts, `route(logits)` decides.

Deciding is a function of the logits alone, so a recorded trace can be routed again by any router without the model.
"""

import torch
from jaxtyping import Bool, Float, Int
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
    needs_tokens = False  # True where `forward` and `route` must be told the token ids, as `tokens=`
    needs_previous = False  # True where `route` reads the id before each token too, as `previous=`
    by_sequence = False  # True where `forward` takes sequences=, the number of each token's sequence

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

    def adopt(self, weight: Float[Tensor, "experts d_model"]) -> None:
        """Take over from a trained gate what `install` does not hand on by itself; most routers need nothing.

        Args:
            weight: of the gate.
        """

    def check_k(self, k: int) -> None:
        """Raise ValueError if k is more than the number of experts."""
        if k > self.n_experts:
            raise ValueError(f"k must be at most n_experts={self.n_experts}, got {k} ({self._name})")

    def check_logits(self, logits: Tensor, mask: Tensor | None, *columns: int) -> None:
        """Raise ValueError if logits have none of these numbers of columns (n_experts), or a mask other rows."""
        columns = columns or (self.n_experts,)
        if logits.shape[1] not in columns:
            wanted = " or ".join(map(str, columns))
            raise ValueError(f"logits need {wanted} columns, one an expert, got {logits.shape[1]} ({self._name})")
        if mask is not None and len(mask) != len(logits):
            raise ValueError(f"the mask must have one entry a token, {len(logits)}, got {len(mask)} ({self._name})")

    def check_tokens(
        self,
        tokens: Int[Tensor, "*batch"] | None,
        n_tokens: int,
        vocab_size: int,
        mask: Bool[Tensor, " tokens"] | None = None,
        low: int = 0,
    ) -> Int[Tensor, " tokens"]:
        """Flatten token ids, or raise ValueError: none given, another number, or an id out of range."""
        if tokens is None:
            raise ValueError(
                f"{self._name} routes by token ids: call it with tokens=ids, one for each of {n_tokens} rows"
            )
        ids = tokens.reshape(-1).long()
        if len(ids) != n_tokens:
            raise ValueError(f"tokens must hold one id a row, {n_tokens}, got {len(ids)} ({self._name})")
        ids = ids if mask is None else ids.where(mask, 0)  # padding may have any id
        if n_tokens and not (low <= int(ids.min()) and int(ids.max()) < vocab_size):
            bad = ids[(ids < low) | (ids >= vocab_size)][0]
            raise ValueError(
                f"token ids must be in [{low}, {vocab_size - 1}], got {int(bad)} ({self._name}, vocab_size)"
            )
        return ids

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, n_experts={self.n_experts}"
