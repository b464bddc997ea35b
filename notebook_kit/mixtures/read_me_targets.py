"""What Read-ME's router is taught: which expert the dense model would like for a token, layer by layer.

In a layer with hidden channels a [T, D] and n_k specific channels an expert, S [N, D]:

    â = Σ_{q in 1, .8, .6, .4, .2} 1[a among its q n_k largest] / (3 n_k)      [T, D], raw a and not |a|
    dist = 10 (â Sᵀ - mean)   [T, N]
    loss = alpha CE(z, argmax dist; smoothed) + (1 - alpha) CE(z, softmax(dist))

Source: Cai et al. 2024, section 3; `loss_func` in `train_red.py` of their code, whose largest group is one channel
short, as its masks are.
"""

from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.mixtures.channels import Watch, gated_mlps, split_channels
from notebook_kit.mixtures.read_me import ReadME
from notebook_kit.mixtures.read_me_layers import MaskedMLP


def router_targets(
    channels: Float[Tensor, "*tokens d_ff"], specific: Bool[Tensor, "experts d_ff"]
) -> Float[Tensor, "*tokens experts"]:
    """Say how well each expert's own channels cover what a token fires most, around 0.

    Args:
        channels: a of the dense model.
        specific: S, from `split_channels`.

    Returns:
        dist; all 0 where experts have no channels of their own.
    """
    n = int(specific[0].sum())
    if n == 0:
        return channels.new_zeros(*channels.shape[:-1], len(specific))
    falling = channels.topk(n + 1, dim=-1).values
    counts = sorted({n * fifths // 5 for fifths in range(1, 6)})
    graded = sum((channels > falling[..., count, None]).float() for count in counts) / (3 * n)
    dist = graded @ specific.to(graded.dtype).T
    return (dist - dist.mean()) * 10


def router_loss(
    logits: Float[Tensor, "*tokens experts"],
    dist: Float[Tensor, "*tokens experts"],
    *,
    alpha: float = 0.75,
    label_smoothing: float = 0.5,
) -> Float[Tensor, ""]:
    """Hold a router's scores against one layer's targets.

    Args:
        logits: z.
        dist: from `router_targets`.
        alpha: weight of the hard label against the soft one.
        label_smoothing: of the hard label.
    """
    z, d = logits.flatten(0, -2), dist.flatten(0, -2)
    hard = F.cross_entropy(z, d.argmax(1), label_smoothing=label_smoothing)
    return alpha * hard + (1 - alpha) * F.cross_entropy(z, d.softmax(1))


def layer_targets(readme: ReadME, ids: Int[Tensor, "batch length"]) -> tuple[list[Tensor], list[Tensor]]:
    """Run the backbone dense; return each layer's targets [B, T, N] and each MLP's input [B, T, d].

    Args:
        readme: in its masked form.
        ids: token ids.
    """
    mlps = masked_mlps(readme)
    with torch.no_grad(), running_dense(readme), Watch(mlps) as seen:
        readme(ids)
    parts = [split_channels(mlp.kept)[1] for mlp in mlps]
    return [router_targets(a, s) for a, s in zip(seen.channels, parts, strict=True)], seen.inputs


def masked_mlps(readme: ReadME) -> list[nn.Module]:
    """The MLPs of a ReadME in its masked form.

    Raises:
        ValueError: it is cut.
    """
    mlps = [layer.mlp for layer in readme._layers()]
    if not all(isinstance(mlp, MaskedMLP) for mlp in mlps):
        raise ValueError("a cut ReadME has no dense layers to train by: train the masked one, then cut()")
    return gated_mlps(readme.model)


@contextmanager
def running_dense(readme: ReadME):
    """Switch all masks off inside the block."""
    readme.plan.dense = True
    try:
        yield
    finally:
        readme.plan.dense = False
