"""Series bottleneck: a narrow two-layer network with a skip connection, before or after a frozen linear layer.

    side="output":  z = W x,  y = z + s U σ(D z)          side="input":  y = W (x + s U σ(D x))

W [d_out, d_in] frozen, D [rank, d] down, U [d, rank] up, no biases; d = d_out at the output, d_in at the input. With
σ = identity it folds: (I + s U D) W at the output (the host's bias is multiplied too), W (I + s U D) at the input.
Papers: Houlsby et al. 2019, figure 2 (after each sub-layer, with biases: here, at the output of its last layer, o_proj
or down_proj); Hu et al. 2023 (LLM-Adapters), whose places and missing biases are taken here. `rank` is their
bottleneck_size (256 on 7B models). Their code starts D and U from N(0, 0.02) unless told otherwise (init="normal");
here U starts at zero, so that the model starts unchanged.
"""

import math
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.adapters._adapter import ACTIVATIONS, Adapter, CannotFold, check_rank, exact, matrix, sizes
from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range


@method(family="adapters", paper=("llm-adapters", "bottleneck-adapter"))
class SeriesBottleneck(Adapter):
    """Pass a layer's output (or input) through a narrow network with a skip connection: z + scale · U σ(D z).

    Args:
        host: nn.Linear or transformers' Conv1D, d_in inputs and d_out outputs.
        rank: width of the bottleneck, at most the size of the side it sits on.
        side: "output" (after the host) or "input" (before it).
        activation: σ.
        scale: what multiplies the bottleneck's output.
        dropout: share of the entries that the bottleneck does not see in training.
        init: "zero" (D Kaiming-uniform, U zero: the model starts unchanged) or "normal" (both from N(0, 0.02)).

    Raises:
        ValueError: rank above d_out (side="output") or d_in (side="input").
        TypeError: the host is not a linear layer.

    Source: Houlsby et al. 2019, figure 2; Hu et al. 2023.
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        rank: Annotated[int, Range(1, 1024, log=True)] = 8,
        side: Annotated[str, Choice("output", "input")] = "output",
        activation: Annotated[str, Choice("relu", "gelu", "tanh", "identity")] = "tanh",
        scale: Annotated[float, Range(0.01, 100, log=True)] = 1.0,
        dropout: Annotated[float, Range(0, 0.9)] = 0.0,
        init: Annotated[str, Choice("zero", "normal")] = "zero",
    ):
        super().__init__(host)
        d_in, d_out = sizes(host)
        d = d_out if side == "output" else d_in
        check_rank(rank, host, f"SeriesBottleneck at the {side}", limit=d)
        self.rank, self.side, self.activation, self.scale, self.dropout = rank, side, activation, scale, dropout
        self.D = self.trainable(rank, d)
        self.U = self.trainable(d, rank)
        if init == "zero":
            nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))
        else:
            nn.init.normal_(self.D, std=0.02)
            nn.init.normal_(self.U, std=0.02)

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Return the host's output with the bottleneck behind it, or before it."""
        return self._bottleneck(self.host(x)) if self.side == "output" else self.host(self._bottleneck(x))

    def _bottleneck(self, z: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        dropped = F.dropout(z, self.dropout, self.training) if self.dropout else z
        h = ACTIVATIONS[self.activation](F.linear(dropped, self.D))
        return torch.add(z, F.linear(h, self.U), alpha=self.scale)

    def factors(self) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
        """Return ΔW = (s U)(D W) at the output, (W s U)(D) at the input, for the identity activation only."""
        if self.activation != "identity":
            raise CannotFold(
                f"SeriesBottleneck with activation={self.activation!r} is not linear in x, so no change of "
                "the weight equals it; only activation='identity' folds"
            )
        D, U, W = exact(self.D), self.scale * exact(self.U), exact(matrix(self.host))
        return (U, D @ W) if self.side == "output" else (W @ U, D)

    def delta(self) -> dict[str, Tensor]:
        """Return the change of the weight and, at the output, of the host's bias: s U D b."""
        change, bias = super().delta(), self.host.bias
        if self.side == "output" and bias is not None:
            change["bias"] = self.scale * exact(self.U) @ (exact(self.D) @ exact(bias))
        return change

    def extra_repr(self) -> str:
        """Show the hyperparameters in the printed model."""
        return f"rank={self.rank}, side={self.side!r}, activation={self.activation!r}, scale={self.scale:g}"
