"""Eight transformations of the digits: tasks that share labels and differ in inputs."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "n 64"]


def _square(x: Images) -> Float[Tensor, "n 8 8"]:
    return x.reshape(-1, 8, 8)


def identity(x: Images) -> Images:
    """Return the images as they are."""
    return x.clone()


def invert(x: Images) -> Images:
    """Exchange ink and paper; its own inverse."""
    return 1 - x


def rot90(x: Images) -> Images:
    """Rotate a quarter turn counter-clockwise; four times is the identity."""
    return torch.rot90(_square(x), 1, (1, 2)).reshape(-1, 64)


def hflip(x: Images) -> Images:
    """Mirror left and right; its own inverse."""
    return _square(x).flip(2).reshape(-1, 64)


def roll(x: Images) -> Images:
    """Shift two rows down and one column right, around the border; undone by the opposite shift."""
    return torch.roll(_square(x), (2, 1), (1, 2)).reshape(-1, 64)


def occlude(x: Images) -> Images:
    """Erase a square of 4 x 4 pixels, rows 2 to 5 and columns 3 to 6; cannot be undone."""
    image = _square(x).clone()
    image[:, 2:6, 3:7] = 0
    return image.reshape(-1, 64)


def background(x: Images) -> Images:
    """Put one fixed noise pattern behind the ink: the brighter of the two shows; cannot be undone."""
    noise = 0.7 * torch.rand(64, generator=torch.Generator().manual_seed(7))
    return torch.maximum(x, noise.to(x))


def threshold(x: Images) -> Images:
    """Make each pixel black or white, at one half; cannot be undone."""
    return (x > 0.5).to(x.dtype)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity,
    "invert": invert,
    "rot90": rot90,
    "hflip": hflip,
    "roll": roll,
    "occlude": occlude,
    "background": background,
    "threshold": threshold,
}


def digit_views(x: Images) -> dict[str, Images]:
    """Return all views of the same images.

    Args:
        x: pixels in [0, 1], 8 x 8 images row by row.

    Returns:
        Name of the view to its pixels, in the order of `VIEWS`; new tensors, pixels in [0, 1].
    """
    return {name: view(x) for name, view in VIEWS.items()}
