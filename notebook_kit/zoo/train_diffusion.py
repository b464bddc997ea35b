"""How the diffusion beds were trained: about two CPU-minutes each."""

import math

import torch
from torch import Tensor, nn

from notebook_kit.models import flow_loss
from notebook_kit.routing import aux_loss
from notebook_kit.training import fit
from notebook_kit.zoo import store
from notebook_kit.zoo.diffusion import diffusion_model, digit_images

BATCH, STEPS = 128, 1800


def train_digit_diffusion(kind: str, seed: int = 0) -> None:
    """Train one kind; the learning rate falls to 0 along a cosine, in place of averaged weights.

    Args:
        kind: "dense" or "mixture".
        seed: of first weights, batches, noise and times.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = diffusion_model(kind)
    x, y = digit_images("train")

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        return x[rows], y[rows]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        task = flow_loss(model, *batch)
        return task + aux_loss(model) if kind == "mixture" else task

    name = f"digit_diffusion_{kind}"

    def schedule(done):
        return 0.5 + 0.5 * math.cos(math.pi * done)

    fit(model, draw, loss, steps=STEPS, lr=2e-3, seed=seed, schedule=schedule, desc=name)
    # Half precision on disk: what it rounds off is far below what training leaves open.
    store.write(name, "base", model.state_dict(), torch.float16)
