"""Diffusion transformer: a vision transformer that is told the noise level and the class through its layer norms.

    tokens = W x_patches + position          c = time(1000 t) + label(y)          one c [d] for each image
    h₁, s₁, g₁, h₂, s₂, g₂ = W_c silu(c)                                          six vectors [d] for each block
    tokens += g₁ ⊙ Attention(LN(tokens) ⊙ (1 + s₁) + h₁)
    tokens += g₂ ⊙ FFN(LN(tokens) ⊙ (1 + s₂) + h₂)                                adaLN-Zero: W_c starts at 0

Since W_c and the last layer start at zero, a new model answers exactly 0 and every block is the identity. LN has no
weights of its own. Positions are a fixed table of sines and cosines in two dimensions. Label n_classes means "no
class": what classifier-free guidance compares with.

The FFN is `feed_forward(d_model)`: any module from [n, tokens, d] to the same; such as a mixture of experts. Record
its routing by `record_routing(model.blocks)`, whose input is [n, tokens, d].

Differences from the official code: time is in [0, 1] and multiplied by 1000 here, because the sines were made for
0..1000 (DiT-MoE's flow code forgets to); no learned variance; GELU without the tanh approximation.

Source: Peebles and Xie 2022 (2212.09748), sections 3.1 and 3.2; facebookresearch/DiT, models.py.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.models.mlp import MLP


class DiffusionTransformer(nn.Module):
    """A tiny DiT: from a noisy image, its noise level and a class to a velocity (or noise) of the image's shape.

    Args:
        size: height and width of the square images.
        channels: of the images.
        patch: side of a patch; must divide size.
        d_model: d, width of a token; a multiple of 4.
        n_blocks: blocks.
        n_heads: attention heads; must divide d_model.
        n_classes: classes; label n_classes is none of them.
        feed_forward: makes each block's FFN from d_model; None is an `MLP` of 4 d hidden units.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        size: int = 8,
        channels: int = 1,
        patch: int = 2,
        d_model: int = 48,
        n_blocks: int = 3,
        n_heads: int = 4,
        n_classes: int = 10,
        feed_forward: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        if size % patch:
            raise ValueError(f"patch must divide size={size}, got {patch} (DiffusionTransformer)")
        if d_model % 4 or d_model % n_heads:
            raise ValueError(
                f"d_model must be a multiple of 4 and of n_heads={n_heads}, got {d_model} (DiffusionTransformer)"
            )
        self.size, self.channels, self.patch, self.n_classes = size, channels, patch, n_classes
        make = feed_forward or (lambda d: MLP([d, 4 * d, d], "gelu"))
        width = patch * patch * channels
        self.read = nn.Linear(width, d_model)
        self.time = nn.Sequential(nn.Linear(2 * d_model, d_model), nn.SiLU(), nn.Linear(d_model, d_model))
        self.label = nn.Embedding(n_classes + 1, d_model)
        self.blocks = Blocks(Block(d_model, n_heads, make(d_model)) for _ in range(n_blocks))
        self.modulation = nn.Linear(d_model, 2 * d_model)
        self.write = nn.Linear(d_model, width)
        self.register_buffer("position", position_table(size // patch, d_model), persistent=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for layer in (self.label, self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.modulation, self.write, *(block.modulation for block in self.blocks)):
            nn.init.zeros_(layer.weight)

    def forward(
        self, x: Float[Tensor, "n channels size size"], t: Float[Tensor, " n"], y: Int[Tensor, " n"]
    ) -> Float[Tensor, "n channels size size"]:
        """Answer for noisy images.

        Args:
            x: images, as noisy as t says.
            t: noise level in [0, 1]; 1 is noise alone.
            y: classes from 0; n_classes is "no class".

        Raises:
            ValueError: images of another shape, another number of times or classes, or a class that does not exist.
        """
        self._check(x, t, y)
        # Times stay exact in a model of half precision.
        features = time_features(1000 * t.float(), 2 * len(self.position[0]))
        c = self.time(features.to(self.read.weight.dtype)) + self.label(y)
        tokens = self.blocks(self.read(self.patches(x)) + self.position, c)
        shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, dim=-1)
        return self.images(self.write(_normed(tokens) * (1 + scale) + shift))

    def _check(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        if tuple(x.shape[1:]) != (self.channels, self.size, self.size):
            raise ValueError(
                f"images must be [n, {self.channels}, {self.size}, {self.size}], got {list(x.shape)} "
                "(DiffusionTransformer)"
            )
        if t.shape != (len(x),) or y.shape != (len(x),):
            raise ValueError(
                f"{len(x)} images need one noise level and one class each, got {list(t.shape)} and {list(y.shape)} "
                "(DiffusionTransformer)"
            )
        if len(y) and not (0 <= int(y.min()) and int(y.max()) <= self.n_classes):
            raise ValueError(
                f"classes must be in [0, {self.n_classes}], where {self.n_classes} is none, got {int(y.min())} to "
                f"{int(y.max())} (DiffusionTransformer)"
            )

    def patches(self, x: Float[Tensor, "n channels size size"]) -> Float[Tensor, "n tokens width"]:
        """Cut images into rows of patches, each flattened."""
        p = self.patch
        return x.unflatten(2, (-1, p)).unflatten(4, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def images(self, patches: Float[Tensor, "n tokens width"]) -> Float[Tensor, "n channels size size"]:
        """Put patches together again: the inverse of `patches`."""
        side, p = self.size // self.patch, self.patch
        grid = patches.unflatten(1, (side, side)).unflatten(3, (self.channels, p, p))
        return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class Blocks(nn.ModuleList):
    """The blocks in order; all see the same condition."""

    def forward(self, tokens: Float[Tensor, "n tokens d"], c: Float[Tensor, "n d"]) -> Float[Tensor, "n tokens d"]:
        """Run tokens through all blocks."""
        for block in self:
            tokens = block(tokens, c)
        return tokens


class Block(nn.Module):
    """Attention, then the FFN, both shifted, scaled and gated by the condition.

    Args:
        d_model: d.
        n_heads: attention heads.
        feed_forward: FFN.
    """

    def __init__(self, d_model: int, n_heads: int, feed_forward: nn.Module):
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.feed_forward = feed_forward
        self.modulation = nn.Linear(d_model, 6 * d_model)

    def forward(self, tokens: Float[Tensor, "n tokens d"], c: Float[Tensor, "n d"]) -> Float[Tensor, "n tokens d"]:
        """Run tokens through the block, under condition c."""
        h1, s1, g1, h2, s2, g2 = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
        tokens = tokens + g1 * self._attend(_normed(tokens) * (1 + s1) + h1)
        return tokens + g2 * self.feed_forward(_normed(tokens) * (1 + s2) + h2)

    def _attend(self, x: Float[Tensor, "n tokens d"]) -> Float[Tensor, "n tokens d"]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def time_features(t: Float[Tensor, " n"], d: int) -> Float[Tensor, "n d"]:
    """Return cos(t ω) and sin(t ω) for d/2 frequencies ω from 1 down to almost 1/10000.

    Args:
        t: times, made for 0 to 1000.
        d: even.
    """
    omega = torch.exp(-math.log(10_000) * torch.arange(d // 2, device=t.device, dtype=torch.float32) / (d // 2))
    angle = t.float()[:, None] * omega
    return torch.cat([angle.cos(), angle.sin()], 1).to(t.dtype)


def position_table(side: int, d: int) -> Float[Tensor, "tokens d"]:
    """Return sines and cosines of the column in the first half of d, of the row in the second.

    Args:
        side: patches in a row.
        d: a multiple of 4.
    """
    omega = 10_000 ** -(torch.arange(d // 4) / (d // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * omega for place in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)
