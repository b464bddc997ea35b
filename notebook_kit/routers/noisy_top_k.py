"""Noisy top-k: learned noise on the logits lets tokens try other experts; two losses even out weights and load.

    H_t = z_t + ε ⊙ σ_t,   z = x Wᵀ,   σ = softplus(x Wₙᵀ) + noise_floor,   ε ~ N(0, 1)                  [T, N]
    G_t = softmax over the k largest of H_t, 0 elsewhere                                (equations 3 to 5)
    importance_i = Σ_t G_ti          load_i = Σ_t Φ((z_ti - θ_ti) / σ_ti)               (equations 6, 8, 9)
    loss = importance_coef CV²(importance) + load_coef CV²(load)

θ_ti is what expert i must exceed to be picked: the k-th largest entry of H_t without entry i. Φ, the normal
distribution function, makes the load smooth: it is the chance that i is picked if its noise alone is drawn again.
W and Wₙ start at 0, so at first every expert is equally likely. In evaluation there is no noise and the load is a
count. The paper has no noise_floor; fastmoe adds 1e-2, which also keeps the division safe.

Source: Shazeer et al. 2017, section 4 and appendix A. (Coefficients: 0.1 each in the paper's translation models.)
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.routers._claims import top_k
from notebook_kit.routers.losses import cv_squared
from notebook_kit.routers.router import Router
from notebook_kit.routing import Routing


@method(family="routers", paper="sparsely-gated-moe")
class NoisyTopK(Router):
    """Each token takes the k best experts after noise of learned size; weights are a softmax over the k.

    Args:
        d_model: width of the tokens.
        n_experts: N.
        k: experts a token, at least 2 for a gradient through the weights.
        importance_coef: times CV² of the experts' summed weights.
        load_coef: times CV² of the smooth load.
        noise_floor: smallest standard deviation of the noise.

    Raises:
        ValueError: k > n_experts, or k = 1, whose weight is the constant 1.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        k: Annotated[int, Range(1, 512)] = 2,
        importance_coef: Annotated[float, Range(0, 1)] = 0.1,
        load_coef: Annotated[float, Range(0, 1)] = 0.1,
        noise_floor: Annotated[float, Range(1e-4, 1, log=True)] = 1e-2,
    ):
        super().__init__(d_model, n_experts)
        self.check_k(k)
        if k == 1 and n_experts > 1:
            raise ValueError("k=1 makes every weight the constant 1, with no gradient from the task (NoisyTopK)")
        self.k, self.importance_coef, self.load_coef, self.noise_floor = k, importance_coef, load_coef, noise_floor
        nn.init.zeros_(self.weight)  # W
        self.noise_weight = nn.Parameter(torch.zeros(n_experts, d_model))  # Wₙ

    def forward(self, x: Float[Tensor, "tokens d_model"], *, mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Route tokens, with noise in training.

        Args:
            x: tokens.
            mask: True for real tokens.
        """
        z = self.logits(x)
        if not self.training:
            return self.route(z, mask=mask)
        sigma = F.softplus(F.linear(x.to(z.dtype), self.noise_weight.to(z.dtype))).float() + self.noise_floor
        return self.route(z, mask=mask, sigma=sigma)

    def route(
        self,
        logits: Float[Tensor, "tokens experts"],
        *,
        mask: Bool[Tensor, " tokens"] | None = None,
        sigma: Float[Tensor, "tokens experts"] | None = None,
    ) -> Routing:
        """Decide from the logits.

        Args:
            logits: z, without noise.
            mask: True for real tokens.
            sigma: standard deviation of the noise; None is no noise.
        """
        self.check_logits(logits, mask)
        z = logits.float()
        h = z if sigma is None else z + torch.randn_like(z) * sigma
        experts = top_k(h.detach(), self.k)
        weights = h.gather(1, experts).softmax(1)
        real = torch.ones(len(z), 1, dtype=torch.bool, device=z.device) if mask is None else mask[:, None]
        weights, experts = weights * real, experts.where(real, -1)
        # importance: Σ_t G_ti
        importance = z.new_zeros(self.n_experts + 1).index_add(0, experts.reshape(-1) + 1, weights.reshape(-1))[1:]
        if sigma is None:
            load = torch.bincount(experts.reshape(-1) + 1, minlength=self.n_experts + 1)[1:].float()
        else:
            load = (self._chance(z, h, sigma) * real).sum(0)
        loss = self.importance_coef * cv_squared(importance) + self.load_coef * cv_squared(load)
        return Routing(logits, z.softmax(1), weights, experts, loss)

    def _chance(self, z: Tensor, h: Tensor, sigma: Tensor) -> Float[Tensor, "tokens experts"]:
        """P_ti = Φ((z_ti - θ_ti) / σ_ti)."""
        if self.k == self.n_experts:
            return torch.ones_like(z)
        best = h.topk(self.k + 1, dim=1).values
        # Without entry i the k-th largest is the (k+1)-th if i is among the k, else the k-th.
        theta = torch.where(h >= best[:, -2:-1], best[:, -1:], best[:, -2:-1])
        return torch.special.ndtr((z - theta) / sigma)
