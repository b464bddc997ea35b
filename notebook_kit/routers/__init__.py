"""Routers: which experts a token goes to, and with what weight. One file each, tokens in, `Routing` out."""

from notebook_kit.routers.expert_choice import ExpertChoice
from notebook_kit.routers.install import install, uninstall
from notebook_kit.routers.losses import cv_squared, load_balancing_loss, z_loss
from notebook_kit.routers.noisy_top_k import NoisyTopK
from notebook_kit.routers.reroute import reroute
from notebook_kit.routers.router import Router
from notebook_kit.routers.top_k import TopK
from notebook_kit.routing import Routing, RoutingTrace, aux_loss, record_routing

__all__ = [
    "ExpertChoice",
    "NoisyTopK",
    "Router",
    "Routing",
    "RoutingTrace",
    "TopK",
    "aux_loss",
    "cv_squared",
    "install",
    "load_balancing_loss",
    "record_routing",
    "reroute",
    "uninstall",
    "z_loss",
]
