"""DiT-MoE: the FFN of a diffusion transformer becomes a mixture of routed experts and one shared path.

    s = softmax(z W_gᵀ)   [T, E]            S_t = the k largest of s_t
    y_t = Σ_{i in S_t} s_ti E_i(z_t) + Shared(z_t)        E_i and Shared: SwiGLU without biases
    L = balance_coef Σ_i f_i P_i            f_i = E/(kT) · (tokens that picked i), P_i = mean of s_i; even load: coef

The weights are not divided by their sum, so a token's sum to less than 1. The shared path is ONE SwiGLU of width
n_shared · d (not n_shared times an expert's width) and has no gate. There is no capacity: no token loses a slot. L is
over all tokens of the batch, or for each image apart (per_image) and then averaged.

This is `DeepSeekMoE` with uncut experts and another width of the shared path. Use it as the FFN of a transformer:
`DiffusionTransformer(feed_forward=DiTMoE)`, and add `aux_loss(model)` to the loss. The official code injects L's
gradient by an autograd function of its own instead; the gradient is the same, its printed loss lacks L. There the
experts start xavier-uniform; here normal with std 1/sqrt(fan in). Inference and training take one path, sorted by
expert.

Limits. For the paper's finding that experts follow position and time, and hardly the class, see `record_denoising`.

Source: Fei et al. 2024, section 3; feizc/DiT-MoE, models.py (MoEGate, SparseMoeBlock).
"""

import math
from dataclasses import replace
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.mixtures.deepseek_moe import DeepSeekMoE
from notebook_kit.mixtures.slices import SwiGLU


@method(family="mixtures", paper="dit-moe")
class DiTMoE(DeepSeekMoE):
    """Routed gated experts beside one shared gated path, as the FFN of a diffusion transformer.

    Args:
        d_model: d.
        d_ff: hidden units of a routed expert; None is 4 d.
        n_experts: E, routed experts.
        k: experts a token.
        n_shared: the shared path has n_shared · d hidden units; 0 is no shared path.
        normalize: divide the picked scores by their sum; the paper does not.
        balance_coef: α, times the balance loss.
        per_image: balance each image apart instead of the whole batch.

    Raises:
        ValueError: k above n_experts, or a normalized single weight, which would be the constant 1.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        n_experts: Annotated[int, Range(1, 512)] = 8,
        k: Annotated[int, Range(1, 512)] = 2,
        n_shared: Annotated[int, Range(0, 16)] = 2,
        normalize: bool = False,
        balance_coef: Annotated[float, Range(0, 1)] = 0.01,
        per_image: bool = False,
    ):
        sizes = {"k": k, "granularity": 1, "n_shared": 0, "normalize": normalize, "balance_coef": balance_coef}
        super().__init__(d_model, d_ff or 4 * d_model, n_experts, **sizes)
        self.n_shared, self.per_image = n_shared, per_image
        self.shared = SwiGLU(d_model, n_shared * d_model) if n_shared else None
        nn.init.kaiming_uniform_(self.router.weight, a=math.sqrt(5))

    def forward(
        self,
        x: Float[Tensor, "*batch d_model"],
        *,
        mask: Bool[Tensor, "*batch"] | None = None,
        tokens: Int[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch d_model"]:
        """Add what the shared path and the picked experts answer; the residual is the caller's.

        Args:
            x: tokens; with per_image [n, length, d].
            mask: True for real tokens; padding is not routed, counts in no loss, and gets 0.
            tokens: not looked at.

        Raises:
            ValueError: per_image, and x has no axis of images.
        """
        y = super().forward(x, mask=mask, tokens=tokens)
        if self.per_image and self.router.balance_coef:
            if x.ndim < 3:
                raise ValueError(f"per_image needs tokens [n, length, d_model], got {list(x.shape)} (DiTMoE)")
            loss = self.router.balance_coef * image_balance_loss(
                self.routing.probs.unflatten(0, (-1, x.shape[-2])),
                self.routing.experts.unflatten(0, (-1, x.shape[-2])),
                mask=None if mask is None else mask.reshape(-1, x.shape[-2]),
            )
            self.routing = replace(self.routing, aux_loss=loss)
        return y

    @classmethod
    @torch.no_grad()
    def from_dense(cls, layer: SwiGLU, **settings) -> "DiTMoE":
        """Start from a trained dense layer: every expert is a copy of it (upcycling); the layer is left as it is.

        With normalize=True and n_shared=0 the mixture computes what the layer did.

        Args:
            layer: gated, without biases.
            settings: of `DiTMoE`.
        """
        gate, up, down = layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight
        with torch.random.fork_rng(devices=[]):
            made = cls(gate.shape[1], len(gate), **settings).to(gate.device, gate.dtype)
        experts = made.experts
        experts.gate_up.copy_(torch.cat([gate, up]).expand_as(experts.gate_up))
        experts.down.copy_(down.expand_as(experts.down))
        experts.activation = layer.act_fn
        return made.train(layer.training)

    def extra_repr(self) -> str:
        return f"n_shared={self.n_shared}, per_image={self.per_image}"


def image_balance_loss(
    probs: Float[Tensor, "n length experts"],
    experts: Int[Tensor, "n length k"],
    *,
    mask: Bool[Tensor, "n length"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over images of Σ f P, each image's f and P from its own tokens: 1 where every image uses experts evenly.

    Args:
        probs: s, rows sum to 1.
        experts: picks; -1 is none.
        mask: True for real tokens; an image without any counts 0.
    """
    n, _, n_experts = probs.shape
    real = torch.ones_like(probs[..., 0]) if mask is None else mask.to(probs.dtype)
    counts = probs.new_zeros(n, n_experts + 1)
    counts = counts.scatter_add_(1, experts.flatten(1) + 1, torch.ones_like(experts.flatten(1), dtype=probs.dtype))
    f = n_experts * counts[:, 1:] / counts[:, 1:].sum(1, keepdim=True).clamp_min(1)
    P = (probs * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp_min(1)
    return (f * P).sum(1).sum() / max(n, 1)
