"""Phatgoose: every expert brings a gate that it learned alone, and the gates are compared when experts meet.

    alone     y = W u + σ(v · u) s B A u            v [d_in] from 0, everything else frozen
    together  z_i = LN(u) · LN(v_i) / √d_in         LN: zero mean, unit variance, no affine part
              p = softmax(z)     the k largest of p, divided by their sum

No data is shared between experts: `phatgoose_gates` sees one expert and its own training data. Standardising both sides
makes scores of gates that never met comparable; z is about N(0, 1) for strangers and at most √d_in.
Limits: a token decides alone, so a token that looks the same in two tasks goes to the same expert in both.

Paper: Muqeeth et al. 2024, section 3. Their code and Glider's add 1e-6 to the sum of the picked p; epsilon of the LN is
torch's 1e-5, so gates that barely left zero stay quiet.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.adapters import Adapter, detach
from notebook_kit.adapters._attach import place
from notebook_kit.adapters.read import Source
from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.mixtures.adapter_bank import BankRouter, read_bank
from notebook_kit.training import fit


@method(family="mixtures", paper="phatgoose")
class Phatgoose(BankRouter):
    """Route each token by its standardised dot product with every expert's standardised gate.

    Args:
        d_model: width of the tokens, d_in of the layer.
        n_experts: N.
        k: experts a token.
        top_p: below 1, take instead the smallest set of experts that holds this share of the probability.
        epsilon: of the sum that divides the weights.

    Raises:
        ValueError: k > n_experts.

    Source: Muqeeth et al. 2024, equations 2 and 3.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        k: Annotated[int, Range(1, 64)] = 2,
        top_p: Annotated[float, Range(0.05, 1)] = 1.0,
        epsilon: Annotated[float, Range(0, 1e-3)] = 1e-6,
    ):
        super().__init__(d_model, n_experts, k=min(k, n_experts) if top_p < 1 else k, top_p=top_p, epsilon=epsilon)

    def local(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens experts"]:
        """Return LN(u) · LN(v_i) / √d_in."""
        size = (self.d_model,)
        u, v = F.layer_norm(x.to(self.weight.dtype), size), F.layer_norm(self.weight, size)
        return F.linear(u, v) * self.d_model**-0.5


class GatedExpert(Adapter):
    """One expert behind its gate: y = W u + σ(v · u) ΔW u; only v trains.

    Args:
        host: nn.Linear or transformers' Conv1D.
        left: s B [d_out, r].
        right: A [r, d_in].
    """

    def __init__(self, host: nn.Module, left: Float[Tensor, "d_out rank"], right: Float[Tensor, "rank d_in"]):
        super().__init__(host)
        like = host.weight
        self.register_buffer("left", left.to(like))
        self.register_buffer("right", right.to(like))
        self.v = self.trainable(right.shape[1])

    def forward(self, u: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Return W u + σ(v · u) s B A u."""
        return self.host(u) + (u @ self.v).sigmoid()[..., None] * F.linear(F.linear(u, self.right), self.left)


def phatgoose_gates(
    model: nn.Module,
    expert: Source,
    batches: Callable[[torch.Generator], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int = 200,
    lr: float = 5e-3,
    seed: int = 0,
) -> dict[str, Float[Tensor, " d_in"]]:
    """Train one expert's gates, one for each layer it changes, on its own data.

    Args:
        model: the base; unchanged afterwards, bit for bit.
        expert: what `read_adapter` reads; its factors do not train.
        batches: of the expert's own training task, as `fit` draws them.
        loss: of that task, (model, batch) -> scalar.
        steps: of AdamW; 200 in Glider's code, 100 in mttl's.
        lr: learning rate; the papers' 5e-3.
        seed: of the batches.

    Returns:
        Layer to v, raw: the router standardises it.
    """
    (factors,) = read_bank([expert])
    factors.keys_in(model.state_dict())
    modules = dict(model.named_modules())
    built = {name: GatedExpert(modules[name], *pair) for name, pair in factors.factors.items()}
    place(model, built)
    try:
        fit(model, batches, loss, steps=steps, lr=lr, seed=seed, progress=False, desc="Phatgoose's gates")
        return {name: layer.v.detach().clone() for name, layer in built.items()}
    finally:
        detach(model)
