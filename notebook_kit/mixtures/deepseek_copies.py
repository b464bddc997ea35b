"""A DeepSeekMoE out of what exists: a block of transformers with shared experts, or a trained mixture of the kit.

A block's weights, router and bias are shared, not copied; the layer decides as the block's gate does. A mixture's
experts are cut into slices that tie, so that the new layer computes what the old one did.
"""

import torch
from torch import nn

from notebook_kit.mixtures.deepseek_gates import router_of
from notebook_kit.mixtures.expert_slices import slice_experts
from notebook_kit.mixtures.moe import MoE
from notebook_kit.mixtures.swiglu import SwiGLUExperts
from notebook_kit.routers import TopK


def wrap_block(cls: type[nn.Module], block: nn.Module) -> nn.Module:
    """Make a DeepSeekMoE (or subclass) that shares the weights of a transformers block; see `from_transformers`."""
    children = dict(block.named_children())
    shared = children.get("shared_experts", children.get("shared_expert"))
    gate, fused = children.get("gate"), children.get("experts")
    if shared is None or not hasattr(gate, "top_k") or not hasattr(fused, "gate_up_proj"):
        raise ValueError(
            f"{type(block).__name__} must have a `gate`, fused `experts` and `shared_experts`, it has "
            f"{', '.join(children)} (DeepSeekMoE)"
        )
    routed, d_model = gate.weight.shape
    thin, sigmoid = fused.down_proj.shape[-1], hasattr(gate, "e_score_correction_bias")
    # Qwen's shared expert may have a width of its own: then it counts as one.
    width = shared.gate_proj.out_features
    n_shared = width // thin if width % thin == 0 else 1
    with torch.random.fork_rng(devices=[]):
        made = cls(
            d_model,
            thin,
            routed + n_shared,
            k=gate.top_k + n_shared,
            granularity=1,
            n_shared=n_shared,
            scores="sigmoid" if sigmoid else "softmax",
            normalize=bool(getattr(gate, "norm_topk_prob", False)),
            routed_scaling_factor=float(getattr(gate, "routed_scaling_factor", 1.0)),
        )
    made.experts.gate_up, made.experts.down = fused.gate_up_proj, fused.down_proj
    made.experts.activation = made.shared.act_fn = fused.act_fn
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(made.shared, name).weight = getattr(shared, name).weight
    made.shared_gate = children.get("shared_expert_gate")
    made.router = router_of(gate, made.router)
    return made.train(block.training)


@torch.no_grad()
def cut_mixture(cls: type[nn.Module], moe: MoE, granularity: int) -> nn.Module:
    """Make a DeepSeekMoE of a trained mixture's experts, cut; see `from_moe`."""
    if not isinstance(moe.experts, SwiGLUExperts) or not isinstance(moe.router, TopK):
        raise ValueError(
            f"from_moe cuts SwiGLUExperts behind a TopK router, got {type(moe.experts).__name__} behind "
            f"{type(moe.router).__name__} (DeepSeekMoE)"
        )
    if moe.router.capacity_factor is not None or moe.router.eval_capacity_factor is not None:
        raise ValueError("DeepSeekMoE drops no token: the router has a capacity_factor, set it to None first")
    n_experts, d_model, width = moe.experts.down.shape
    experts = slice_experts(moe.experts, granularity=granularity)
    with torch.random.fork_rng(devices=[]):
        made = cls(
            d_model,
            width,
            n_experts,
            k=moe.router.k,
            granularity=granularity,
            n_shared=0,
            normalize=moe.router.normalize,
            routed_scaling_factor=float(granularity),
            balance_coef=min(moe.router.balance_coef * moe.router.k, 1.0),
        )
    made.experts = experts
    made.router.weight = nn.Parameter(moe.router.weight.repeat_interleave(granularity, 0))
    made.router.to(moe.router.weight.device)
    return made.train(moe.training)
