"""Routers that decide as the gates of transformers' blocks with shared experts do, sharing their weights and biases."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from notebook_kit.routers import LossFreeBias


class BestOfGroup(LossFreeBias):
    """DeepSeek-V2's group limit: a group counts by its best expert, not by its two best as in V3."""

    def _pick(self, biased: Float[Tensor, "tokens experts"]) -> Int[Tensor, "tokens k"]:
        groups = biased.unflatten(1, (self.n_group, -1))
        best = groups.amax(2).topk(self.topk_group, dim=1).indices
        kept = torch.zeros(groups.shape[:2], dtype=torch.bool, device=biased.device).scatter_(1, best, True)
        limited = groups.masked_fill(~kept[:, :, None], -torch.inf).flatten(1)
        return limited.sort(dim=1, descending=True, stable=True).indices[:, : self.k]


def router_of(gate: nn.Module, like: LossFreeBias) -> LossFreeBias:
    """Return the router that decides as a transformers gate does, sharing its weight and bias.

    Args:
        gate: of DeepSeek-V2, DeepSeek-V3 or Qwen2-MoE.
        like: has the rules for scores and weights.
    """
    v3 = hasattr(gate, "e_score_correction_bias")
    limited = v3 or getattr(gate, "topk_method", "greedy") == "group_limited_greedy"
    groups = {"n_group": gate.num_group, "topk_group": gate.topk_group} if limited else {}
    kind = LossFreeBias if v3 or not limited else BestOfGroup
    n_experts, d_model = gate.weight.shape
    rules = {name: getattr(like, name) for name in ("scores", "normalize", "routed_scaling_factor", "balance_coef")}
    with torch.random.fork_rng(devices=[]):
        made = kind(d_model, n_experts, k=gate.top_k, bias_rate=0.0, **rules, **groups)
    made.weight = gate.weight
    if v3:
        made.bias = gate.e_score_correction_bias
    return made
