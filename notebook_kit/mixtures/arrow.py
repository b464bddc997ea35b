"""Arrow: an expert's own factors say which tokens it answers to, so that routing needs no training and no data.

    v_i = first right singular vector of B_i A_i  [d_in]
    z_i = |u · v_i| / temperature     p = softmax over the k largest z

v_i is the input direction that the expert stretches most; its sign means nothing, hence the absolute value. u is not
standardised. The vector comes from two thin QR decompositions and the SVD of one r x r matrix; ΔW is never formed.
Limits: a direction that all experts stretch tells nothing; a large u makes the choice sharp whatever it says.

Paper: Ostapenko et al. 2024, section 4. temperature is 1 in peft and mttl, 10 in Glider's copy. peft picks 3 by default
and finds v by 15 power iterations from a random start.
"""

from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.adapters.read import Source
from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.mixtures.adapter_bank import BankRouter, read_bank


@method(family="mixtures", paper="arrow")
class Arrow(BankRouter):
    """Route each token by how far it points along the direction that an expert's change stretches most.

    Args:
        d_model: width of the tokens, d_in of the layer.
        n_experts: N.
        k: experts a token.
        top_p: below 1, take instead the smallest set of experts that holds this share of the probability.
        temperature: divides the scores.

    Raises:
        ValueError: k > n_experts.

    Source: Ostapenko et al. 2024, equation 4.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        k: Annotated[int, Range(1, 64)] = 2,
        top_p: Annotated[float, Range(0.05, 1)] = 1.0,
        temperature: Annotated[float, Range(0.01, 100, log=True)] = 1.0,
    ):
        super().__init__(d_model, n_experts, k=min(k, n_experts) if top_p < 1 else k, top_p=top_p)
        self.temperature = temperature

    def local(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens experts"]:
        """Return |u · v_i| / temperature."""
        return super().local(x).abs() / self.temperature


def arrow_prototypes(expert: Source) -> dict[str, Float[Tensor, " d_in"]]:
    """Find the direction of each layer's input that an expert stretches most.

    Args:
        expert: what `read_adapter` reads.

    Returns:
        Layer to v, of length 1; zeros where the change is zero.
    """
    (factors,) = read_bank([expert])
    result = {}
    for name, (left, right) in factors.factors.items():
        q, r = torch.linalg.qr(right.T)
        small = torch.linalg.qr(left).R @ r.T
        vh = torch.linalg.svd(small, full_matrices=False).Vh
        result[name] = q @ vh[0] if bool(small.any()) else torch.zeros_like(right[0])
    return result
