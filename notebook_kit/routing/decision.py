"""`Routing`: what one router call decided."""

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Routing:
    """The decision of one router call for every token.

    Args:
        logits: raw scores z, before any noise.
        probs: what the router turned them into, float32; rows sum to 1 where it is a softmax.
        weights: what multiplies each chosen expert's output, float32; 0 in unused slots.
        experts: the chosen experts; -1 in unused slots (a dropped claim, a padding token, fewer than k_max experts).
        aux_loss: balance and z losses, already times their coefficients; add it to the task's loss.
        claimed: the experts asked for before capacity cut some; None where nothing can be dropped.

    Raises:
        ValueError: NaN in the logits, or in what an infinite one made of the probabilities. (A logit of -inf forbids an
            expert; +inf, or a row of -inf only, is none that a softmax can weigh.)
    """

    logits: Float[Tensor, "tokens experts"]
    probs: Float[Tensor, "tokens experts"]
    weights: Float[Tensor, "tokens k_max"]
    experts: Int[Tensor, "tokens k_max"]
    aux_loss: Float[Tensor, ""]
    claimed: Int[Tensor, "tokens k_max"] | None = None

    def __post_init__(self):
        # Almost always the sum is finite, and so is every entry: one number says that all is well.
        if not torch.isfinite(self.logits.sum()):
            refuse_nan(self.logits, "the router's logits")
            refuse_nan(self.probs, "the router's probabilities (of infinite logits)")

    @cached_property
    def load(self) -> Float[Tensor, " experts"]:
        """Each expert's share of the claims that were served: sums to 1, or to 0 if none was."""
        return _shares(self.experts, self.logits.shape[1])

    @cached_property
    def demand(self) -> Float[Tensor, " experts"]:
        """Each expert's share of all claims, those that capacity dropped included."""
        return _shares(self.experts if self.claimed is None else self.claimed, self.logits.shape[1])

    @cached_property
    def dropped(self) -> float:
        """Share of the claims that capacity dropped, in [0, 1]."""
        if self.claimed is None:
            return 0.0
        claims = int((self.claimed >= 0).sum())
        return 1 - int((self.experts >= 0).sum()) / claims if claims else 0.0

    def __len__(self) -> int:
        return len(self.logits)

    def __repr__(self) -> str:
        tokens, experts = self.logits.shape
        slots = self.experts.shape[1]
        return f"Routing({tokens} tokens, {experts} experts, up to {slots} a token, {self.dropped:.1%} dropped)"

    def __deepcopy__(self, memo) -> "Routing":
        # A model that remembers its last routing must stay copyable; autograd's tensors are not.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Routing(**{name: None if value is None else value.detach().clone() for name, value in values.items()})


def refuse_nan(logits: Float[Tensor, "tokens experts"], name: str) -> None:
    """Raise ValueError if there is a NaN."""
    # A sum that is not NaN proves that no entry is; inf - inf does not prove the contrary.
    if torch.isnan(logits.sum()) and (bad := torch.isnan(logits)).any():
        token = int(bad.any(1).nonzero()[0])
        raise ValueError(f"{name} hold NaN, first at token {token}; look for the layer before it that overflowed")


def _shares(experts: Int[Tensor, "tokens k_max"], n_experts: int) -> Float[Tensor, " experts"]:
    counts = torch.bincount(experts.reshape(-1) + 1, minlength=n_experts + 1)[1:].float()
    return counts / counts.sum().clamp_min(1)


def aux_loss(model: nn.Module) -> Float[Tensor, ""]:
    """Sum the auxiliary losses of the last forward pass over all routed layers of a model.

    Args:
        model: holds `MoE` layers or installed routers, and has been run.

    Returns:
        Scalar to add to the task's loss.

    Raises:
        ValueError: no layer remembers a routing.
    """
    losses = [m.routing.aux_loss for m in model.modules() if isinstance(getattr(m, "routing", None), Routing)]
    if not losses:
        raise ValueError(f"no layer of {type(model).__name__} remembers a routing: run the model first")
    return torch.stack(losses).sum()
