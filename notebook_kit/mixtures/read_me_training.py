"""Training Read-ME in turns: first the router learns which expert the dense model would like, then the backbone adapts.

Router (backbone frozen, run dense), in every layer with hidden channels a and n_k specific channels an expert:

    â = Σ_{q in 1, .8, .6, .4, .2} 1[a among its q n_k largest] / (3 n_k)      [T, D], raw a and not |a|
    dist = 10 (â Sᵀ - mean)   [T, N]            S [N, D] the specific channels of each expert
    loss = alpha CE(z, argmax dist; smoothed) + (1 - alpha) CE(z, softmax(dist)),   summed over layers

One prediction z is held against the target of every layer. Backbone (router and masks frozen): next-token loss with
every token behind the mask of its expert.

Source: Cai et al. 2024, section 3; `train_red.py` of their code (5 rounds of 100 and 200 steps), whose largest group is
one channel short, as its masks are.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.mixtures.channels import Watch, gated_mlps, split_channels
from notebook_kit.mixtures.read_me import ReadME
from notebook_kit.mixtures.read_me_layers import MaskedMLP
from notebook_kit.training import fit

Batches = Callable[[torch.Generator], Tensor]  # draws token ids [batch, length]


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
    mlps = _masked(readme)
    with torch.no_grad(), _dense(readme), Watch(mlps) as seen:
        readme(ids)
    parts = [split_channels(mlp.kept)[1] for mlp in mlps]
    return [router_targets(a, s) for a, s in zip(seen.channels, parts, strict=True)], seen.inputs


def train_router(readme: ReadME, batches: Batches, *, steps: int, lr: float = 1e-3, seed: int = 0, **loss_settings):
    """Train the pre-gate, or the layer-wise gates each on its own layer's target; the backbone stays.

    Args:
        readme: masked; changed in place.
        batches: draws token ids [batch, length].
        steps: of AdamW.
        lr: learning rate.
        seed: of the batches.
        loss_settings: alpha and label_smoothing of `router_loss`.

    Returns:
        History, a DataFrame with step and loss (mean over layers).
    """

    def loss(_, ids: Tensor) -> Tensor:
        targets, inputs = layer_targets(readme, ids)
        if readme.router is not None:
            scores = [readme.router(ids)] * len(targets)
        else:
            scores = [mlp.gate(x) for mlp, x in zip(_masked(readme), inputs, strict=True)]
        pairs = zip(scores, targets, strict=True)
        return torch.stack([router_loss(z, dist, **loss_settings) for z, dist in pairs]).mean()

    with _only(readme, _router_parameters(readme)):
        return fit(readme, batches, loss, steps=steps, lr=lr, seed=seed, progress=False, desc="Read-ME's router")


def train_backbone(
    readme: ReadME, batches: Batches, *, steps: int, lr: float = 1e-3, weight_decay: float = 0.01, seed: int = 0
):
    """Train everything but the router on the next token, each token behind its expert's mask.

    Args:
        readme: masked; changed in place.
        batches: draws token ids [batch, length].
        steps: of AdamW.
        lr: learning rate.
        weight_decay: decoupled.
        seed: of the batches.

    Returns:
        History, a DataFrame with step and loss in nats per token.
    """
    _masked(readme)
    router = {id(p) for p in _router_parameters(readme)}
    with _only(readme, [p for p in readme.parameters() if id(p) not in router]):
        settings = {"steps": steps, "lr": lr, "weight_decay": weight_decay, "seed": seed, "progress": False}
        return fit(readme, batches, next_token_loss, desc="Read-ME's backbone", **settings)


@method(family="mixtures", paper="read-me")
def alternate(
    readme: ReadME,
    batches: Batches,
    *,
    rounds: Annotated[int, Range(1, 100)] = 5,
    router_steps: Annotated[int, Range(1, 100_000)] = 100,
    backbone_steps: Annotated[int, Range(1, 100_000)] = 200,
    router_lr: Annotated[float, Range(1e-6, 0.1, log=True)] = 1e-3,
    backbone_lr: Annotated[float, Range(1e-6, 0.1, log=True)] = 1e-3,
    alpha: Annotated[float, Range(0.0, 1.0)] = 0.75,
    label_smoothing: Annotated[float, Range(0.0, 1.0)] = 0.5,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
) -> list[dict[str, float]]:
    """Train router and backbone in turns.

    Args:
        readme: masked; changed in place.
        batches: draws token ids [batch, length].
        rounds: how often both are trained.
        router_steps: of a round.
        backbone_steps: of a round.
        router_lr: learning rate of the router.
        backbone_lr: learning rate of the backbone.
        alpha: weight of the hard label against the soft one.
        label_smoothing: of the hard label.
        seed: of the batches, another in each round.

    Returns:
        For each round the last losses: "router" and "backbone".
    """
    history, targets = [], {"alpha": alpha, "label_smoothing": label_smoothing}
    for turn in range(rounds):
        first = train_router(readme, batches, steps=router_steps, lr=router_lr, seed=seed + 2 * turn, **targets)
        then = train_backbone(readme, batches, steps=backbone_steps, lr=backbone_lr, seed=seed + 2 * turn + 1)
        history.append({"router": float(first["loss"].iloc[-1]), "backbone": float(then["loss"].iloc[-1])})
    return history


def next_token_loss(model: nn.Module, ids: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
    """Cross-entropy of every next token, in nats.

    Args:
        model: returns `.logits`.
        ids: token ids.
    """
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _masked(readme: ReadME) -> list[nn.Module]:
    mlps = [layer.mlp for layer in readme._layers()]
    if not all(isinstance(mlp, MaskedMLP) for mlp in mlps):
        raise ValueError("a cut ReadME has no dense layers to train by: train the masked one, then cut()")
    return gated_mlps(readme.model)


def _router_parameters(readme: ReadME) -> list[nn.Parameter]:
    if readme.router is not None:
        return list(readme.router.parameters())
    return [p for mlp in _masked(readme) for p in mlp.gate.parameters()]


@contextmanager
def _only(readme: ReadME, trained: list[nn.Parameter]):
    """Let nothing else require a gradient, and put it back."""
    before = {p: p.requires_grad for p in readme.parameters()}
    for p in before:
        p.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, wanted in before.items():
            p.requires_grad_(wanted)
            p.grad = None


@contextmanager
def _dense(readme: ReadME):
    readme.plan.dense = True
    try:
        yield
    finally:
        readme.plan.dense = False
