"""The diffusion bed: a tiny transformer that turns noise into handwritten digits, dense or with experts."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from notebook_kit.data import digits
from notebook_kit.models import MLP, DiffusionTransformer, flow_errors
from notebook_kit.zoo import store
from notebook_kit.zoo.bed import Bed

KINDS = ("dense", "mixture")
UNIT = "minus flow loss (mean squared error of the velocity)"
LEVELS = (0.2, 0.4, 0.6, 0.8)  # noise levels of the score: quantiles of the times that training draws
Batch = tuple[Float[Tensor, "n 1 8 8"], Int[Tensor, " n"]]


def digit_images(split: str) -> Batch:
    """Return the digits as a diffusion model sees them.

    Args:
        split: "train", "val" or "test".

    Returns:
        Images [n, 1, 8, 8] with pixels from -1 (paper) to 1 (ink), and the digits.
    """
    x, y = digits(split)
    return x.reshape(-1, 1, 8, 8) * 2 - 1, y


def digit_diffusion(kind: str = "dense") -> Bed:
    """Return a class-conditional rectified flow on digits of 8 x 8 pixels; make images of it by `models.sample`.

    Dense and mixture have the same blocks and the same weights active for a token; they saw the same batches.

    Args:
        kind: "dense" has an MLP in each block; "mixture" a `DiTMoE` of 8 experts, of which 2 are used, and a shared
            path.

    Returns:
        Bed of `DiffusionTransformer` (0.2 M parameters; mixture 0.5 M) without experts of its own; `names` are the
        digits; score: minus the mean squared error of the velocity on held-out digits, at four noise levels.

    Raises:
        ValueError: an unknown kind.
    """
    model, base = diffusion_model(kind), store.read(f"digit_diffusion_{kind}", "base")
    model.load_state_dict(base)
    return Bed(model.eval(), base, [], [str(digit) for digit in range(10)], flow_score, digit_batches, UNIT)


def diffusion_model(kind: str) -> DiffusionTransformer:
    """Return an untrained model of a bed, with random weights from torch's random state.

    Args:
        kind: "dense" or "mixture".

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)} (digit_diffusion)")
    return DiffusionTransformer(feed_forward=_mixture() if kind == "mixture" else _dense)


def _dense(d_model: int) -> MLP:
    # As many weights as the mixture has active: 2 d 9d = 3 d (2 · 2d + 2d)
    return MLP([d_model, 9 * d_model, d_model], "gelu")


def _mixture() -> Callable[[int], nn.Module]:
    from notebook_kit.mixtures import DiTMoE  # late: a shipped checkpoint of a method needs that method's class

    return partial(DiTMoE, d_ff=96)


def digit_batches(split: str) -> dict[str, Batch]:
    """Return digit to (images, classes)."""
    x, y = digit_images(split)
    return {str(digit): (x[y == digit], y[y == digit]) for digit in range(10)}


@torch.no_grad()
def flow_score(model: nn.Module, weights: Mapping[str, Tensor] | None, data: dict[str, Batch]) -> dict[str, float]:
    """Return minus each digit's mean flow loss; the same noise every time."""
    x, y = (torch.cat(parts) for parts in zip(*data.values(), strict=True))
    noise = torch.randn(len(LEVELS), *x.shape, generator=torch.Generator().manual_seed(0)).flatten(0, 1)
    t = torch.special.ndtri(torch.tensor(LEVELS)).sigmoid().repeat_interleave(len(x))
    answer = model if weights is None else partial(_call, model, dict(weights))
    errors = flow_errors(answer, x.repeat(len(LEVELS), 1, 1, 1), y.repeat(len(LEVELS)), noise, t)
    parts = errors.unflatten(0, (len(LEVELS), -1)).mean(0).split([len(classes) for _, classes in data.values()])
    return dict(zip(data, [-part.mean().item() for part in parts], strict=True))


def _call(model: nn.Module, weights: dict[str, Tensor], *args: Tensor) -> Tensor:
    return functional_call(model, weights, args)
