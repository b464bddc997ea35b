"""MoV-Adapter: the base encoder's tokens look at the chosen vision experts through gated cross-attention.

    G = gate([T ; mean x]),  w = softmax(G where M, else -inf), the k largest kept, sum 1      M [B, K] chosen experts
    x ← x + Σ_j w_j CrossAttn_j(LN x, LN v_j);   x ← x + SelfAttn(LN x);   x ← x + SwiGLU(LN x)      each block
    x ← (x + x_base) / 2, then half the side: RegNet block, average pool, RegNet block, MLP to the language model

x [B, L, C] base tokens on a square grid, v_j [B, L, C_j] the expert's, resized to that grid, T [B, D] the question.
All output projections start at zero, so that the fused tokens are x_base at first.

Source: Zong et al. 2024, section 3.3; TempleX98/MoVA, multimodal_projector/builder.py. Theirs masks by -1e6 and runs
all cross-attentions in training; here an expert's rows are the pictures that chose it, and only these are computed.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.mixtures.grid_attention import GridAttention, zero


def masked_gate(
    logits: Float[Tensor, "batch experts"], mask: Bool[Tensor, "batch experts"], k: int
) -> Float[Tensor, "batch experts"]:
    """Softmax over the chosen experts, the k largest kept, sum one; zeros where nothing is chosen.

    Args:
        logits: G.
        mask: M, from the coarse routing.
        k: experts kept at most.
    """
    z = logits.float()
    # The least number and not -inf: a row without an expert would have NaN gradients.
    probs = z.masked_fill(~mask, torch.finfo(z.dtype).min).softmax(-1).where(mask, 0)
    top, place = probs.sort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(probs).scatter(1, place[:, :k], top[:, :k])
    return kept / kept.sum(1, keepdim=True).clamp(min=1e-20)


class AdapterBlock(nn.Module):
    """One block: gate, a cross-attention for each expert, self-attention, SwiGLU.

    Args:
        d_model: C.
        expert_widths: C_j.
        d_text: D.
        grid: tokens along a side.
        k: experts kept.
        n_heads: of every attention.
        gate_text: let the question into the gate.
    """

    def __init__(
        self, d_model: int, expert_widths: Sequence[int], d_text: int, grid: int, k: int, n_heads: int, gate_text: bool
    ):
        super().__init__()
        self.k, self.gate_text, n = k, gate_text, len(expert_widths)
        self.gate = nn.Sequential(nn.Linear(d_text + d_model, d_model), nn.GELU(), zero(nn.Linear(d_model, n)))
        self.cross = nn.ModuleList(GridAttention(d_model, width, n_heads, grid) for width in expert_widths)
        self.norm_x = nn.ModuleList(nn.LayerNorm(d_model) for _ in expert_widths)
        self.norm_v = nn.ModuleList(nn.LayerNorm(width) for width in expert_widths)
        self.attention = GridAttention(d_model, d_model, n_heads, grid)
        self.norms, hidden = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(2)), 8 * d_model // 3
        self.up, self.norm_hidden = nn.Linear(d_model, 2 * hidden), nn.LayerNorm(hidden)
        self.down = zero(nn.Linear(hidden, d_model))

    def forward(self, x: Tensor, features: Sequence[Tensor], mask: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        question = text if self.gate_text else torch.zeros_like(text)
        w = masked_gate(self.gate(torch.cat([question, x.mean(1)], -1)), mask, self.k).to(x.dtype)
        y = torch.zeros_like(x)
        for j, value in enumerate(features):
            rows = mask[:, j].nonzero().squeeze(1)
            if len(rows):
                seen = self.cross[j](self.norm_x[j](x[rows]), self.norm_v[j](value))
                y = y.index_add(0, rows, w[rows, j, None, None] * seen)
        x = x + y
        h = self.norms[0](x)
        x = x + self.attention(h, h)
        gate, up = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(self.norm_hidden(F.silu(gate) * up)), w


class MoVAdapter(nn.Module):
    """Blocks that fuse the experts into the base tokens, then fewer tokens for the language model.

    Args:
        d_model: C.
        expert_widths: C_j, one for each expert.
        d_text: D, width of the question's vector.
        d_out: width of the language model.
        grid: base tokens along a side, even.
        k: experts kept.
        n_blocks: of the fusion.
        n_heads: of every attention.
        gate_text: let the question into the gate.

    Raises:
        ValueError: an odd grid, or heads that do not fit the width.
    """

    def __init__(
        self,
        d_model: int,
        expert_widths: Sequence[int],
        d_text: int,
        d_out: int,
        grid: int,
        *,
        k: int = 3,
        n_blocks: int = 3,
        n_heads: int = 2,
        gate_text: bool = True,
    ):
        super().__init__()
        if grid % 2:
            raise ValueError(f"grid must be even to be halved, got {grid} (MoVAdapter)")
        shape = (d_model, expert_widths, d_text, grid, k, n_heads, gate_text)
        self.blocks, self.grid = nn.ModuleList(AdapterBlock(*shape) for _ in range(n_blocks)), grid
        self.position = nn.Parameter(torch.zeros(grid * grid, d_model))
        self.downsample = nn.Sequential(RegBlock(d_model), nn.AvgPool2d(2), RegBlock(d_model))
        self.out = nn.Sequential(nn.Linear(d_model, d_out), nn.GELU(), nn.Linear(d_out, d_out))

    def fuse(
        self,
        x: Float[Tensor, "batch length d_model"],
        features: Sequence[Tensor],
        mask: Bool[Tensor, "batch experts"],
        text: Float[Tensor, "batch d_text"],
    ) -> tuple[Float[Tensor, "batch length d_model"], Float[Tensor, "blocks batch experts"]]:
        """Fuse the chosen experts' tokens into the base tokens.

        Args:
            x: base tokens.
            features: for each expert the tokens [rows, length, C_j] of the pictures that chose it, in order.
            mask: M.
            text: T.

        Returns:
            Fused tokens, and the gates of every block.
        """
        base, gates = x, []
        x = x + self.position
        for block in self.blocks:
            x, w = block(x, features, mask, text)
            gates.append(w)
        return (x + base) / 2, torch.stack(gates)

    def forward(self, x: Tensor, features: Sequence[Tensor], mask: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens for the language model [batch, length / 4, d_out], and the gates."""
        x, gates = self.fuse(x, features, mask, text)
        picture = x.mT.reshape(len(x), x.shape[2], self.grid, self.grid)
        return self.out(self.downsample(picture).flatten(2).mT), gates


class RegBlock(nn.Module):
    """A residual block of RegNet: 1 x 1, 3 x 3 by channel, squeeze and excite, 1 x 1; the identity at first.

    Args:
        d: channels.
    """

    def __init__(self, d: int):
        super().__init__()
        self.into, self.space = nn.Conv2d(d, d, 1), nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.squeeze, self.excite = nn.Conv2d(d, max(1, d // 4), 1), nn.Conv2d(max(1, d // 4), d, 1)
        self.back, self.norms = nn.Conv2d(d, d, 1), nn.ModuleList(nn.GroupNorm(1, d) for _ in range(3))
        nn.init.zeros_(self.norms[2].weight)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norms[0](self.into(x)))
        h = F.silu(self.norms[1](self.space(h)))
        h = h * self.excite(F.silu(self.squeeze(h.mean((2, 3), keepdim=True)))).sigmoid()
        return x + self.norms[2](self.back(h))
