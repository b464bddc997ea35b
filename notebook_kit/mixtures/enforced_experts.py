"""Enforced routing inside a pretrained encoder: every MLP becomes N copies, and a text's domain names the copy.

    out[a = e] = E_e(h[a = e])          a [B] domain of each text, h [B, L, d]; no router, weight 1

Copies start as the pretrained MLP, so right after `upcycle` nothing has changed, whatever the domain. Attention, norms
and embeddings are shared. With glu=True each copy is widened to down(act(up h) ⊙ (G h + g)) with G = 0, g = 1, which is
the old MLP too.

Source: Hallee et al. 2024; the older MoEBERT of their code also moves a LayerNorm before the block: here every norm
stays where the encoder has it.
"""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Domains:
    """The domain of each text of the present batch, shared by all layers."""

    def __init__(self):
        self.of: Tensor | None = None


class EnforcedExperts(nn.Module):
    """N copies of a module; rows of the batch are sent to the copy that `domains.of` names.

    Args:
        module: from [batch, length, d] to the same.
        n_experts: N.
        domains: shared with all layers.
    """

    def __init__(self, module: nn.Module, n_experts: int, domains: Domains):
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(module) for _ in range(n_experts))
        self.domains = domains

    def forward(self, h: Float[Tensor, "batch length d"]) -> Float[Tensor, "batch length d"]:
        a = self.domains.of
        if a is None or len(a) != len(h):
            raise ValueError(f"{len(h)} texts need a domain each: call the ContrastiveMoE, not its encoder")
        rows = [(e, (a == e).nonzero().squeeze(1)) for e in range(len(self.experts))]
        rows = [(e, chosen) for e, chosen in rows if len(chosen)]
        if not rows:
            return self.experts[0](h)
        out = torch.cat([self.experts[e](h[chosen]) for e, chosen in rows])
        return out[torch.cat([chosen for _, chosen in rows]).argsort()]


class BertMLP(nn.Module):
    """BERT's two linear maps and the activation between them as one module, optionally widened by a gate.

    Args:
        up: to the hidden units.
        activation: between.
        down: back to d.
        glu: add a gate that starts at one.
    """

    def __init__(self, up: nn.Linear, activation: nn.Module, down: nn.Linear, glu: bool):
        super().__init__()
        self.up, self.activation, self.down = up, activation, down
        self.gate = nn.Linear(up.in_features, up.out_features).to(up.weight) if glu else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.ones_(self.gate.bias)

    def forward(self, h: Tensor) -> Tensor:
        hidden = self.activation(self.up(h))
        return self.down(hidden if self.gate is None else hidden * self.gate(h))


def upcycle(
    encoder: nn.Module, n_experts: int, domains: Domains, *, layers: Sequence[int] | None = None, glu: bool = False
) -> list[int]:
    """Replace the MLPs of a BertModel or ModernBertModel by enforced experts, in place.

    Args:
        encoder: a transformers encoder.
        n_experts: N.
        domains: what the experts read.
        layers: which; None is all.
        glu: widen BERT's MLPs (ModernBERT's have a gate already).

    Returns:
        The layers that were replaced.

    Raises:
        ValueError: another kind of encoder, or no such layer.
    """
    stack = getattr(getattr(encoder, "encoder", None), "layer", None) or getattr(encoder, "layers", None)
    if stack is None or not all(hasattr(layer, "intermediate") or hasattr(layer, "mlp") for layer in stack):
        raise ValueError(f"{type(encoder).__name__} is no BertModel or ModernBertModel (ContrastiveMoE)")
    chosen = range(len(stack)) if layers is None else layers
    for index in chosen:
        if not 0 <= index < len(stack):
            raise ValueError(f"layers must be in [0, {len(stack) - 1}], got {index} (ContrastiveMoE)")
        layer = stack[index]
        if hasattr(layer, "intermediate"):
            inner = BertMLP(layer.intermediate.dense, layer.intermediate.intermediate_act_fn, layer.output.dense, glu)
            layer.intermediate, layer.output.dense = EnforcedExperts(inner, n_experts, domains), nn.Identity()
        elif glu:
            raise ValueError("glu=True is for BERT's plain MLPs, this encoder's have a gate (ContrastiveMoE)")
        else:
            layer.mlp = EnforcedExperts(layer.mlp, n_experts, domains)
    return list(chosen)


def domain_tokens(
    input_ids: Int[Tensor, "batch length"], domains: Int[Tensor, " batch"], first_id: int
) -> Int[Tensor, "batch length"]:
    """Overwrite each text's first token by the token of its domain, id first_id + domain.

    Args:
        input_ids: texts that begin with the encoder's [CLS].
        domains: of the texts.
        first_id: id of domain 0's token.
    """
    return torch.cat([(domains + first_id)[:, None].to(input_ids), input_ids[:, 1:]], 1)
