"""`ByteMixture`: the small byte model in which routers are compared."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.mixtures import MoE
from notebook_kit.mixtures.swiglu import SwiGLUExperts
from notebook_kit.routers import Router

CONTEXT = 4  # bytes that the model sees
START = 256  # the id before the first byte


class ByteMixture(nn.Module):
    """A byte model with mixtures: it sees four bytes and guesses the next, at every position.

    Args:
        routers: one a mixture; all for the same width and number of experts.
        d_ff: hidden units of an expert.
        seed: of all weights but the routers', so that models with different routers begin alike.
    """

    def __init__(self, routers: Sequence[Router], *, d_ff: int = 64, seed: int = 0):
        super().__init__()
        d_model, n_experts = routers[0].d_model, routers[0].n_experts
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed, self.read = nn.Embedding(256 + 1, 16), nn.Linear(16 * CONTEXT, d_model)
            self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in routers)
            self.moes = nn.ModuleList(MoE(SwiGLUExperts(n_experts, d_model, d_ff), router) for router in routers)
            self.write = nn.Linear(d_model, 256)

    def forward(self, input_ids: Int[Tensor, "n length"]) -> Float[Tensor, "n length 256"]:
        """Score the next byte at every position.

        Args:
            input_ids: bytes.
        """
        seen = F.pad(input_ids, (CONTEXT - 1, 0), value=START).unfold(1, CONTEXT, 1)
        h = self.read(self.embed(seen).flatten(2))
        for norm, moe in zip(self.norms, self.moes, strict=True):
            h = h + moe(norm(h), tokens=input_ids)
        return self.write(h)

    def active_parameters(self, experts_per_token: float) -> float:
        """Parameters that one token is multiplied with: all but tables and the experts that it does not use.

        Args:
            experts_per_token: mean over the mixtures.
        """
        tables = [*self.embed.parameters()]
        tables += [
            p for moe in self.moes for m in moe.router.modules() if isinstance(m, nn.Embedding) for p in [m.weight]
        ]
        experts = [p for moe in self.moes for p in moe.experts.parameters()]
        left_out = {id(p) for p in [*tables, *experts]}
        fixed = sum(p.numel() for p in self.parameters() if id(p) not in left_out)
        return fixed + experts_per_token * sum(p.numel() for p in experts) / len(self.moes[0].experts)
