"""THOR: no gate at all. Each training step draws one expert a layer, and any path through the experts must serve.

    training: i ~ U{1..N}, one draw for the whole call        y = E_i(x)

| inference | each token's experts                             | cost       |
|-----------|--------------------------------------------------|------------|
| token     | its own draw in each layer                       | one expert |
| sentence  | one draw a sequence in each layer                | one expert |
| ensemble  | all N, weight 1 / N                              | N experts  |
| fixed     | expert `path` for all                            | one expert |

Two training passes draw independently, and `consistency_loss` makes them agree, so the experts teach one another.
There is nothing to balance: draws are even.

Draws come from a generator of the router's own, so that `seed` makes a path repeatable and nothing else is disturbed.
Each layer needs a seed of its own (`install` adds the layer's number), or all layers would draw alike.

Limits. "sentence" must know the sequences: `MoE` tells them for inputs [n, length, d] (of [n, d] every row is one); a
gate of transformers sees rows only, so choose another rule there. Routing the same tokens twice gives other draws.

Source: Zuo et al. 2021, section 3; their code computes all experts at inference and masks. Its "sentence level" draws a
vector as long as the sentence for tensors [time, batch, d], so one draw a time step, shared by the batch; here it is
one a sentence.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routers.router import Router
from notebook_kit.routing import Routing


@method(family="routers", paper="thor")
class StochasticExperts(Router):
    """Training sends all tokens of a call to one expert drawn at random; inference follows a rule without a gate.

    Args:
        d_model: width of the tokens.
        n_experts: N.
        inference: how experts are found in evaluation: "token", "sentence", "ensemble" or "fixed".
        path: the expert of "fixed", from 0.
        seed: of the draws.

    Raises:
        ValueError: path >= n_experts.
    """

    by_sequence = True  # `route` can use the number of each row's sequence

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        inference: Annotated[str, Choice("token", "sentence", "ensemble", "fixed")] = "token",
        path: Annotated[int, Range(0, 511)] = 0,
        seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
    ):
        super().__init__(d_model, n_experts)
        self.register_parameter("weight", None)
        if path >= n_experts:
            raise ValueError(f"path must be below n_experts={n_experts}, got {path} (StochasticExperts)")
        self.inference, self.path, self.generator = inference, path, torch.Generator().manual_seed(seed)

    def logits(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens experts"]:
        """No opinion: 0 for every expert."""
        if x.shape[-1] != self.d_model:
            raise ValueError(f"tokens must have width d_model={self.d_model}, got {x.shape[-1]} ({self._name})")
        return x.new_zeros(len(x), self.n_experts)

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        *,
        mask: Bool[Tensor, " tokens"] | None = None,
        sequences: Int[Tensor, " tokens"] | None = None,
    ) -> Routing:
        """Route tokens.

        Args:
            x: tokens.
            mask: True for real tokens.
            sequences: number of each token's sequence, from 0.
        """
        return self.route(self.logits(x), mask=mask, sequences=sequences)

    def route(
        self,
        logits: Float[Tensor, "tokens experts"],
        *,
        mask: Bool[Tensor, " tokens"] | None = None,
        sequences: Int[Tensor, " tokens"] | None = None,
    ) -> Routing:
        """Draw experts; of the logits only the number of tokens counts.

        Args:
            logits: z.
            mask: True for real tokens.
            sequences: number of each token's sequence, from 0; only "sentence" needs it.

        Raises:
            ValueError: "sentence" without sequences.
        """
        self.check_logits(logits, mask)
        experts = self._draw(len(logits), sequences).to(logits.device)
        if mask is not None:
            experts = experts.where(mask[:, None], -1)
        probs = torch.full_like(logits, 1 / self.n_experts, dtype=torch.float32)
        weights = (experts >= 0).float() / experts.shape[1]
        return Routing(logits, probs, weights, experts, probs.new_zeros(()))

    def _draw(self, n_tokens: int, sequences: Tensor | None) -> Int[Tensor, "tokens k"]:
        if self.training:
            return self._uniform(1).expand(n_tokens, 1)
        if self.inference == "fixed":
            return torch.full((n_tokens, 1), self.path)
        if self.inference == "ensemble":
            return torch.arange(self.n_experts).expand(n_tokens, -1)
        if self.inference == "token":
            return self._uniform(n_tokens)[:, None]
        if sequences is None:
            raise ValueError(
                'inference="sentence" needs to know which tokens are one sequence: call the layer through MoE with '
                '[n, length, d], give sequences=, or choose "token", "ensemble" or "fixed" (StochasticExperts)'
            )
        n_sequences = int(sequences.max()) + 1 if len(sequences) else 0
        return self._uniform(n_sequences)[sequences.cpu()][:, None]

    def _uniform(self, n: int) -> Int[Tensor, " n"]:
        return torch.randint(self.n_experts, (n,), generator=self.generator, device="cpu")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, inference={self.inference!r}"


def set_path(model: nn.Module, path: Sequence[int] | str) -> list[StochasticExperts]:
    """Choose how a model's stochastic layers find their experts in evaluation.

    Args:
        model: holds `StochasticExperts`.
        path: an expert for each such layer, in the model's order; or a rule, such as "ensemble".

    Returns:
        The routers that were set.

    Raises:
        ValueError: no such layer, another number of experts than layers, an expert or rule that is not there.
    """
    routers = [module for module in model.modules() if isinstance(module, StochasticExperts)]
    rules = ("token", "sentence", "ensemble", "fixed")
    if isinstance(path, str):
        if not routers or path not in rules:
            raise ValueError(f"path must be one of {', '.join(rules)} for a model with layers, got {path!r} (set_path)")
        for router in routers:
            router.inference = path
        return routers
    if not routers or len(path) != len(routers):
        raise ValueError(f"a path needs one expert for each of the {len(routers)} layers, got {len(path)} (set_path)")
    for expert, router in zip(path, routers, strict=True):
        if not 0 <= expert < router.n_experts:
            raise ValueError(f"experts of a path must be in [0, {router.n_experts - 1}], got {expert} (set_path)")
    for expert, router in zip(path, routers, strict=True):
        router.inference, router.path = "fixed", int(expert)
    return routers
