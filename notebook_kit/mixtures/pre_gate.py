"""A router before the model: a small causal transformer reads the token ids and chooses one expert for all layers.

    h = E[ids]     a block: h += O softmax(Q Kᵀ / normalizer) V of RMSNorm(h), causal, rotary; then
    h += W₂ silu(W₁ RMSNorm(h))     z = W RMSNorm(h)  [B, T, N]     expert = argmax z, the same index in every layer

It never sees the backbone's hidden states, so a server knows the experts of a token before it runs the model.

Source: Cai et al. 2024, section 3; `cluster_predictor_class` in their modeling_llama.py, with its script's values
(width 64, 2 layers, 2 heads, normalizer 1, which is not the usual √head). Its embedding starts as the first columns of
the model's own. Theirs caches nothing either: in generation it reads the whole prefix again.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.routing import Routing


class PreGate(nn.Module):
    """Token ids in, one expert for each token out; causal.

    Args:
        embedding: [vocabulary, d_model] of the model; its first `dim` columns are copied.
        n_experts: N.
        dim: width, at most d_model; a multiple of 2 n_heads.
        n_layers: transformer blocks.
        n_heads: attention heads.
        normalizer: divides the attention's logits.

    Raises:
        ValueError: a width that does not fit.
    """

    def __init__(
        self,
        embedding: Float[Tensor, "vocabulary d_model"],
        n_experts: int,
        *,
        dim: int = 64,
        n_layers: int = 2,
        n_heads: int = 2,
        normalizer: float = 1.0,
    ):
        super().__init__()
        if dim > embedding.shape[1] or dim % (2 * n_heads):
            raise ValueError(
                f"dim must be at most d_model={embedding.shape[1]} and a multiple of 2 n_heads={2 * n_heads}, got {dim}"
                " (PreGate)"
            )
        self.n_experts, self.dim, self.n_heads, self.normalizer = n_experts, dim, n_heads, normalizer
        self.embed = nn.Embedding.from_pretrained(embedding[:, :dim].detach().float().clone(), freeze=False)
        self.blocks = nn.ModuleList()
        for _ in range(n_layers):
            names = ("q", "k", "v", "o", "first", "second")
            block = nn.ModuleDict({name: nn.Linear(dim, dim) for name in names})
            for name in names:
                if name != "o":
                    nn.init.kaiming_uniform_(block[name].weight)
            block["before_attention"], block["before_mlp"] = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
            self.blocks.append(block)
        self.norm, self.out = nn.RMSNorm(dim, eps=1e-6), nn.Linear(dim, n_experts)
        nn.init.kaiming_uniform_(self.out.weight)

    def forward(
        self, ids: Int[Tensor, "batch length"], mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length experts"]:
        """Score the experts for every token.

        Args:
            ids: token ids.
            mask: True for real tokens; padding is not attended to. None means all are real.
        """
        h, length = self.embed(ids), ids.shape[1]
        cos, sin = _rotary(length, self.dim // self.n_heads, h)
        seen = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        if mask is not None:  # a padding row still sees itself, or its softmax would be empty
            seen = (seen & mask[:, None, None, :]) | torch.eye(length, dtype=torch.bool, device=ids.device)
        for block in self.blocks:
            x = block["before_attention"](h)
            q, k, v = (block[n](x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for n in "qkv")
            q, k = _turn(q, cos, sin), _turn(k, cos, sin)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=1 / self.normalizer)
            h = h + block["o"](y.transpose(1, 2).flatten(2))
            h = h + block["second"](F.silu(block["first"](block["before_mlp"](h))))
        return self.out(self.norm(h))

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, dim={self.dim}, n_heads={self.n_heads}, normalizer={self.normalizer:g}"


def as_routing(logits: Float[Tensor, "batch length experts"]) -> Routing:
    """Write the pre-gate's choice as a `Routing`: one expert a token with weight 1, for the routing pictures.

    Args:
        logits: z.
    """
    z = logits.detach().flatten(0, 1).float()
    experts = z.argmax(1, keepdim=True)
    return Routing(z, z.softmax(1), torch.ones_like(experts, dtype=torch.float32), experts, z.new_zeros(()))


def _rotary(length: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    speed = 10_000.0 ** (-torch.arange(0, width, 2, device=like.device) / width)
    angle = torch.arange(length, device=like.device)[:, None] * speed
    return angle.cos().repeat(1, 2).to(like.dtype), angle.sin().repeat(1, 2).to(like.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin
