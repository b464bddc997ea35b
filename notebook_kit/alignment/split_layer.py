"""A layer of two networks that share some of their units: what is merged is computed once, the rest twice."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Split(NamedTuple):
    """How many units of one layer are merged, and how many are kept of a and of b; they stand in this order."""

    merged: int
    a: int
    b: int


class SplitLayer(nn.Module):
    """A linear layer or convolution with units [merged | a's own | b's own] at both ends.

    Merged units read all inputs; a's own units read the merged ones and a's, b's own read the merged ones and b's.
    The two missing blocks are not stored and not computed, so that parameters and multiply-adds are counted truly.

    Args:
        like: the layer of one network whose kind, kernel, stride and bias to take.
        inputs: units it reads.
        outputs: units it makes.
        block: columns of one input unit: 1, or more where maps were flattened.
    """

    def __init__(self, like: nn.Linear | nn.Conv2d, inputs: Split, outputs: Split, block: int = 1):
        super().__init__()
        self.inputs, self.outputs, self.block = inputs, outputs, block
        self.axis = 1 if isinstance(like, nn.Conv2d) else -1
        self.rows = nn.ModuleDict()
        for name, n_out in outputs._asdict().items():
            if n_out:
                n_in = sum(inputs) if name == "merged" else inputs.merged + getattr(inputs, name)
                self.rows[name] = _like(like, n_in * block, n_out)

    def reads(self, name: str) -> list[str]:
        """Which groups of inputs a group of outputs reads."""
        return ["merged", "a", "b"] if name == "merged" else ["merged", name]

    def forward(self, x: Tensor) -> Tensor:
        """Return the units' values before the nonlinearity.

        Args:
            x: values of the input units [merged | a's own | b's own], with maps where the layer is a convolution.
        """
        parts = dict(zip(Split._fields, x.split([n * self.block for n in self.inputs], self.axis), strict=True))
        outputs = [
            layer(x if name == "merged" else torch.cat([parts["merged"], parts[name]], self.axis))
            for name, layer in self.rows.items()
        ]
        return torch.cat(outputs, self.axis)

    def extra_repr(self) -> str:
        return f"{tuple(self.inputs)} -> {tuple(self.outputs)}"


def _like(layer: nn.Linear | nn.Conv2d, n_in: int, n_out: int) -> nn.Linear | nn.Conv2d:
    bias, place = layer.bias is not None, {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias, **place)
    shape = {key: getattr(layer, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    return nn.utils.skip_init(nn.Conv2d, n_in, n_out, bias=bias, **shape, **place)
