"""The adapter of MOS: a narrow network beside a transformer block's whole MLP, norm included.

    y = MLP(LN(x)) + s · (W_up ReLU(W_down x + b_down) + b_up)

x [tokens, d] is the block's stream after attention, before the norm; the block adds x to y as it always did. W_down
[bottleneck, d] starts Kaiming-uniform, W_up [d, bottleneck] and both biases at zero, so that the block starts
unchanged. Published for images as AdaptFormer (Chen et al. 2022); width 16, s = 0.1 and dropout 0.1 are MOS's.
Any other adapter serves `ModelSurgery` as well: it takes what is trainable for the adapter.
"""

import math
import re
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.hyperparameters import Range, hyperparameters, validate


class MLPAdapter(nn.Module):
    """Stand where a block's MLP stood, norm included, with a bottleneck beside them.

    Args:
        norm: the norm before the MLP; only the MLP's path goes through it.
        mlp: the block's MLP.
        width: d, the size of the stream.
        bottleneck: width of the narrow network.
        scale: s.
        dropout: share of the narrow layer's entries that training drops.
    """

    def __init__(
        self,
        norm: nn.Module,
        mlp: nn.Module,
        width: int,
        *,
        bottleneck: Annotated[int, Range(1, 1024, log=True)] = 16,
        scale: Annotated[float, Range(0.01, 100, log=True)] = 0.1,
        dropout: Annotated[float, Range(0, 0.9)] = 0.1,
    ):
        super().__init__()
        self.norm, self.mlp, self.scale, self.dropout = norm, mlp, scale, dropout
        like = next(mlp.parameters())
        self.down = nn.Linear(width, bottleneck, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(bottleneck, width, device=like.device, dtype=like.dtype)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Return MLP(LN(x)) + s · bottleneck(x)."""
        h = F.dropout(F.relu(self.down(x)), self.dropout, self.training)
        return self.mlp(self.norm(x)) + self.scale * self.up(h)


def insert_mlp_adapters(
    model: nn.Module,
    *,
    blocks: str = r"layers\.\d+$",
    norm: str = "layernorm_after",
    mlp: str = "mlp",
    seed: int = 0,
    bottleneck: int = 16,
    scale: float = 0.1,
    dropout: float = 0.1,
) -> list[str]:
    """Put an `MLPAdapter` into every block and freeze everything else.

    Args:
        model: such as transformers' ViTModel; changed in place.
        blocks: regular expression that `re.search` looks for in module names.
        norm: name of the norm inside a block; it moves into the adapter, and an identity takes its place.
        mlp: name of the MLP inside a block; it must be called on the norm's output and nothing else.
        seed: of the adapters' initial values; the caller's random state is left alone.
        bottleneck: width of the narrow network, in [1, 1024].
        scale: what multiplies its output, in [0.01, 100].
        dropout: in training, in [0, 0.9].

    Returns:
        The names of the blocks.

    Raises:
        ValueError: no block matches, a block lacks `norm` or `mlp`, or it carries an adapter already. Nothing is
            changed then.
    """
    validate(hyperparameters(MLPAdapter), {"bottleneck": bottleneck, "scale": scale, "dropout": dropout})
    found = {name: module for name, module in model.named_modules() if name and re.search(blocks, name)}
    if not found:
        raise ValueError(f"no module of {type(model).__name__} matches blocks={blocks!r} (insert_mlp_adapters)")
    for name, block in found.items():
        missing = [part for part in (norm, mlp) if not isinstance(getattr(block, part, None), nn.Module)]
        if missing:
            parts = ", ".join(child for child, _ in block.named_children())
            raise ValueError(f"{name} has no module {missing[0]!r}, only {parts} (insert_mlp_adapters)")
        if isinstance(getattr(block, mlp), MLPAdapter):
            raise ValueError(f"{name} carries an MLPAdapter already (insert_mlp_adapters)")
    widths = {name: next((len(p) for p in getattr(block, norm).parameters()), None) for name, block in found.items()}
    if None in widths.values():
        name = next(name for name, width in widths.items() if width is None)
        raise ValueError(f"{name}.{norm} has no weight to read the stream's size from (insert_mlp_adapters)")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, block in found.items():
            settings = {"bottleneck": bottleneck, "scale": scale, "dropout": dropout}
            adapter = MLPAdapter(getattr(block, norm), getattr(block, mlp), widths[name], **settings)
            setattr(block, norm, nn.Identity())
            setattr(block, mlp, adapter.train(block.training))
    return list(found)
