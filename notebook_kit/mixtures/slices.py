"""Cut feed-forward layers into slices whose sum is the layer, and sew them together again.

    dense(x) = W_down (act(W_gate x) ⊙ W_up x)        slice i: D/m hidden units, their rows of W_gate, W_up and columns
    dense(x) = W_out act(W_in x + b_in) + b_out       of W_down; so the sum of the slices is the layer, exactly

An activation looks at one hidden unit at a time, which is why the cut costs nothing. An output bias is shared evenly.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.mixtures.expert_slices import slice_experts
from notebook_kit.mixtures.swiglu import SwiGLUExperts
from notebook_kit.models import MLP
from notebook_kit.models.mlp import ACTIVATIONS


class SwiGLU(nn.Module):
    """One gated feed-forward network, with the names of transformers: gate_proj, up_proj, down_proj; no biases.

    Args:
        d_model: d.
        d_ff: hidden units.
        activation: of the gate.
    """

    def __init__(self, d_model: int, d_ff: int, *, activation: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.act_fn = activation
        for layer in (self.gate_proj, self.up_proj):
            nn.init.normal_(layer.weight, std=d_model**-0.5)
        nn.init.normal_(self.down_proj.weight, std=d_ff**-0.5)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return W_down (act(W_gate x) ⊙ W_up x)."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MLPSlices(nn.Module):
    """The slices of one feed-forward layer, stacked, so that all compute in one batched product.

    Args:
        w_in: [n, f, d], or [n, 2f, d] with gate rows before up rows.
        w_out: [n, d, f].
        b_in: [n, f] or None.
        b_out: [n, d] or None; they add up to the dense layer's.
        activation: of the hidden units, or of the gate.
    """

    def __init__(
        self,
        w_in: Float[Tensor, "n _f d"],
        w_out: Float[Tensor, "n d f"],
        b_in: Float[Tensor, "n f"] | None = None,
        b_out: Float[Tensor, "n d"] | None = None,
        *,
        activation: Callable[[Tensor], Tensor],
    ):
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(w_in), nn.Parameter(w_out)
        self.b_in = None if b_in is None else nn.Parameter(b_in)
        self.b_out = None if b_out is None else nn.Parameter(b_out)
        self.activation = activation

    @property
    def gated(self) -> bool:
        """Whether w_in holds gate rows and up rows."""
        return self.w_in.shape[1] == 2 * self.w_out.shape[2]

    def __len__(self) -> int:
        return len(self.w_in)

    def forward(self, x: Float[Tensor, "n rows d"]) -> Float[Tensor, "n rows d"]:
        """Compute rows of slice 0, of slice 1, ..., equally many of each."""
        hidden = x @ self.w_in.mT if self.b_in is None else torch.baddbmm(self.b_in[:, None], x, self.w_in.mT)
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = self.activation(gate) * up
        else:
            hidden = self.activation(hidden)
        if self.b_out is None:
            return hidden @ self.w_out.mT
        return torch.baddbmm(self.b_out[:, None], hidden, self.w_out.mT)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, layer: nn.Module, n_experts: int) -> "MLPSlices":
        """Cut a dense layer; it is left as it is.

        Args:
            layer: the kit's MLP with one hidden layer and equal ends, or gated: gate_proj, up_proj, down_proj without
                biases, as Llama has.
            n_experts: n, must divide the hidden width.

        Raises:
            ValueError: another kind of layer, or a width that n does not divide.
        """
        if isinstance(layer, MLP):
            if len(layer.layers) != 2 or layer.layers[0].in_features != layer.layers[1].out_features:
                raise ValueError("MLPSlices cuts an MLP with one hidden layer, from d to d")
            first, last = layer.layers
            width = _share(first.out_features, n_experts)
            return cls(
                first.weight.reshape(n_experts, width, -1).clone(),
                last.weight.reshape(-1, n_experts, width).transpose(0, 1).clone(),
                first.bias.reshape(n_experts, width).clone(),
                (last.bias / n_experts).repeat(n_experts, 1),
                activation=ACTIVATIONS[layer.activation],
            )
        parts = [getattr(layer, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(isinstance(part, nn.Linear) and part.bias is None for part in parts):
            raise ValueError(
                f"MLPSlices cuts the kit's MLP, or a gated layer of gate_proj, up_proj and down_proj without biases; "
                f"got {type(layer).__name__}"
            )
        gate, up, down = parts
        _share(gate.out_features, n_experts)
        whole = SwiGLUExperts(1, gate.in_features, gate.out_features, activation=layer.act_fn, empty=True)
        whole.gate_up = nn.Parameter(torch.cat([gate.weight, up.weight])[None])
        whole.down = nn.Parameter(down.weight[None].clone())
        thin = slice_experts(whole, granularity=n_experts)
        return cls(thin.gate_up.data, thin.down.data, activation=layer.act_fn)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """Sew the slices into one layer, their sum: an MLP, or a `SwiGLU` if they are gated."""
        n, d_model, f = self.w_out.shape
        like = {"device": self.w_in.device, "dtype": self.w_in.dtype}
        with torch.random.fork_rng(devices=[]):  # random weights, overwritten below
            if self.gated:
                made = SwiGLU(d_model, n * f, activation=self.activation).to(**like)
                gate, up = self.w_in.chunk(2, dim=1)
                made.gate_proj.weight.copy_(gate.reshape(n * f, d_model))
                made.up_proj.weight.copy_(up.reshape(n * f, d_model))
                made.down_proj.weight.copy_(self.w_out.transpose(0, 1).reshape(d_model, n * f))
                return made
            name = next(name for name, activation in ACTIVATIONS.items() if activation is self.activation)
            made = MLP([d_model, n * f, d_model], name).to(**like)
        first, last = made.layers
        first.weight.copy_(self.w_in.reshape(n * f, d_model))
        first.bias.copy_(self.b_in.reshape(-1))
        last.weight.copy_(self.w_out.transpose(0, 1).reshape(d_model, n * f))
        last.bias.copy_(self.b_out.sum(0))
        return made


def _share(width: int, n_experts: int) -> int:
    if n_experts < 1 or width % n_experts:
        raise ValueError(f"n_experts must divide the hidden width {width}, got {n_experts}")
    return width // n_experts
