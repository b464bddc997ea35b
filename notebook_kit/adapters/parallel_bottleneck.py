"""Parallel bottleneck: a narrow two-layer network beside a frozen layer or sub-layer, fed with the same input.

    y = W x + s U σ(D x)

W [d_out, d_in] frozen, D [rank, d_in] down, U [d_out, rank] up, no biases. With σ = identity this is LoRA with A = D,
B = U, and folds; with a nonlinear σ it does more than any change of W could, and so cannot be folded.
Papers: He et al. 2022 (parallel adapter) put it beside a whole sub-layer f, y = f(x) + s U σ(D x): targets=r"mlp$" or
r"attn$". Hu et al. 2023 (LLM-Adapters) put it beside each linear layer. `rank` is their bottleneck_size (256 on 7B
models). Their code starts D and U from N(0, 0.02) unless told otherwise (init="normal"); here U starts at zero, so that
the model starts unchanged.
"""

import math
from typing import Annotated

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.adapters._adapter import ACTIVATIONS, Adapter, CannotFold, check_rank, exact, is_linear, sizes
from notebook_kit.adapters._sublayer import hidden_states, is_sublayer, plus, width
from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range


@method(family="adapters", paper=("llm-adapters", "parallel-adapter"))
class ParallelBottleneck(Adapter):
    """Add a narrow network that sees the layer's input: y = host(x) + scale · U σ(D x).

    Args:
        host: nn.Linear or transformers' Conv1D, d_in inputs and d_out outputs; or a sub-layer, from hidden states to
            hidden states of the same size. A pattern that matches a sub-layer and layers inside it means the layers.
        rank: width of the bottleneck, at most min(d_in, d_out).
        activation: σ.
        scale: what multiplies the bottleneck's output.
        dropout: share of the entries of x that the bottleneck does not see in training.
        init: "zero" (D Kaiming-uniform, U zero: the model starts unchanged) or "normal" (both from N(0, 0.02)).

    Raises:
        ValueError: rank above min(d_in, d_out).
        TypeError: the host is neither a linear layer nor a sub-layer.

    Source: He et al. 2022, table 1 (parallel adapter); Hu et al. 2023.
    """

    hosts = "nn.Linear, transformers' Conv1D, or a sub-layer of as many outputs as inputs"

    def __init__(
        self,
        host: nn.Module,
        *,
        rank: Annotated[int, Range(1, 1024, log=True)] = 8,
        activation: Annotated[str, Choice("relu", "gelu", "tanh", "identity")] = "tanh",
        scale: Annotated[float, Range(0.01, 100, log=True)] = 1.0,
        dropout: Annotated[float, Range(0, 0.9)] = 0.0,
        init: Annotated[str, Choice("zero", "normal")] = "zero",
    ):
        super().__init__(host)
        d_in, d_out = sizes(host) if is_linear(host) else (width(host), width(host))
        check_rank(rank, host, "ParallelBottleneck", between=(d_in, d_out))
        self.rank, self.activation, self.scale, self.dropout = rank, activation, scale, dropout
        self.D = self.trainable(rank, d_in)
        self.U = self.trainable(d_out, rank)
        if init == "zero":
            nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))
        else:
            nn.init.normal_(self.D, std=0.02)
            nn.init.normal_(self.U, std=0.02)

    @classmethod
    def supports(cls, host: nn.Module) -> bool:
        """Say whether this adapter can sit on a module."""
        return is_linear(host) or is_sublayer(host)

    def forward(self, *args, **kwargs):
        """Return W x + s U σ(D x), or f(x) + s U σ(D x) beside a sub-layer f, whose other outputs stay as they are."""
        y, x = self.host(*args, **kwargs), hidden_states(args, kwargs)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        h = ACTIVATIONS[self.activation](F.linear(x, self.D))
        return plus(y, F.linear(h, self.U), self.scale)

    def factors(self) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
        """Return s U and D: ΔW = s U D, for the identity activation and a linear host only."""
        if not is_linear(self.host):
            raise CannotFold(
                f"ParallelBottleneck stands beside a whole {type(self.host).__name__}: no one weight could take it up"
            )
        if self.activation != "identity":
            raise CannotFold(
                f"ParallelBottleneck with activation={self.activation!r} is not linear in x, so no change of "
                "the weight equals it; only activation='identity' folds"
            )
        return self.scale * exact(self.U), exact(self.D)

    def extra_repr(self) -> str:
        """Show the hyperparameters in the printed model."""
        return f"rank={self.rank}, activation={self.activation!r}, scale={self.scale:g}"
