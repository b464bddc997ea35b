"""An encoder that many tasks share: each task reads it through its own frozen, mutually orthogonal directions."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from notebook_kit.models.mlp import MLP


class DigitEncoder(MLP):
    """GELU encoder 64-128-128-64 with cosine logits against frozen head rows.

    With feature f(x) and unit head rows h_c, the logit of class c is 10 * cos(f(x), h_c). The heads of all tasks are
    rows of ONE random orthogonal matrix: a task asks the encoder to turn, and only the encoder learns and is merged.
    The head is no part of the state dict; `seed` makes it again.

    Args:
        n_classes: classes of all tasks together, 1 to 64.
        seed: of the orthogonal matrix.
        scale: factor of the cosine.

    Raises:
        ValueError: more classes than the 64 feature dimensions.
    """

    def __init__(self, n_classes: int, *, seed: int = 0, scale: float = 10.0):
        super().__init__([64, 128, 128, 64], "gelu")
        if not 1 <= n_classes <= 64:
            raise ValueError(f"n_classes must be in [1, 64], got {n_classes} (DigitEncoder)")
        self.scale = scale
        noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("head", torch.linalg.qr(noise).Q[:n_classes].contiguous(), persistent=False)

    def encode(self, x: Float[Tensor, "n 64"]) -> Float[Tensor, "n 64"]:
        """Return the features.

        Args:
            x: pixels in [0, 1].

        Returns:
            Features, not normalised.
        """
        return super().forward(x)

    def forward(self, x: Float[Tensor, "n 64"]) -> Float[Tensor, "n classes"]:
        """Return the logits of all tasks' classes, one task after another.

        Args:
            x: pixels in [0, 1].

        Returns:
            scale * cosine, in [-scale, scale].
        """
        return self.scale * F.normalize(self.encode(x), dim=-1) @ self.head.T
