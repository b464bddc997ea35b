"""Expert merging: make a mixture of experts smaller by joining experts, with their hidden units aligned."""

from notebook_kit.expert_merging.align_experts import Aligner, average_group, expert_inputs
from notebook_kit.expert_merging.baselines import average_experts, drop_experts
from notebook_kit.expert_merging.m_smoe import expert_similarity, m_smoe, plan_m_smoe
from notebook_kit.expert_merging.plan import (
    LayerPlan,
    apply_plan,
    dominant_experts,
    group_by_similarity,
    usage_of,
)
from notebook_kit.expert_merging.view import ExpertLayer, UnknownExperts, expert_view

__all__ = [
    "Aligner",
    "ExpertLayer",
    "LayerPlan",
    "UnknownExperts",
    "apply_plan",
    "average_experts",
    "average_group",
    "dominant_experts",
    "drop_experts",
    "expert_inputs",
    "expert_similarity",
    "expert_view",
    "group_by_similarity",
    "m_smoe",
    "plan_m_smoe",
    "usage_of",
]
