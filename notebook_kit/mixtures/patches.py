"""Patch-wise routing: which experts compute which patches of a sequence, and which experts run for a sample at all.

    patch feature f = mean of its tokens        g = softmax(f Wᵀ)   [batch, patches, n]
    data selection:   a patch keeps its k best experts; an expert takes at most c of a sample's patches
    expert selection: a sample keeps its k_sample best experts by its mean token; these compute all of it
    both:             the patches choose among the experts of their sample

| gate_mode | the answer of expert i counts         | gradient of the gate |
|-----------|---------------------------------------|----------------------|
| weight    | n · g_i (at a zero gate exactly 1)    | yes                  |
| select    | 1                                     | none                 |
| sum       | Σ_kept g / Σ_kept g                   | rounding errors      |

Source: Yang et al. 2025. Their language code is "select", and norms the gate over the batch first; their long-range
code is "sum". An expert that kept fewer patches than the fullest is filled up with others there, which are computed and
added; here fillers are masked. `capacity_factor=1` with k = n/2 is their fixed c = half of the patches. Their expert
selection reads the whole sample by a matrix of fixed length; here it reads the mean token. No gate has a bias here.
"""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.mixtures.moe import check_mask
from notebook_kit.routers import Routing, TopK
from notebook_kit.routers._claims import capacity


@dataclass(frozen=True, eq=False)
class PatchChoice:
    """What a call decided: patches of tokens, which tokens are real, which expert takes which patch, and its weight."""

    patches: Float[Tensor, "batch m patch_size d"]
    real: Bool[Tensor, "batch m patch_size"]
    taken: Bool[Tensor, "batch m n"]
    weights: Float[Tensor, "batch m n"]


