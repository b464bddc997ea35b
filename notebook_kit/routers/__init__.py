"""Routers: which experts a token goes to, and with what weight. One file each, tokens in, `Routing` out."""

from notebook_kit.routers.balanced_assignment import BalancedAssignment
from notebook_kit.routers.consistency import consistency_loss, two_pass_loss
from notebook_kit.routers.dense_to_sparse import DenseToSparse, gumbel_noise, set_step
from notebook_kit.routers.expert_choice import ExpertChoice
from notebook_kit.routers.hash_router import HashRouter
from notebook_kit.routers.install import install, uninstall
from notebook_kit.routers.k_schedule import k_schedule
from notebook_kit.routers.loss_free_bias import LossFreeBias
from notebook_kit.routers.losses import cv_squared, load_balancing_loss, z_loss
from notebook_kit.routers.mlp_slices import join_mlp, slice_mlp
from notebook_kit.routers.noisy_top_k import NoisyTopK
from notebook_kit.routers.null_experts import NullExperts, pooled_balance_loss
from notebook_kit.routers.random_router import RandomRouter, set_k
from notebook_kit.routers.reroute import reroute
from notebook_kit.routers.router import Router
from notebook_kit.routers.stable_moe import StableMoE
from notebook_kit.routers.stochastic_experts import StochasticExperts, set_path
from notebook_kit.routers.temperature_schedule import temperature_schedule
from notebook_kit.routers.top_k import TopK
from notebook_kit.routers.top_p import TopP, entropy_loss
from notebook_kit.routing import Routing, RoutingTrace, aux_loss, record_routing

__all__ = [
    "BalancedAssignment",
    "DenseToSparse",
    "ExpertChoice",
    "HashRouter",
    "LossFreeBias",
    "NoisyTopK",
    "NullExperts",
    "RandomRouter",
    "Router",
    "Routing",
    "RoutingTrace",
    "StableMoE",
    "StochasticExperts",
    "TopK",
    "TopP",
    "aux_loss",
    "consistency_loss",
    "cv_squared",
    "entropy_loss",
    "gumbel_noise",
    "install",
    "join_mlp",
    "k_schedule",
    "load_balancing_loss",
    "pooled_balance_loss",
    "record_routing",
    "reroute",
    "set_k",
    "set_path",
    "set_step",
    "slice_mlp",
    "temperature_schedule",
    "two_pass_loss",
    "uninstall",
    "z_loss",
]
