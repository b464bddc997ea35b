"""A multi-layer perceptron whose layers are named in order, so that its state dict reads like the network."""

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


class MLP(nn.Module):
    """Linear layers `layers.0`, `layers.1`, ... with an activation between them and none after the last.

    Args:
        widths: sizes from input to output, at least two; MLP([64, 32, 10]) has two layers.
        activation: "relu" or "gelu".

    Raises:
        ValueError: fewer than two widths, or an unknown activation.
    """

    def __init__(self, widths: Sequence[int], activation: str = "relu"):
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths needs an input and an output size, got {list(widths)} (MLP)")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)} (MLP)")
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Return the last layer's output.

        Args:
            x: inputs, last axis of size widths[0].

        Returns:
            Outputs, last axis of size widths[-1].
        """
        activate = ACTIVATIONS[self.activation]
        for layer in self.layers[:-1]:
            x = activate(layer(x))
        return self.layers[-1](x)
