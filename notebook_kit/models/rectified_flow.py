"""Rectified flow: learn the straight way from noise to data, then walk it in a few Euler steps.

    z_t = (1 - t) x + t ε          ε ~ N(0, I), t = sigmoid(n), n ~ N(0, 1)          z_0 the image, z_1 noise
    loss = || v(z_t, t, y) - (ε - x) ||², mean over pixels                           z moves by ε - x as t grows
    sampling: z <- z - v(z, t, y) / steps,  t = 1, 1 - 1/steps, ..., 1/steps
    guidance: v = v_none + w (v_y - v_none)                                          w = 1: the class alone

In training a class is dropped with probability 0.1, so that one network knows both v_y and v_none; w > 1 walks away
from what any image would do, towards what only this class does. DiT's own diffusion path guides three channels only;
here all are guided.

A model is called as `model(z, t, y)` and has `n_classes` (the label of no class), `channels` and `size`.

Sources: Liu et al. 2022 (2209.03003); times: Esser et al. 2024 (2403.03206), section 3.1; guidance: Ho and Salimans
2022 (2207.12598), equation 6.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from notebook_kit.hyperparameters import Range, hyperparameters, validate


def noised(
    x: Float[Tensor, "n *image"], noise: Float[Tensor, "n *image"], t: Float[Tensor, " n"]
) -> Float[Tensor, "n *image"]:
    """Return z_t = (1 - t) x + t ε.

    Args:
        x: images.
        noise: ε.
        t: noise level of each, in [0, 1].
    """
    t = t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return (1 - t) * x + t * noise


def flow_errors(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Float[Tensor, "n channels height width"],
    y: Int[Tensor, " n"],
    noise: Float[Tensor, "n channels height width"],
    t: Float[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """Return each image's squared error of the velocity, mean over pixels.

    Args:
        model: v(z, t, y).
        x: images.
        y: classes.
        noise: ε.
        t: noise levels.
    """
    return (model(noised(x, noise, t), t, y) - (noise - x)).square().flatten(1).mean(1)


def flow_loss(
    model: nn.Module, x: Float[Tensor, "n channels height width"], y: Int[Tensor, " n"], *, drop: float = 0.1
) -> Float[Tensor, ""]:
    """Return the training loss, with noise, times and dropped classes from torch's random state.

    Args:
        model: v(z, t, y).
        x: images.
        y: classes.
        drop: probability that a class is hidden.
    """
    hidden = torch.rand(len(y), device=y.device) < drop
    t = torch.randn(len(x), device=x.device).sigmoid()
    return flow_errors(model, x, y.masked_fill(hidden, model.n_classes), torch.randn_like(x), t).mean()


def velocity(
    model: nn.Module,
    z: Float[Tensor, "n channels height width"],
    t: Float[Tensor, " n"],
    y: Int[Tensor, " n"],
    *,
    guidance: float = 1.0,
) -> Float[Tensor, "n channels height width"]:
    """Return the guided velocity; with guidance 1 the model runs once, otherwise for twice as many images.

    Args:
        model: v(z, t, y).
        z: noisy images.
        t: noise levels.
        y: classes.
        guidance: w; 0 ignores the class, 1 is unguided.
    """
    if guidance == 1:
        return model(z, t, y)
    none = torch.full_like(y, model.n_classes)
    with_class, without = model(torch.cat([z, z]), torch.cat([t, t]), torch.cat([y, none])).chunk(2)
    return without + guidance * (with_class - without)


@torch.no_grad()
def sample_path(
    model: nn.Module,
    y: Int[Tensor, " n"],
    *,
    steps: Annotated[int, Range(1, 1000)] = 50,
    guidance: Annotated[float, Range(0, 20)] = 1.5,
    seed: int = 0,
) -> Float[Tensor, "moments n channels height width"]:
    """Walk from noise to images, and return every step of the way.

    Args:
        model: v(z, t, y), in evaluation mode.
        y: the class of each image.
        steps: Euler steps.
        guidance: w.
        seed: of the noise; image i starts from the same noise whatever the class.

    Returns:
        steps + 1 moments: noise first, images last.

    Raises:
        ValueError: steps or guidance out of range.
    """
    validate(hyperparameters(sample_path), {"steps": steps, "guidance": guidance})
    shape = (len(y), model.channels, model.size, model.size)
    generator = torch.Generator("cpu").manual_seed(seed)  # the same noise on every device
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    z = torch.randn(shape, generator=generator, device="cpu").to(y.device, dtype)
    moments = [z]
    for i in range(steps, 0, -1):
        t = torch.full((len(y),), i / steps, device=y.device)
        z = z - velocity(model, z, t, y, guidance=guidance) / steps
        moments.append(z)
    return torch.stack(moments)


def sample(
    model: nn.Module,
    y: Int[Tensor, " n"],
    *,
    steps: Annotated[int, Range(1, 1000)] = 50,
    guidance: Annotated[float, Range(0, 20)] = 1.5,
    seed: int = 0,
) -> Float[Tensor, "n channels height width"]:
    """Make images of the classes y: the end of `sample_path`, which has the arguments."""
    return sample_path(model, y, steps=steps, guidance=guidance, seed=seed)[-1]