class PatchRouter(nn.Module):
    """Chooses experts for patches, for samples, or both; `.routing` keeps the last decision, `.taken` who took what.

    Args:
        d_model: d.
        n_experts: n.
        k: experts a patch.
        k_sample: experts a sample.
        selection: "data", "expert" or "both".
        patch_size: tokens routed together; a sequence that it does not divide is padded.
        capacity_factor: an expert takes at most c = ceil(k m / n · capacity_factor) patches of a sample; None is no
            limit.
        gate_mode: see the table above.
        causal: a patch chooses by its first token and full experts turn later patches away, so that no token's output
            depends on later ones. Otherwise it chooses by its mean, and full experts keep their surest patches.

    Raises:
        ValueError: k or k_sample do not fit, or expert selection in a causal model.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        k: int,
        k_sample: int | None,
        selection: str,
        patch_size: int,
        capacity_factor: float | None,
        gate_mode: str,
        causal: bool,
    ):
        super().__init__()
        self.n_experts, self.k, self.selection, self.patch_size = n_experts, k, selection, patch_size
        self.capacity_factor, self.gate_mode, self.causal = capacity_factor, gate_mode, causal
        self.k_sample = n_experts if k_sample is None else k_sample
        if causal and selection != "data":
            raise ValueError(
                f"selection={selection!r} chooses by the whole sample, later tokens included; in a causal model that "
                "leaks the future: use selection='data'"
            )
        if selection == "both" and k > self.k_sample:
            raise ValueError(f"k must be at most k_sample={self.k_sample}, got {k}")
        rules = {"normalize": False, "balance_coef": 0.0}
        self.router = None if selection == "expert" else TopK(d_model, n_experts, k=k, **rules)
        self.sample_router = None if selection == "data" else TopK(d_model, n_experts, k=self.k_sample, **rules)
        self.routing: Routing | None = None
        self.taken: Tensor | None = None

    def forward(self, x: Float[Tensor, "batch length d"], mask: Bool[Tensor, "batch length"] | None) -> PatchChoice:
        """Cut into patches and choose.

        Args:
            x: tokens.
            mask: True for real tokens.

        Raises:
            ValueError: x is no batch of sequences, or a mask of another shape.
        """
        if x.ndim != 3:
            raise ValueError(f"patches are cut from sequences [batch, length, d], got {list(x.shape)}")
        check_mask(mask, x)
        n_samples, length, _ = x.shape
        real = x.new_ones((n_samples, length), dtype=torch.bool) if mask is None else mask
        short = -length % self.patch_size
        patches = F.pad(x, (0, 0, 0, short)).unflatten(1, (-1, self.patch_size))
        real = F.pad(real, (0, short)).unflatten(1, (-1, self.patch_size))
        exists = real.any(2)
        feature = patches[:, :, 0] if self.causal else _mean(patches, real)
        weights = x.new_ones((*exists.shape, self.n_experts), dtype=torch.float32)
        kept = exists.unsqueeze(-1).expand_as(weights)
        chosen = None
        if self.sample_router is not None:
            self.routing = self.sample_router(_mean(feature, exists))
            chosen, gate = self._kept(self.routing, self.routing.probs)
            kept, weights = kept & chosen.unsqueeze(1), weights * gate.unsqueeze(1)
        if self.router is not None:
            routing = self._route(feature, exists, chosen)
            # A sample's experts share its probability: the scale is their number.
            scale = self.k_sample if chosen is not None else self.n_experts
            picked, gate = self._kept(routing, routing.probs, scale)
            picked, gate = (part.reshape(weights.shape) for part in (picked, gate))
            kept, weights = self._limit(kept & picked, routing.probs.reshape(weights.shape)), weights * gate
            if chosen is not None:
                routing = dataclasses.replace(routing, aux_loss=routing.aux_loss + self.routing.aux_loss)
            self.routing = routing
        self.taken = kept.detach()
        return PatchChoice(patches, real, kept, weights * kept)

    def _route(self, feature: Tensor, exists: Tensor, chosen: Tensor | None) -> Routing:
        rows, exists = feature.flatten(0, 1), exists.flatten()
        if chosen is None:
            return self.router(rows, mask=exists)
        elsewhere = ~chosen.repeat_interleave(feature.shape[1], 0)
        return self.router.route(self.router.logits(rows).masked_fill(elsewhere, -torch.inf), mask=exists)

    def _kept(self, routing: Routing, probs: Float[Tensor, "rows n"], scale: int | None = None):
        """Who is picked, and what its answer counts."""
        kept = torch.zeros(len(probs), self.n_experts + 1, dtype=torch.bool, device=probs.device)
        kept = kept.scatter(1, routing.experts % (self.n_experts + 1), True)[:, : self.n_experts]  # -1 is the last
        if self.gate_mode == "select":
            return kept, torch.ones_like(probs)
        if self.gate_mode == "weight":
            return kept, probs * (scale or self.n_experts)
        g = probs * kept
        return kept, (g / g.sum(1, keepdim=True).clamp_min(1e-9)).sum(1, keepdim=True).expand_as(probs)

    def _limit(self, kept: Bool[Tensor, "batch m n"], probs: Float[Tensor, "batch m n"]) -> Bool[Tensor, "batch m n"]:
        """At most c patches for each expert of each sample."""
        if self.capacity_factor is None or not kept.shape[1]:
            return kept
        c = min(capacity(kept.shape[1], self.n_experts, self.k, self.capacity_factor), kept.shape[1])
        if self.causal:
            return kept & (kept.cumsum(1) <= c)
        surest = probs.detach().masked_fill(~kept, -1).sort(dim=1, descending=True, stable=True).indices[:, :c]
        return kept & torch.zeros_like(kept).scatter(1, surest, True)


def _mean(x: Float[Tensor, "*b r d"], real: Bool[Tensor, "*b r"]) -> Float[Tensor, "*b d"]:
    """Mean over the real rows."""
    count = real.sum(-1, keepdim=True).clamp_min(1)
    return (x * real.unsqueeze(-1)).sum(-2) / count


def gather_slots(
    taken: Bool[Tensor, "groups m n"],
) -> tuple[Int[Tensor, "n groups c"], Bool[Tensor, "n groups c"]]:
    """List the patches each expert takes, in their order; all lists are as long as the longest.

    Args:
        taken: who takes what, in groups that stay apart.

    Returns:
        Indices of patches, and True where the slot is not a filler.
    """
    taken = taken.permute(2, 0, 1)
    c = int(taken.sum(-1).max()) if taken.numel() else 0
    ids = (~taken).byte().sort(dim=-1, stable=True).indices[..., :c]
    return ids, taken.gather(-1, ids)
