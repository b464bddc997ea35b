"""LoRA: what a task changes in a weight matrix is nearly of low rank, so train only a low-rank change.

    y = W x + s B A x,     s = alpha / rank      (rank-stabilised, rsLoRA: s = alpha / sqrt(rank))

W [d_out, d_in] frozen, A [rank, d_in], B [d_out, rank]. A starts random, B at zero: the model starts unchanged.
Paper: Hu et al. 2021, equation 3; rsLoRA: Kalajdzievski 2023, theorem 3.2 (with alpha / rank the update shrinks as
the rank grows; with alpha / sqrt(rank) its size does not depend on the rank).
Limits: linear hosts only. The paper draws A from a Gaussian; the authors' code and peft use Kaiming-uniform, as here.
"""

import math
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.adapters._adapter import Adapter, check_rank, exact, sizes
from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range


@method(family="adapters", paper=("lora", "rslora"))
class LoRA(Adapter):
    """Add a trained low-rank product to a frozen linear layer: y = host(x) + (alpha / rank) B A x.

    Args:
        host: nn.Linear or transformers' Conv1D, d_in inputs and d_out outputs.
        rank: columns of B and rows of A, at most min(d_in, d_out).
        alpha: strength of the change; the scale is alpha / rank.
        dropout: share of the entries of x that the low-rank path does not see in training.
        rslora: divide by sqrt(rank) instead of rank.

    Raises:
        ValueError: rank above min(d_in, d_out).
        TypeError: the host is not a linear layer.

    Source: Hu et al. 2021, equation 3; Kalajdzievski 2023 for `rslora`.
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        rank: Annotated[int, Range(1, 1024, log=True)] = 8,
        alpha: Annotated[float, Range(0.125, 4096, log=True)] = 16,
        dropout: Annotated[float, Range(0, 0.9)] = 0.0,
        rslora: bool = False,
    ):
        super().__init__(host)
        check_rank(rank, host, "LoRA")
        d_in, d_out = sizes(host)
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.A = self.trainable(rank, d_in)
        self.B = self.trainable(d_out, rank)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Return W x + s B A x."""
        y = self.host(x)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return torch.add(y, F.linear(F.linear(x, self.A), self.B), alpha=self.scaling)

    def factors(self) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
        """Return s B and A: ΔW = s B A."""
        return self.scaling * exact(self.B), exact(self.A)

    def extra_repr(self) -> str:
        """Show the hyperparameters in the printed model."""
        return f"rank={self.rank}, alpha={self.alpha:g}, rslora={self.rslora}"
