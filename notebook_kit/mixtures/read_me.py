"""Read-ME: a trained dense language model, taken apart into a mixture whose router runs before it.

    dense layer   y = W_down a,  a = silu(W_gate x) ⊙ W_up x  [D]
    expert n      y = W_down (a ⊙ (r + s^n))         r residual, shared; s^n specific to a data domain (`keep_channels`)
    router        n(t) from the token ids alone (`PreGate`): the same n in every layer

Two forms compute the same. *Masked*: the dense weights and the masks; this one is trained (`train_router`,
`train_backbone`). *Cut*: real small matrices, the residual once and N specific ones, each token computed by its own
expert only. The share of the MLP that runs is the masks' density.

Limits. The router keeps no cache and reads the whole prefix again for every token that is generated. Layer-wise routers
(`router="layer-wise"`, a linear gate on each MLP's input) are the baseline.

Source: Cai et al. 2024, sections 3 and 4, and their fork of transformers.
"""

import copy
from typing import Annotated

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures.channels import gated_mlps
from notebook_kit.mixtures.pre_gate import PreGate
from notebook_kit.mixtures.read_me_layers import CutMLP, MaskedMLP, Plan


@method(family="mixtures", paper="read-me")
class ReadME(nn.Module):
    """A dense decoder as a mixture of experts, routed before it runs.

    Args:
        model: a transformers decoder with gated MLPs, such as LlamaForCausalLM; copied.
        kept: m, from `keep_channels`.
        router: "pre-gate" for one choice ahead of all layers, "layer-wise" for a linear gate in each.
        router_dim: width of the pre-gate, at most the model's.
        router_layers: its transformer blocks.
        router_heads: its attention heads.
        normalizer: divides the pre-gate's attention logits.

    Raises:
        ValueError: masks for another model, or a model without gated MLPs.
    """

    def __init__(
        self,
        model: nn.Module,
        kept: Bool[Tensor, "layers experts d_ff"],
        *,
        router: Annotated[str, Choice("pre-gate", "layer-wise")] = "pre-gate",
        router_dim: Annotated[int, Range(4, 4096)] = 64,
        router_layers: Annotated[int, Range(1, 12)] = 2,
        router_heads: Annotated[int, Range(1, 32)] = 2,
        normalizer: Annotated[float, Range(0.1, 100, log=True)] = 1.0,
    ):
        super().__init__()
        found = [mlp.down_proj.in_features for mlp in gated_mlps(model)]
        if found != [kept.shape[2]] * len(kept):
            raise ValueError(
                f"kept must have shape [layers, experts, d_ff] with d_ff = {found} layer by layer, got "
                f"{list(kept.shape)} (ReadME)"
            )
        self.model, self.plan = copy.deepcopy(model), Plan()
        table = model.get_input_embeddings().weight
        self.n_experts, by_layer = kept.shape[1], router == "layer-wise"
        for layer, channels in zip(self._layers(), kept, strict=True):
            gate = nn.Linear(table.shape[1], self.n_experts, device=table.device) if by_layer else None
            layer.mlp = MaskedMLP(layer.mlp, channels.to(table.device), self.plan, gate)
        shape = {"dim": router_dim, "n_layers": router_layers, "n_heads": router_heads, "normalizer": normalizer}
        self.router = None if by_layer else PreGate(table, self.n_experts, **shape).to(table.device)

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"],
        *,
        choices: Int[Tensor, "_ _"] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        use_cache: bool = False,
        **inputs,
    ):
        """Choose the experts, then run the model.

        Args:
            input_ids: token ids.
            choices: the experts, if they are known already; None asks the router.
            attention_mask: 1 for real tokens [batch, length].
            past_key_values: refused without choices: the router reads the whole prefix.
            use_cache: return the backbone's cache.
            inputs: more of the model's arguments, such as labels.

        Returns:
            What the model returns.

        Raises:
            ValueError: a cache without choices, or choices out of range.
        """
        if past_key_values is not None and choices is None and self.router is not None:
            raise ValueError(
                "the pre-gate reads the whole prefix: use_cache=False, or give choices= for the new tokens"
            )
        if (
            choices is not None
            and choices.numel()
            and not 0 <= int(choices.min()) <= int(choices.max()) < self.n_experts
        ):
            raise ValueError(f"choices must be in [0, {self.n_experts - 1}] (ReadME)")
        if choices is None and self.router is not None and not self.plan.dense:
            choices = self.choose(input_ids, attention_mask)
        self.plan.choices = choices
        more = {} if past_key_values is None else {"past_key_values": past_key_values}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **more, **inputs)

    def choose(self, input_ids: Int[Tensor, "batch length"], attention_mask: Tensor | None = None) -> Tensor:
        """Ask the pre-gate for each token's expert [batch, length]; the backbone is not needed."""
        if self.router is None:
            raise ValueError("layer-wise routers choose inside the layers: run the model and read `.choices`")
        return self.router(input_ids, None if attention_mask is None else attention_mask.bool()).argmax(-1)

    @property
    def choices(self) -> Int[Tensor, "layers batch length"]:
        """Each layer's choices in the last run."""
        return torch.stack([layer.mlp.choices for layer in self._layers()])

    @torch.no_grad()
    def generate(self, input_ids: Int[Tensor, "batch length"], *, max_new_tokens: int) -> Int[Tensor, "batch longer"]:
        """Continue a text, each time with the likeliest token; the router sees every prefix whole.

        Args:
            input_ids: the beginning.
            max_new_tokens: how many to add.
        """
        ids, new, cache = input_ids, input_ids, None
        for _ in range(max_new_tokens):
            choices = None if self.router is None else self.choose(ids)[:, -new.shape[1] :]
            output = self(new, choices=choices, past_key_values=cache, use_cache=True)
            new, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            ids = torch.cat([ids, new], 1)
        return ids

    @torch.no_grad()
    def cut(self) -> "ReadME":
        """Return a copy whose experts are real small matrices; it computes the same."""
        if any(isinstance(layer.mlp, CutMLP) for layer in self._layers()):
            raise ValueError("this ReadME is cut already")
        small = copy.deepcopy(self)
        for layer in small._layers():
            layer.mlp = CutMLP(layer.mlp)
        return small

    def _layers(self):
        return getattr(self.model, "model", self.model).layers
