"""Selective multi-head attention: each head is an expert that attends only among the patches which chose it.

    MHA(x) = Σ_i head_i(x) W_o,i + b_o       head i: its rows of W_q, W_k, W_v, its columns of W_o, an even share of b_o

A head with c of l tokens has (c/l)² of the scores to compute. Tokens keep their order and causality: inside a head a
token sees the earlier tokens that chose the head too. With k = n heads and no limit it is the dense attention, exactly.

Limits. No positions are rotated here: put them into the tokens. The released language code rotates by the place among
the selected, and its fillers are keys that others attend to; here they are masked.

Source: Yang et al. 2025 (SMHA).
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures.patches import PatchRouter, gather_slots


@method(family="mixtures", paper="uoe")
class SelectiveAttention(nn.Module):
    """Multi-head attention whose heads take patches; `.gate.taken` says who took which, `.pairs` the scores computed.

    Args:
        dense: torch's nn.MultiheadAttention, for self-attention; left as it is.
        k: heads a patch; None is half of them.
        patch_size: tokens routed together.
        capacity_factor: a head's patches of a sample relative to an even share k m / n; None is no limit.
        gate_mode: what the gate does: "weight" (multiplies, learns), "select" (only chooses), "sum" (as good as that).
        causal: a token sees itself and earlier tokens only, in choosing too.

    Raises:
        ValueError: attention with dropout, other key or value sizes, or extra keys.
    """

    def __init__(
        self,
        dense: nn.MultiheadAttention,
        *,
        k: Annotated[int | None, Range(1, 512)] = None,
        patch_size: Annotated[int, Range(1, 4096)] = 1,
        capacity_factor: Annotated[float | None, Range(0.05, 16, log=True)] = None,
        gate_mode: Annotated[str, Choice("weight", "select", "sum")] = "weight",
        causal: bool = False,
    ):
        super().__init__()
        plain = dense.in_proj_weight is not None and dense.bias_k is None and not dense.add_zero_attn
        if not plain or dense.dropout:
            raise ValueError(
                "SelectiveAttention cuts self-attention with one size for queries, keys and values, no extra keys and "
                f"dropout 0; got kdim={dense.kdim}, vdim={dense.vdim}, dropout={dense.dropout}"
            )
        d, n = dense.embed_dim, dense.num_heads
        with torch.no_grad():
            # [3, n, head, d] -> [n, 3 head, d]
            self.w_in = nn.Parameter(_by_head(dense.in_proj_weight, n).clone())
            self.w_out = nn.Parameter(dense.out_proj.weight.reshape(d, n, -1).transpose(0, 1).clone())
            bias = dense.in_proj_bias is not None
            self.b_in = nn.Parameter(_by_head(dense.in_proj_bias, n).clone()) if bias else None
            self.b_out = nn.Parameter((dense.out_proj.bias / n).repeat(n, 1)) if bias else None
        self.gate = PatchRouter(
            d,
            n,
            k=max(n // 2, 1) if k is None else k,
            k_sample=None,
            selection="data",
            patch_size=patch_size,
            capacity_factor=capacity_factor,
            gate_mode=gate_mode,
            causal=causal,
        ).to(self.w_in.device, self.w_in.dtype)
        self.causal, self.pairs = causal, 0

    def forward(
        self, x: Float[Tensor, "batch length d"], *, mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length d"]:
        """Attend in each head among its tokens, and sum the heads; the residual is the caller's.

        Args:
            x: sequences of tokens.
            mask: True for real tokens; padding is not attended to and gets 0.
        """
        choice = self.gate(x, mask)
        n_samples, m, size, d = choice.patches.shape
        ids, slot = gather_slots(choice.taken)  # [n, batch, c]
        sample = torch.arange(n_samples, device=x.device)[None, :, None]
        tokens = choice.patches[sample, ids].flatten(2, 3)  # [n, batch, c size, d]
        real = (choice.real[sample, ids] & slot.unsqueeze(-1)).flatten(2)
        place = (ids.unsqueeze(-1) * size + torch.arange(size, device=x.device)).flatten(2)
        hidden = tokens @ self.w_in.mT.unsqueeze(1)
        if self.b_in is not None:
            hidden = hidden + self.b_in[:, None, None]
        mixed = self._attend(hidden, real, place) @ self.w_out.mT.unsqueeze(1)
        if self.b_out is not None:
            mixed = mixed + self.b_out[:, None, None]
        weights = choice.weights.permute(2, 0, 1).gather(2, ids).repeat_interleave(size, 2) * real
        self.pairs = real.shape[0] * n_samples * real.shape[2] ** 2
        flat = (sample * m * size + place).flatten()
        answers = (mixed * weights.unsqueeze(-1).to(mixed.dtype)).reshape(-1, d)
        y = answers.new_zeros(n_samples * m * size, d).index_add(0, flat, answers)
        return y.reshape(n_samples, m * size, d)[:, : x.shape[1]]

    def _attend(self, hidden: Tensor, real: Bool[Tensor, "n batch c"], place: Tensor) -> Tensor:
        q, k, v = hidden.chunk(3, dim=-1)
        seen = real.unsqueeze(2) if not self.causal else real.unsqueeze(2) & (place.unsqueeze(2) <= place.unsqueeze(3))
        # A filler sees itself, so that its softmax has something to divide by; its answer counts 0.
        seen = seen | torch.eye(place.shape[2], dtype=torch.bool, device=place.device)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    @torch.no_grad()
    def to_dense(self) -> nn.MultiheadAttention:
        """Sew the heads into torch's attention (batch first); the gate is left out."""
        n, d, _ = self.w_out.shape
        like = {"device": self.w_in.device, "dtype": self.w_in.dtype}
        with torch.random.fork_rng(devices=[]):
            made = nn.MultiheadAttention(d, n, bias=self.b_in is not None, batch_first=True, **like)
        made.in_proj_weight.copy_(_all_heads(self.w_in))
        made.out_proj.weight.copy_(self.w_out.transpose(0, 1).reshape(d, d))
        if self.b_in is not None:
            made.in_proj_bias.copy_(_all_heads(self.b_in))
            made.out_proj.bias.copy_(self.b_out.sum(0))
        return made


def _by_head(t: Tensor, n: int) -> Tensor:
    """[3 d, ...] -> [n, 3 head, ...]: the rows of each head together."""
    return t.unflatten(0, (3, n, -1)).transpose(0, 1).flatten(1, 2)


def _all_heads(t: Tensor) -> Tensor:
    """The way back from `_by_head`."""
    return t.unflatten(1, (3, -1)).transpose(0, 1).flatten(0, 2)
