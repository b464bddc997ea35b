"""Training Read-ME in turns: first the router learns which expert the dense model would like, then the backbone adapts.

    router     backbone frozen and run dense; `router_loss` against the targets of every layer, summed over layers
    backbone   router and masks frozen; next-token loss with every token behind the mask of its expert

One prediction is held against the target of every layer; the history has the mean over layers.

Source: Cai et al. 2024, section 3; `train_red.py` of their code (5 rounds of 100 and 200 steps).
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.mixtures.read_me import ReadME
from notebook_kit.mixtures.read_me_layers import ask
from notebook_kit.mixtures.read_me_targets import layer_targets, masked_mlps, router_loss
from notebook_kit.training import fit

Batches = Callable[[torch.Generator], Tensor]  # draws token ids [batch, length]


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
            scores = [ask(mlp.gate, x) for mlp, x in zip(masked_mlps(readme), inputs, strict=True)]
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
    masked_mlps(readme)
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


def _router_parameters(readme: ReadME) -> list[nn.Parameter]:
    if readme.router is not None:
        return list(readme.router.parameters())
    return [p for mlp in masked_mlps(readme) for p in mlp.gate.parameters()]


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
