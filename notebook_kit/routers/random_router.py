"""SMoE-Dropout: a random router that is never trained, over the slices of one wide network, with k rising in training.

    z = x Rᵀ + b   [T, N]      R, b drawn once and frozen
    S = the k largest of z     g = softmax(z_S)     y = Σ_S g_i E_i(x)

No loss, no capacity. The same token always ranks the experts alike, so its experts at k are among those at k + 1. While
k rises from k_min to k_max (`k_schedule`), a token's gradient reaches k of the N experts, as dropout would have it;
afterwards the same weights serve any k: `set_k(model, k)`.

R and b are buffers: no optimiser sees them, weight decay neither. `frozen=False` makes them parameters, for comparison.
Installed into a trained model, the router is random all the same: the trained gate's weights play no part.

Limits. With k = 1 the weight is the constant 1. The weights sum to 1 at every k, so the output is a mean of experts
and not their sum, also at k = N ("dense inference").

Source: Chen et al. 2023, section 3; k in their code from `calculate_gate_number` (linear_increase and others).
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.routers._claims import top_k
from notebook_kit.routers.router import Router
from notebook_kit.routing import Routing


@method(family="routers", paper="smoe-dropout")
class RandomRouter(Router):
    """Each token takes the k experts that a fixed random projection ranks first; weights are a softmax over the k.

    Args:
        d_model: width of the tokens.
        n_experts: N.
        k: experts a token; may be set anew at any time, see `set_k`. None is all N.
        seed: of R and b; give each layer its own (`install` adds the layer's number).
        frozen: keep R and b as they were drawn; False lets them learn.

    Raises:
        ValueError: k > n_experts.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        k: Annotated[int | None, Range(1, 512)] = None,
        seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
        frozen: bool = True,
    ):
        super().__init__(d_model, n_experts)
        self.register_parameter("weight", None)  # what a trained gate would have
        self.k, self.frozen = k, frozen
        generator, bound = torch.Generator().manual_seed(seed), d_model**-0.5
        # R and b as nn.Linear draws them
        drawn = {"projection": (n_experts, d_model), "bias": (n_experts,)}
        for name, shape in drawn.items():
            values = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
            values = values.to(torch.get_default_device())
            self.register_buffer(name, values) if frozen else setattr(self, name, nn.Parameter(values))

    @property
    def k(self) -> int:
        """Experts a token uses now."""
        return self._k

    @k.setter
    def k(self, k: int | None) -> None:
        k = self.n_experts if k is None else k
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k} (RandomRouter)")
        self.check_k(k)
        self._k = int(k)

    def logits(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens experts"]:
        """Score every expert at random, but alike for the same token."""
        if x.shape[-1] != self.d_model:
            raise ValueError(f"tokens must have width d_model={self.d_model}, got {x.shape[-1]} ({self._name})")
        return nn.functional.linear(x.to(self.projection.dtype), self.projection, self.bias)

    def route(self, logits: Float[Tensor, "tokens experts"], *, mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Decide from the logits.

        Args:
            logits: z.
            mask: True for real tokens.
        """
        self.check_logits(logits, mask)
        z = logits.float()
        experts = top_k(z.detach(), self.k)
        weights = z.gather(1, experts).softmax(1)
        if mask is not None:
            weights, experts = weights * mask[:, None], experts.where(mask[:, None], -1)
        return Routing(logits, z.softmax(1), weights, experts, z.new_zeros(()))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}, frozen={self.frozen}"


def set_k(model: nn.Module, k: int) -> int:
    """Let every random router of a model use k experts: a step of training's schedule, or a thinner model afterwards.

    Args:
        model: holds `RandomRouter`s.
        k: experts a token.

    Returns:
        How many routers were set.

    Raises:
        ValueError: there is none, or k is out of range for one of them (then none is changed).
    """
    routers = [module for module in model.modules() if isinstance(module, RandomRouter)]
    if not routers:
        raise ValueError(f"no RandomRouter in {type(model).__name__}: nothing to set k={k} on")
    for router in routers:
        router.check_k(k)
    for router in routers:
        router.k = k
    return len(routers)
