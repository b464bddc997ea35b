"""Routers that decide as the gates of transformers' blocks with shared experts do, sharing their weights and biases.

DeepSeek's gates compute their logits in float32 whatever the model's precision, Qwen2-MoE's in the model's.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.routers import LossFreeBias
from notebook_kit.routers._claims import top_k


class DeepSeekGate(LossFreeBias):
    """Scores in float32, as DeepSeek-V2's and V3's gates do."""

    def logits(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens experts"]:
        """Score every expert for every token, in float32."""
        if self.weight.dtype == torch.float32:
            return super().logits(x)
        return F.linear(x.float(), self.weight.float())


class BestOfGroup(DeepSeekGate):
    """DeepSeek-V2's group limit: a group counts by its best expert, not by its two best as in V3."""

    def _pick(self, biased: Float[Tensor, "tokens experts"]) -> Int[Tensor, "tokens k"]:
        groups = biased.unflatten(1, (self.n_group, -1))
        kept = torch.zeros(groups.shape[:2], dtype=torch.bool, device=biased.device)
        kept = kept.scatter_(1, top_k(groups.amax(2), self.topk_group), True)
        return top_k(groups.masked_fill(~kept[:, :, None], -torch.inf).flatten(1), self.k)


def router_of(gate: nn.Module, like: LossFreeBias) -> LossFreeBias:
    """Return the router that decides as a transformers gate does, sharing its weight and bias, on its device.

    Args:
        gate: of DeepSeek-V2, DeepSeek-V3 or Qwen2-MoE.
        like: has the rules for scores and weights.
    """
    v3 = hasattr(gate, "e_score_correction_bias")
    limited = v3 or getattr(gate, "topk_method", "greedy") == "group_limited_greedy"
    groups = {"n_group": gate.num_group, "topk_group": gate.topk_group} if limited else {}
    kind = LossFreeBias
    if type(gate).__name__.startswith("Deepseek"):
        kind = BestOfGroup if limited and not v3 else DeepSeekGate
    n_experts, d_model = gate.weight.shape
    rules = {name: getattr(like, name) for name in ("scores", "normalize", "routed_scaling_factor", "balance_coef")}
    with torch.random.fork_rng(devices=[]):
        made = kind(d_model, n_experts, k=gate.top_k, bias_rate=0.0, **rules, **groups).to(gate.weight.device)
    made.weight = gate.weight
    if v3:
        made.bias = gate.e_score_correction_bias
    return made
