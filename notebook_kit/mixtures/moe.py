"""A mixture of experts: any router over any experts, each token computed only by the experts it was sent to.

    y_t = Σ_{i in S_t} w_ti E_i(x_t)          S_t, w_t from the router

With residual=True what the weights leave over passes the layer by: y_t += (1 - Σ_i w_ti) x_t, so a token that no expert
serves comes out as it went in. BASE layers and StableMoE are defined so, with one weight σ(a).

Sparse dispatch: the claims (token, slot) are sorted by expert, so that each expert sees one contiguous slice of rows;
then every token's rows are summed with their weights.

Source: Shazeer et al. 2017, equation 1.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.catalog import method
from notebook_kit.mixtures.swiglu import SwiGLUExperts
from notebook_kit.routers import Router, Routing, TopK


@method(family="mixtures", paper="sparsely-gated-moe")
class MoE(nn.Module):
    """A layer of experts behind a router; `.routing` keeps the last decision, `aux_loss(model)` sums the losses.

    Args:
        experts: a sequence of modules from [rows, d_model] to [rows, d_model], or `SwiGLUExperts`.
        router: of the kit, for the same number of experts.
        residual: add (1 - Σ w) x to the output.
        causal: set True in a causal model: refuses a router that looks at later tokens.

    Raises:
        ValueError: the router is for another number of experts, or looks ahead in a causal model.
    """

    def __init__(
        self, experts: Sequence[nn.Module] | nn.Module, router: Router, *, residual: bool = False, causal: bool = False
    ):
        super().__init__()
        self.experts = experts if isinstance(experts, nn.Module) else nn.ModuleList(experts)
        self.router, self.residual = router, residual
        self.routing: Routing | None = None
        if len(self.experts) != router.n_experts:
            raise ValueError(f"the router is for n_experts={router.n_experts}, got {len(self.experts)} experts (MoE)")
        if causal and not router.causal:
            raise ValueError(
                f"{type(router).__name__} lets a token's routing depend on later tokens; in a causal model that leaks "
                "the future. causal=False allows it (MoE)"
            )

    def forward(
        self,
        x: Float[Tensor, "*batch d_model"],
        *,
        mask: Bool[Tensor, "*batch"] | None = None,
        tokens: Int[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch d_model"]:
        """Send each token to its experts and sum what they answer.

        Args:
            x: tokens.
            mask: True for real tokens; padding is served by no expert.
            tokens: ids, for routers that route by them (`HashRouter`, `StableMoE`); others do not look.

        Returns:
            Outputs of the same shape; for a token that no expert served 0, or x with residual=True.

        Raises:
            ValueError: a mask of another shape; as the router.
        """
        check_mask(mask, x)
        rows = x.reshape(-1, x.shape[-1])
        about = {"sequences": _sequences(x)} if self.router.by_sequence else {}
        about |= {"tokens": tokens} if self.router.needs_tokens else {}
        self.routing = self.router(rows, mask=None if mask is None else mask.reshape(-1), **about)
        y = mix(rows, self.routing, self.experts)
        if self.residual:
            y = y + (1 - self.routing.weights.sum(1, keepdim=True)).to(y.dtype) * rows
        return y.reshape(x.shape)

    @classmethod
    def from_transformers(cls, block: nn.Module) -> "MoE":
        """Wrap the weights of a transformers block (Mixtral, Qwen3-MoE, OLMoE), sharing them.

        Args:
            block: such as `model.model.layers[0].mlp`.

        Raises:
            ValueError: no fused experts and softmax gate, or a shared expert, which this layer has not.
        """
        children = dict(block.named_children())
        if set(children) != {"gate", "experts"} or not hasattr(children["experts"], "gate_up_proj"):
            raise ValueError(
                f"{type(block).__name__} must consist of a `gate` and fused `experts`, it has {', '.join(children)}"
            )
        gate, fused = block.gate, block.experts
        n_experts, d_model = gate.weight.shape
        experts = SwiGLUExperts(n_experts, d_model, fused.down_proj.shape[-1], activation=fused.act_fn, empty=True)
        experts.gate_up, experts.down = fused.gate_up_proj, fused.down_proj
        router = TopK(d_model, n_experts, k=gate.top_k, normalize=getattr(gate, "norm_topk_prob", True))
        router.weight = gate.weight
        return cls(experts, router)


def check_mask(mask: Bool[Tensor, "*batch"] | None, x: Float[Tensor, "*batch d_model"]) -> None:
    """Raise ValueError unless the mask says True or False for every token."""
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must say True or False for each token, shape {list(x.shape[:-1])}, got {list(mask.shape)} of "
            f"{str(mask.dtype).removeprefix('torch.')}"
        )


def _sequences(x: Float[Tensor, "*batch d_model"]) -> Tensor:
    """Number of each row's sequence in [..., length, d]; in [n, d] every row is one."""
    length = x.shape[-2] if x.ndim > 2 else 1
    return torch.arange(x[..., 0].numel(), device=x.device) // max(length, 1)


def mix(rows: Float[Tensor, "tokens d_model"], routing: Routing, experts: nn.Module) -> Float[Tensor, "tokens d_out"]:
    """Dispatch tokens to experts and combine the answers.

    Args:
        rows: tokens.
        routing: who goes where.
        experts: as `MoE` takes them.
    """
    n_tokens, slots = routing.experts.shape
    by_expert, claim = routing.experts.reshape(-1).sort(stable=True)
    unused, *counts = torch.bincount(by_expert + 1, minlength=len(experts) + 1).tolist()
    if unused == len(claim):
        return rows.new_zeros(rows.shape) + 0 * rows
    claim = claim[unused:]  # claims of expert 0, of expert 1, ...
    dispatched = rows[claim // slots]
    if isinstance(experts, nn.ModuleList):
        pieces = zip(experts, dispatched.split(counts), strict=True)
        answers = torch.cat([expert(piece) for expert, piece in pieces if len(piece)])
    else:
        answers = experts(dispatched, counts)
    # Where each claim's answer lies; an unused slot points at the first, with weight 0.
    place = torch.zeros(n_tokens * slots, dtype=torch.int64, device=rows.device)
    place[claim] = torch.arange(len(claim), device=rows.device)
    # For each token the weighted sum of its rows of `answers`.
    place, weights = place.view(n_tokens, slots), routing.weights.to(answers.dtype)
    if answers.is_cpu:  # one pass over memory; on a GPU its gradient is not there in every precision
        return F.embedding_bag(place, answers, mode="sum", per_sample_weights=weights)
    return (weights[:, None] @ answers[place]).squeeze(1)
