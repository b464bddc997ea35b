"""Mixtures: layers that combine several experts, and how a token finds its way through them."""

from notebook_kit.mixtures.adapter_bank import attach_bank, stack_prototypes
from notebook_kit.mixtures.arrow import Arrow, arrow_prototypes
from notebook_kit.mixtures.channels import channel_scores, keep_channels, split_channels
from notebook_kit.mixtures.composition_of_experts import CompositionOfExperts, PromptRoute
from notebook_kit.mixtures.contrastive_moe import ContrastiveMoE
from notebook_kit.mixtures.deepseek_moe import DeepSeekMoE
from notebook_kit.mixtures.dit_moe import DiTMoE, image_balance_loss
from notebook_kit.mixtures.enforced_experts import EnforcedExperts, domain_tokens, upcycle
from notebook_kit.mixtures.expert_aggregator import ExpertAggregator, meta_train, pretrain_aggregator
from notebook_kit.mixtures.expert_budget import Composition, agreeing_labels, compose, mean_win_rate, win_rates
from notebook_kit.mixtures.expert_serving import expert_batches, expert_cache
from notebook_kit.mixtures.expert_slices import join_experts, slice_experts
from notebook_kit.mixtures.fine_grained_losses import device_balance_loss, expert_balance_loss
from notebook_kit.mixtures.glider import Glider, character_ngrams, global_scale
from notebook_kit.mixtures.k_shot_data import nearest_data
from notebook_kit.mixtures.k_shot_experts import KShotExperts
from notebook_kit.mixtures.k_shot_selection import (
    adapter_similarity,
    answer_perplexity,
    diverse_group,
    score_adapters,
    shortlist,
)
from notebook_kit.mixtures.lora_dispatch import split_experts, stack_experts
from notebook_kit.mixtures.lora_experts import LoRAExperts, sample_labels
from notebook_kit.mixtures.loramoe import LoRAMoE, localized_balance_loss
from notebook_kit.mixtures.meta_dmoe import MetaDMoE
from notebook_kit.mixtures.meteora import MeteoRA
from notebook_kit.mixtures.moe import MoE
from notebook_kit.mixtures.mola import ALLOCATIONS, MoLA, layer_balance_loss, share_out
from notebook_kit.mixtures.mova import MoVA, MoVAAnswer
from notebook_kit.mixtures.mova_adapter import MoVAdapter, masked_gate
from notebook_kit.mixtures.mova_text import WordTokens, loss_labels, read_letters, routing_prompt, write_letters
from notebook_kit.mixtures.multi_head_routing import MultiHeadRouting
from notebook_kit.mixtures.phatgoose import Phatgoose, phatgoose_gates
from notebook_kit.mixtures.polytropon import Polytropon
from notebook_kit.mixtures.pre_gate import PreGate
from notebook_kit.mixtures.ranking_loss import mnr_loss, mnr_plus_loss, mnr_plus_targets
from notebook_kit.mixtures.read_me import ReadME
from notebook_kit.mixtures.read_me_training import alternate, train_backbone, train_router
from notebook_kit.mixtures.selective_attention import SelectiveAttention
from notebook_kit.mixtures.slices import MLPSlices, SwiGLU
from notebook_kit.mixtures.smora import SMoRA
from notebook_kit.mixtures.spawn_experts import inherit_moments, spawn_experts
from notebook_kit.mixtures.swiglu import SwiGLUExperts
from notebook_kit.mixtures.task_skills import (
    adapt_to_task,
    choose_tasks,
    folded,
    private_skills,
    share_router,
    task_weights,
)
from notebook_kit.mixtures.union_of_experts import UnionOfExperts
from notebook_kit.routing import aux_loss

__all__ = [
    "ALLOCATIONS",
    "Arrow",
    "Composition",
    "CompositionOfExperts",
    "ContrastiveMoE",
    "DeepSeekMoE",
    "DiTMoE",
    "EnforcedExperts",
    "ExpertAggregator",
    "Glider",
    "KShotExperts",
    "LoRAExperts",
    "LoRAMoE",
    "MLPSlices",
    "MetaDMoE",
    "MeteoRA",
    "MoE",
    "MoLA",
    "MoVA",
    "MoVAAnswer",
    "MoVAdapter",
    "MultiHeadRouting",
    "Phatgoose",
    "Polytropon",
    "PreGate",
    "PromptRoute",
    "ReadME",
    "SMoRA",
    "SelectiveAttention",
    "SwiGLU",
    "SwiGLUExperts",
    "UnionOfExperts",
    "WordTokens",
    "adapt_to_task",
    "adapter_similarity",
    "agreeing_labels",
    "alternate",
    "answer_perplexity",
    "arrow_prototypes",
    "attach_bank",
    "aux_loss",
    "channel_scores",
    "character_ngrams",
    "choose_tasks",
    "compose",
    "device_balance_loss",
    "diverse_group",
    "domain_tokens",
    "expert_balance_loss",
    "expert_batches",
    "expert_cache",
    "folded",
    "global_scale",
    "image_balance_loss",
    "inherit_moments",
    "join_experts",
    "keep_channels",
    "layer_balance_loss",
    "localized_balance_loss",
    "loss_labels",
    "masked_gate",
    "mean_win_rate",
    "meta_train",
    "mnr_loss",
    "mnr_plus_loss",
    "mnr_plus_targets",
    "nearest_data",
    "phatgoose_gates",
    "pretrain_aggregator",
    "private_skills",
    "read_letters",
    "routing_prompt",
    "sample_labels",
    "score_adapters",
    "share_out",
    "share_router",
    "shortlist",
    "slice_experts",
    "spawn_experts",
    "split_channels",
    "split_experts",
    "stack_experts",
    "stack_prototypes",
    "task_weights",
    "train_backbone",
    "train_router",
    "upcycle",
    "win_rates",
    "write_letters",
]
