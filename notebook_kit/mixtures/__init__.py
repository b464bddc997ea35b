"""Mixtures: layers that combine several experts, and how a token finds its way through them."""

from notebook_kit.mixtures.moe import MoE
from notebook_kit.mixtures.swiglu import SwiGLUExperts
from notebook_kit.routing import aux_loss

__all__ = ["MoE", "SwiGLUExperts", "aux_loss"]
