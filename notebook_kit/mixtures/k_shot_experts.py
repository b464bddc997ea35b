"""ROCKET: K examples of a task choose experts and data from what is openly there; a mixture of them is then fine-tuned.

    p = softmax(x Gᵀ) [N]     S = the k largest     w = p_S / Σ_S p     y = W x + Σ_{i in S} w_i s_i B_i A_i x

The experts come out of `k_shot_selection`: scored on the K shots (accuracy and perplexity), shortlisted, thinned to a
diverse group. They start as they are; the gate G [N, d_in] starts random. Then both train, or the gate alone, on
the shots and the open data near them. The base is frozen, and there is no balance loss.

Limits: with k=1 the weight is the raw p (divided it would be the constant 1, and the gate would learn nothing).
Paper: Yang et al. 2024, section 3.4. The official code leaves s = alpha / r out, which is harmless as its alpha = r.
"""

import copy
from collections.abc import Sequence
from typing import Annotated

from torch import nn

from notebook_kit.adapters.read import Source
from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures.adapter_bank import attach_bank
from notebook_kit.routers import TopK


@method(family="mixtures", paper="open-knowledge")
class KShotExperts(nn.Module):
    """A mixture that starts from chosen LoRAs, ready for `fit`.

    Args:
        model: that the experts were trained on; copied and frozen.
        experts: the chosen ones, what `read_adapter` reads.
        k: experts a token; at most as many as there are.
        train: "all" trains the gates and the experts, "router" the gates alone.
        dropout: share of the entries of x that the experts do not see in training.

    Raises:
        ValueError: no expert, one that does not fit the model, or k above their number.

    Source: Yang et al. 2024, section 3.4.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: Sequence[Source],
        *,
        k: Annotated[int, Range(1, 64)] = 2,
        train: Annotated[str, Choice("all", "router")] = "all",
        dropout: Annotated[float, Range(0, 0.9)] = 0.0,
    ):
        super().__init__()
        self.model, self.k = copy.deepcopy(model), k
        n = len(experts)
        if n == 1:
            k = 1
        if n and k > n:
            raise ValueError(f"k must be at most the number of experts, {n}, got {k} (KShotExperts)")
        self.layers = attach_bank(
            self.model,
            experts,
            lambda d_in: TopK(d_in, n, k=k, normalize=k > 1, balance_coef=0.0),
            dropout=dropout,
        )
        for layer in self.layers.values():
            layer.router.requires_grad_(True)
            for factor in (layer.A, layer.B):
                factor.requires_grad_(train == "all")

    def forward(self, *inputs, **named):
        """Run the model with the mixture in it."""
        return self.model(*inputs, **named)
