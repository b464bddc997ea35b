"""What mixtures of LoRA experts share: a frozen linear layer, a stack of LoRAs beside it, and a router before them.

    y_t = W x_t + Σ_{i in S_t} w_ti s_i B_i A_i x_t          A [N, r, d_in], B [N, d_out, r], s_i a scale

`attach`, `detach`, `adapter_weights` and the like work as for any adapter; `record_routing` and `aux_loss` as for any
mixture. B starts at zero, so the model starts unchanged. What a token adds depends on the token, so there is no
single matrix to fold into W, unless there is a single expert.

Some routers learn from what a linear layer cannot see: which task a sample is of, which tokens are padding.
`sample_labels` tells them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.adapters import Adapter, CannotFold
from notebook_kit.adapters._adapter import check_rank, exact, sizes
from notebook_kit.mixtures.labelled_router import LabelledRouter, Told
from notebook_kit.mixtures.lora_dispatch import DISPATCH
from notebook_kit.routers import Router, Routing


class LoRAExperts(Adapter):
    """Base of the mixtures of LoRA experts around one linear layer.

    Args:
        host: nn.Linear or transformers' Conv1D.
        n_experts: N.
        rank: r, of each expert.
        scaling: s, of all experts.
        router: d_in -> router of N experts; its weight is drawn as nn.Linear draws.
        dropout: share of the entries of x that the experts do not see in training; the router sees all.
        dispatch: how it is computed, see `lora_dispatch`.

    Raises:
        ValueError: rank above min(d_in, d_out) of the host.
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        n_experts: int,
        rank: int,
        scaling: float,
        router: Callable[[int], Router],
        dropout: float = 0.0,
        dispatch: str = "auto",
    ):
        super().__init__(host)
        check_rank(rank, host, type(self).__name__)
        d_in, d_out = sizes(host)
        self.n_experts, self.rank, self.dropout, self.dispatch = n_experts, rank, dropout, dispatch
        self.A, self.B = self.trainable(n_experts, rank, d_in), self.trainable(n_experts, d_out, rank)
        self.register_buffer("scaling", torch.full((n_experts,), float(scaling), device=self.A.device))  # s
        self.router = router(d_in).to(self.A.device)
        for weight in (self.A, self.router.weight):
            nn.init.uniform_(weight, -1 / math.sqrt(d_in), 1 / math.sqrt(d_in))  # Kaiming-uniform with a = sqrt(5)
        self.routing: Routing | None = None
        self.told = Told()

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Return W x and what the picked experts add; `.routing` keeps who was picked."""
        y, rows = self.host(x), x.reshape(-1, x.shape[-1])
        self.routing = self.router(rows, **self._about(x))
        weights, experts = self.routing.weights, self.routing.experts
        weights = weights * self.scaling[experts.clamp_min(0)]
        rows = F.dropout(rows, self.dropout, self.training)
        return y + DISPATCH[self.dispatch](rows, self.A, self.B, weights, experts).reshape(y.shape)

    def factors(self) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
        """Return s B and A of a single expert.

        Raises:
            CannotFold: there are several experts.
        """
        if self.n_experts > 1 or not self.constant:
            raise CannotFold(
                f"{type(self).__name__} of {self.n_experts} experts adds another matrix for each token; only a single "
                "expert of constant weight folds"
            )
        return exact(self.scaling) * exact(self.B[0]), exact(self.A[0])

    @property
    def constant(self) -> bool:
        """Whether the weight of a single expert is 1 for every token."""
        return True

    def _about(self, x: Tensor) -> dict:
        """What the router is told of each row."""
        told, n = self.told, x[..., 0].numel()
        about = {} if told.mask is None else {"mask": _per_row(told.mask.bool(), x, "mask")}
        if isinstance(self.router, LabelledRouter):
            length = x.shape[-2] if x.ndim > 2 else 1
            about["sequences"] = torch.arange(n, device=x.device) // max(length, 1)
            about["labels"] = None if told.labels is None else _per_row(told.labels.long(), x, "labels")
            about["n_layers"] = told.n_layers
        return about

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, rank={self.rank}, dispatch={self.dispatch!r}"


@contextmanager
def sample_labels(
    model: nn.Module,
    labels: Int[Tensor, "batch *length"] | None = None,
    *,
    mask: Bool[Tensor, "batch *grid"] | None = None,
) -> Iterator[None]:
    """Tell the mixtures of LoRA experts in a model what the batch is, for the forward passes in the block.

        with sample_labels(model, tasks, mask=mask):
            loss = task_loss(model, batch) + aux_loss(model)

    Args:
        model: holds `LoRAMoE`, `MoLA`, `SMoRA` or `MeteoRA` layers.
        labels: a label for each sample, or for each token: the group (0 or 1) for LoRAMoE, the adapter's place in the
            bank for MeteoRA (-1 for none of them).
        mask: True for real tokens; padding gets no expert, and counts in no loss.

    Raises:
        ValueError: the model holds no such layer; in the forward pass, a batch of another size.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRAExperts)]
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no mixture of LoRA experts: attach one first (sample_labels)")
    before = [layer.told for layer in layers]
    try:
        for layer in layers:
            layer.told = Told(labels, mask, len(layers))
        yield
    finally:
        for layer, told in zip(layers, before, strict=True):
            layer.told = told


def _per_row(values: Tensor, x: Tensor, name: str) -> Tensor:
    """One value for each row of x, from one for each sample or each token."""
    batch = x.shape[:-1]
    values = values.to(x.device)
    if values.shape == batch:
        return values.reshape(-1)
    if values.ndim == 1 and len(batch) > 1 and len(values) == batch[0]:
        return values.repeat_interleave(math.prod(batch[1:]))
    raise ValueError(
        f"{name} must have one value a sample or a token, {list(batch[:1])} or {list(batch)}, got {list(values.shape)}"
    )
