"""Convolutional networks with batch norm, small enough for the 8 x 8 digits: one plain, one residual."""

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def _check(widths: Sequence[int], owner: str) -> None:
    if not 1 <= len(widths) <= 3:
        raise ValueError(f"widths needs one to three stages (8 x 8 pixels halve three times), got {widths} ({owner})")


class VGG(nn.Sequential):
    """Two 3 x 3 convolutions with batch norm and ReLU per stage, then pooling; two linear layers at the end.

    The last maps are flattened, so that each channel becomes several inputs of the first linear layer.

    Args:
        widths: channels of each stage, one to three; every stage halves the image.
        hidden: units of the layer before the last.
        n_classes: outputs.

    Raises:
        ValueError: no stage, or more than three.
    """

    def __init__(self, widths: Sequence[int] = (8, 16), *, hidden: int = 32, n_classes: int = 10):
        _check(widths, "VGG")
        super().__init__()
        self.add_module("image", nn.Unflatten(-1, (1, 8, 8)))
        channels, size = 1, 8
        for stage, width in enumerate(widths):
            for i in (2 * stage, 2 * stage + 1):
                self.add_module(f"conv{i}", nn.Conv2d(channels, width, 3, padding=1, bias=False))
                self.add_module(f"norm{i}", nn.BatchNorm2d(width))
                self.add_module(f"relu{i}", nn.ReLU())
                channels = width
            self.add_module(f"pool{stage}", nn.MaxPool2d(2))
            size //= 2
        self.add_module("flatten", nn.Flatten())
        self.add_module("hidden", nn.Linear(channels * size**2, hidden))
        self.add_module("relu", nn.ReLU())
        self.add_module("head", nn.Linear(hidden, n_classes))


class ConvNorm(nn.Module):
    """A convolution without bias and the batch norm after it.

    Args:
        channels: of the input.
        width: channels of the output.
        kernel: 3 (padded) or 1.
        stride: 2 halves the image.
    """

    def __init__(self, channels: int, width: int, kernel: int = 3, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        """Return the normalised maps.

        Args:
            x: maps.
        """
        return self.norm(self.conv(x))


class ResidualBlock(nn.Module):
    """relu(s(x) + second(relu(first(x)))); s is a 1 x 1 convolution where the width changes, else the identity.

    Args:
        channels: of the input.
        width: channels of the output; another width than the input's also halves the image.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        stride = 1 if channels == width else 2
        self.first = ConvNorm(channels, width, stride=stride)
        self.second = ConvNorm(width, width)
        self.shortcut = None if channels == width else ConvNorm(channels, width, kernel=1, stride=stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        """Return the next maps of the residual stream.

        Args:
            x: maps.
        """
        kept = x if self.shortcut is None else self.shortcut(x)
        return F.relu(kept + self.second(F.relu(self.first(x))))


class ResNet(nn.Module):
    """A stem, stages of residual blocks, and a linear layer on the mean of the last maps.

    Args:
        widths: channels of each stage, one to three and all different; every stage after the first halves the image.
        blocks: residual blocks per stage.
        n_classes: outputs.

    Raises:
        ValueError: no stage, more than three, or two neighbours of one width.
    """

    def __init__(self, widths: Sequence[int] = (8, 16), *, blocks: int = 1, n_classes: int = 10):
        _check(widths, "ResNet")
        if any(one == two for one, two in pairwise(widths)):
            raise ValueError(f"widths must change from stage to stage, got {widths} (ResNet)")
        super().__init__()
        self.stem = ConvNorm(1, widths[0])
        ends = [widths[0], *widths]
        self.stages = nn.ModuleList(
            nn.ModuleList(ResidualBlock(ends[s] if i == 0 else width, width) for i in range(blocks))
            for s, width in enumerate(widths)
        )
        self.head = nn.Linear(widths[-1], n_classes)

    def forward(self, x: Float[Tensor, "n 64"]) -> Float[Tensor, "n classes"]:
        """Return the logits.

        Args:
            x: pixels in [0, 1].
        """
        x = F.relu(self.stem(x.unflatten(-1, (1, 8, 8))))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean((2, 3)))
