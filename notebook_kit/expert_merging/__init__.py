"""Expert merging: make a mixture of experts smaller by joining experts, with their hidden units aligned."""

from notebook_kit.expert_merging.adapter_retrieval import Retrieval, refine_retrieval
from notebook_kit.expert_merging.align_experts import Aligner, average_group
from notebook_kit.expert_merging.apply import apply_plan
from notebook_kit.expert_merging.baselines import average_experts, drop_experts
from notebook_kit.expert_merging.class_gaussians import ClassGaussian, align_head, fit_gaussian
from notebook_kit.expert_merging.dynamic_skipping import Skipping, dynamic_skipping
from notebook_kit.expert_merging.fisher_average import expert_fishers, fisher_average
from notebook_kit.expert_merging.hc_smoe import hc_smoe, plan_hc_smoe
from notebook_kit.expert_merging.layout import UnknownExperts
from notebook_kit.expert_merging.m_smoe import expert_similarity, m_smoe, plan_m_smoe
from notebook_kit.expert_merging.mc_smoe import mc_smoe
from notebook_kit.expert_merging.mlp_adapter import MLPAdapter, insert_mlp_adapters
from notebook_kit.expert_merging.model_surgery import ModelSurgery, merge_with_earlier, orthogonality_loss
from notebook_kit.expert_merging.outputs import calibration_inputs, expert_inputs, output_statistics
from notebook_kit.expert_merging.plan import LayerPlan, dominant_experts, group_by_similarity, usage_of
from notebook_kit.expert_merging.reconstruction import best_subset
from notebook_kit.expert_merging.sub_moe import plan_sub_moe, sub_moe
from notebook_kit.expert_merging.subspace import merge_in_subspace, union_spectrum
from notebook_kit.expert_merging.view import ExpertLayer, expert_view
from notebook_kit.expert_merging.zipit_experts import zipit_experts

__all__ = [
    "Aligner",
    "ClassGaussian",
    "ExpertLayer",
    "LayerPlan",
    "MLPAdapter",
    "ModelSurgery",
    "Retrieval",
    "Skipping",
    "UnknownExperts",
    "align_head",
    "apply_plan",
    "average_experts",
    "average_group",
    "best_subset",
    "calibration_inputs",
    "dominant_experts",
    "drop_experts",
    "dynamic_skipping",
    "expert_fishers",
    "expert_inputs",
    "expert_similarity",
    "expert_view",
    "fisher_average",
    "fit_gaussian",
    "group_by_similarity",
    "hc_smoe",
    "insert_mlp_adapters",
    "m_smoe",
    "mc_smoe",
    "merge_in_subspace",
    "merge_with_earlier",
    "orthogonality_loss",
    "output_statistics",
    "plan_hc_smoe",
    "plan_m_smoe",
    "plan_sub_moe",
    "refine_retrieval",
    "sub_moe",
    "union_spectrum",
    "usage_of",
    "zipit_experts",
]
