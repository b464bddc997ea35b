"""Attention between two sets of tokens on one square grid, told where each token lies by turning queries and keys.

    a pair of numbers of q or k, at row i and column j, is turned by the angle i ω (the first half of the pairs)
    or j ω (the second half),  ω = 10000^(-m / M) for m = 0 .. M - 1,  M = head width / 4

So a score depends on how far apart two tokens lie in each direction. The output projection starts at zero.

Source: the cross-attention of Zong et al. 2024 (MoVA), with rotary positions after Su et al. 2021 (2104.09864).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class GridAttention(nn.Module):
    """Attention between two sets of tokens on one square grid, with rotary positions in both directions.

    Args:
        d_query: C.
        d_value: width of the tokens that are looked at.
        n_heads: C / n_heads must be a multiple of 4.
        grid: tokens along a side.
    """

    def __init__(self, d_query: int, d_value: int, n_heads: int, grid: int):
        super().__init__()
        if d_query % (4 * n_heads):
            raise ValueError(f"the width {d_query} must be a multiple of 4 n_heads = {4 * n_heads} (MoVAdapter)")
        self.n_heads = n_heads
        self.q, self.k = nn.Linear(d_query, d_query, bias=False), nn.Linear(d_value, d_query, bias=False)
        self.v, self.norm = nn.Linear(d_value, d_query, bias=False), nn.LayerNorm(d_query)
        self.out = zero(nn.Linear(d_query, d_query))
        quarter = d_query // n_heads // 4
        angles = torch.arange(grid)[:, None] * 10000 ** -(torch.arange(quarter) / quarter)
        down, right = angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)
        angles = torch.cat([down, right], -1).reshape(grid * grid, -1)
        # Not the angles: one of 47 would be off by up to 0.1 in bfloat16.
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Float[Tensor, "b l c"], value: Float[Tensor, "b l cv"]) -> Float[Tensor, "b l c"]:
        b, length, c = x.shape
        split = (b, length, self.n_heads, c // self.n_heads)
        q, k, v = (t.view(split).transpose(1, 2) for t in (self.q(x), self.k(value), self.v(value)))
        y = F.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v)
        return self.out(self.norm(y.transpose(1, 2).reshape(b, length, c)))

    def _rotate(self, t: Tensor) -> Tensor:
        cos, sin = self.cos.to(t), self.sin.to(t)
        even, odd = t[..., ::2], t[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def zero(layer: nn.Linear) -> nn.Linear:
    """Set a layer's weight and bias to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
