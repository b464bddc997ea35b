"""The two forms of one layer of Read-ME: dense weights behind masks, and real small matrices; they compute the same.

    masked: W_down (a ⊙ (r + s^n))        cut: W_down[:, r] a[r] + W_down[:, s^n] a[s^n]

Source: Cai et al. 2024, section 3; `LlamaMLP.apply_mask` and `LlamaMLP_moe` of their code, which can store the residual
once or within every expert (here once).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from notebook_kit.mixtures.channels import split_channels


class Plan:
    """What the layers read: the experts chosen beforehand [B, T], or None; `dense` switches all masks off."""

    def __init__(self):
        self.choices: Tensor | None = None
        self.dense = False


class MaskedMLP(nn.Module):
    """A dense gated MLP of which a token uses the channels of its expert.

    Args:
        mlp: with gate_proj, up_proj, down_proj and act_fn; used as it is.
        kept: m, the channels of each expert.
        plan: shared by all layers.
        gate: layer-wise router on the MLP's input; None reads the plan.
    """

    def __init__(self, mlp: nn.Module, kept: Bool[Tensor, "experts d_ff"], plan: Plan, gate: nn.Linear | None = None):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )
        self.register_buffer("kept", kept.clone())
        self.plan, self.gate, self.choices = plan, gate, None

    def forward(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_model"]:
        """Compute the channels of each token's expert."""
        a = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if not self.plan.dense:
            a = a * self.kept[choose(self, x)]
        return self.down_proj(a)


class CutMLP(nn.Module):
    """The same in small matrices: a shared residual, and for each expert its own channels.

    Args:
        masked: the layer to cut; its weights are copied.
    """

    def __init__(self, masked: MaskedMLP):
        super().__init__()
        residual, specific = split_channels(masked.kept)
        self.act_fn, self.plan, self.gate, self.choices = masked.act_fn, masked.plan, masked.gate, None
        self.residual = _cut(masked, residual, bias=True)
        self.experts = nn.ModuleList(_cut(masked, part, bias=False) for part in specific)

    def forward(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_model"]:
        """Compute the residual for all tokens, and each expert's channels for its own, one expert after the other."""
        choice, rows = choose(self, x).flatten(), x.flatten(0, 1)
        by_expert, order = choice.sort(stable=True)
        pieces = rows[order].split(torch.bincount(by_expert, minlength=len(self.experts)).tolist())
        own = torch.cat([self._run(part, piece) for part, piece in zip(self.experts, pieces, strict=True)])
        return (self._run(self.residual, rows).index_add(0, order, own)).view_as(x)

    def _run(self, part: nn.ModuleDict, rows: Tensor) -> Tensor:
        return part["down_proj"](self.act_fn(part["gate_proj"](rows)) * part["up_proj"](rows))


def choose(mlp: MaskedMLP | CutMLP, x: Float[Tensor, "batch length d_model"]) -> Int[Tensor, "batch length"]:
    """The experts of this layer's tokens: its own gate's, or what the plan says."""
    choice = mlp.plan.choices if mlp.gate is None or mlp.plan.choices is not None else ask(mlp.gate, x).argmax(-1)
    if choice is None or choice.shape != x.shape[:-1]:
        got = "none" if choice is None else list(choice.shape)
        raise ValueError(f"one expert for each of {list(x.shape[:-1])} tokens is needed, got {got}: call the ReadME")
    mlp.choices = choice
    return choice


def ask(gate: nn.Linear, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch experts"]:
    """A layer-wise router's scores; it keeps its own precision in a model of half precision."""
    return gate(x.to(gate.weight.dtype))


def _cut(mlp: MaskedMLP, channels: Bool[Tensor, " d_ff"], *, bias: bool) -> nn.ModuleDict:
    """Rows of gate and up, columns of down; with bias the output's too, which belongs to the residual."""
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    pieces = {
        "gate_proj": (gate.weight[channels], None if gate.bias is None else gate.bias[channels]),
        "up_proj": (up.weight[channels], None if up.bias is None else up.bias[channels]),
        "down_proj": (down.weight[:, channels], down.bias if bias else None),
    }
    return nn.ModuleDict({name: _linear(weight, vector) for name, (weight, vector) in pieces.items()})


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(1, 1, bias=bias is not None, device="meta")  # its own tensors are replaced
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made
