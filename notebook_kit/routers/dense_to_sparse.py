"""Dense to sparse: a Gumbel softmax over all experts that cools while the model trains, until few experts are left.

    z = x Wᵀ  [T, N]     G ~ Gumbel(0, 1)  [T, N]     g = softmax((z + G) / τ)     τ falls with the training step
    soft stage: S_t = { i : g_ti > threshold }, and always the largest        hard stage: S_t = { argmax_i g_ti }
    y_t = Σ_{i in S_t} w_ti E_i(x_t)      w_ti = softmax(z_t)_i, or g_ti with gumbel_weights; not divided by their sum
    loss = balance_coef N Σ_i (mean_t w_ti)(mean_t 1[i in S_t])

Hot, every expert sees every token and all of them learn. Cold, g is nearly one-hot, and the largest of z + G is a draw
from softmax(z). Evaluation: the most probable expert alone with weight softmax(z)_i, no noise.

The loss is N for a flat dense gate (w = 1/N). For one expert a token with weight 1 it is 1 if the load is even, and N
if one expert has everything.

Limits. The compute of the soft stage has no upper bound, and no capacity. The temperature follows `step`, which you
tell it: `set_step(model, step)` in the training loop. Noise is a function of seed, number of the training call and
shape, so a layer that recomputes its forward pass (activation checkpointing) draws anew.

Source: Nie et al. 2021, section 4; `topkgate.py` and `top1gate.py` of their fairseq fork. Differences: where no g
exceeds the threshold their token gets no expert, here it keeps the largest. Their option that switches to hard defaults
to -1 and is compared by >=, so with their defaults the gate is hard from the first step; None here is never. A later
port (in SMoE-Dropout's repository) takes the batch's mean |S_t| as one k for all tokens.
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routers._claims import best_first, top_k
from notebook_kit.routers.router import Router
from notebook_kit.routers.temperature_schedule import temperature_schedule
from notebook_kit.routing import Routing


@method(family="routers", paper="evomoe")
class DenseToSparse(Router):
    """Each token takes every expert whose noisy gate exceeds a threshold; a falling temperature makes them fewer.

    Args:
        d_model: width of the tokens.
        n_experts: N.
        temperature: τ at step 0.
        final_temperature: τ at step `steps` and after.
        decay: how it falls, as in `temperature_schedule`.
        steps: D, length of the cooling.
        threshold: c, gates at or below it are cut; 0 is the dense gate, 1 leaves the largest only.
        switch_to_hard: from this step on the largest gate only; None is never.
        gumbel_weights: weigh by the noisy gates g, and not by softmax(z).
        evaluation: "top-1", or "dense": as in training without noise.
        balance_coef: times the balance loss.
        seed: of the noise.

    Raises:
        ValueError: a final temperature above the first.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        temperature: Annotated[float, Range(0.01, 20, log=True)] = 2.0,
        final_temperature: Annotated[float, Range(0.01, 20, log=True)] = 0.3,
        decay: Annotated[str, Choice("exponential", "linear", "constant")] = "exponential",
        steps: Annotated[int, Range(1, 10_000_000, log=True)] = 1000,
        threshold: Annotated[float, Range(0.0, 1.0)] = 1e-3,
        switch_to_hard: Annotated[int | None, Range(0, 10_000_000)] = None,
        gumbel_weights: bool = False,
        evaluation: Annotated[str, Choice("top-1", "dense")] = "top-1",
        balance_coef: Annotated[float, Range(0, 1)] = 0.01,
        seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
    ):
        super().__init__(d_model, n_experts)
        self.schedule = {"temperature": temperature, "final_temperature": final_temperature, "decay": decay}
        self.steps, self.threshold, self.switch_to_hard = steps, threshold, switch_to_hard
        self.gumbel_weights, self.evaluation = gumbel_weights, evaluation
        self.balance_coef, self.seed = balance_coef, seed
        self.step = self.calls = 0
        temperature_schedule(0, steps, **self.schedule)

    @property
    def temperature(self) -> float:
        """τ at the present step."""
        return temperature_schedule(self.step, self.steps, **self.schedule)

    @property
    def hard(self) -> bool:
        """Whether only the largest gate counts at the present step."""
        return self.switch_to_hard is not None and self.step >= self.switch_to_hard

    def forward(self, x: Float[Tensor, "tokens d_model"], *, mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Route tokens, with noise in training.

        Args:
            x: tokens.
            mask: True for real tokens.
        """
        z = self.logits(x)
        if not self.training:
            return self.route(z, mask=mask)
        noise = gumbel_noise(z, seed=(self.seed * 1_000_003 + self.calls) % 2**32)
        self.calls += 1
        return self.route(z, mask=mask, noise=noise)

    def route(
        self,
        logits: Float[Tensor, "tokens experts"],
        *,
        mask: Bool[Tensor, " tokens"] | None = None,
        noise: Float[Tensor, "tokens experts"] | None = None,
    ) -> Routing:
        """Decide from the logits; in training at the present temperature.

        Args:
            logits: z, without noise.
            mask: True for real tokens.
            noise: G, from `gumbel_noise`; None is no noise.
        """
        self.check_logits(logits, mask)
        z = logits.float()
        p = z.softmax(1)
        gates, single = p, self.hard
        if not self.training and self.evaluation == "top-1":
            single = True
        else:
            h = (z if noise is None else z + noise) / self.temperature
            # No gate below e^-80 / N: threshold 0 stays dense, and subnormal numbers would make softmax much slower.
            gates = (h - h.detach().amax(1, keepdim=True)).clamp_min(-80.0).softmax(1)
        experts = best = top_k(gates.detach(), 1)
        if not single:
            active = (gates.detach() > self.threshold).scatter_(1, best, True)
            experts = best_first(active, gates.detach())
        if mask is not None:
            experts = experts.where(mask[:, None], -1)
        weights = (gates if self.gumbel_weights else p).gather(1, experts.clamp_min(0)) * (experts >= 0)
        return Routing(logits, gates, weights, experts, self.balance_coef * balance(weights, experts, z.shape[1], mask))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature:g}, threshold={self.threshold:g}"


def gumbel_noise(like: Float[Tensor, "tokens experts"], *, seed: int) -> Float[Tensor, "tokens experts"]:
    """Draw G = -log E with E exponential, as `torch.nn.functional.gumbel_softmax` does; the same seed, the same noise.

    Args:
        like: gives shape and device.
        seed: of a generator of its own.
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    return -torch.empty_like(like, dtype=torch.float32).exponential_(generator=generator).log()


def balance(weights: Tensor, experts: Tensor, n_experts: int, mask: Tensor | None = None) -> Float[Tensor, ""]:
    """N Σ_i (mean weight of i)(share of tokens that use i), over real tokens."""
    n_tokens = max(len(weights) if mask is None else int(mask.sum()), 1)
    slots = experts.reshape(-1) + 1  # unused ones are column 0
    mean = weights.new_zeros(n_experts + 1).index_add(0, slots, weights.reshape(-1))[1:] / n_tokens
    share = torch.bincount(slots, minlength=n_experts + 1)[1:] / n_tokens
    return n_experts * (mean @ share)


def set_step(model: nn.Module, step: int) -> int:
    """Tell every dense-to-sparse router of a model which step of training it is.

    Args:
        model: holds `DenseToSparse` routers, in `MoE` layers or installed.
        step: from 0.

    Returns:
        How many routers were told.

    Raises:
        ValueError: there is none, or a negative step.
    """
    routers = [module for module in model.modules() if isinstance(module, DenseToSparse)]
    if not routers or step < 0:
        found = f"step {step}" if routers else f"no DenseToSparse router in {type(model).__name__}"
        raise ValueError(f"set_step needs a router and a step of at least 0, got {found}")
    for router in routers:
        router.step = step
    return len(routers)
