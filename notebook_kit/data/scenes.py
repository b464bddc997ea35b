"""Scenes of 16 x 16 pixels: a digit, a bar chart, a piece of a photo and a coloured disc, and a question about one.

Each quarter of 8 x 8 pixels holds one thing: digit top left, bars top right, photo bottom left, disc bottom right.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from notebook_kit.data.digits import digits

COLOURS = {"red": (0.9, 0.2, 0.2), "green": (0.2, 0.8, 0.3), "blue": (0.2, 0.4, 0.9)}
QUESTIONS = {
    "which digit": ["0", "1", "2", "3", "4"],
    "tallest bar": ["left", "middle", "right"],
    "which photo": ["temple", "flower"],
    "what colour": list(COLOURS),
}


@dataclass(frozen=True)
class Scenes:
    """Pictures and the answer to every question of `QUESTIONS`, as an index into its answers."""

    images: Float[Tensor, "n 3 16 16"]
    answers: Int[Tensor, "n questions"]


def scenes(split: str, n: int, *, seed: int = 0) -> Scenes:
    """Draw scenes; digits are the split's own, photos are cut from the left half for training and
    from the right half for validation and test.

    Args:
        split: "train", "val" or "test".
        n: number of scenes.
        seed: of everything that is drawn.

    Returns:
        Scenes; pixels in [0, 1].

    Raises:
        ValueError: the split is unknown.
    """
    pixels, labels = digits(split)
    pixels, labels = pixels[labels < 5], labels[labels < 5]
    offset = {"train": 0, "val": 1, "test": 2}[split]
    generator = torch.Generator().manual_seed(1000 * seed + offset)

    def pick(high: int) -> Tensor:
        return torch.randint(high, (n,), generator=generator)

    images = torch.zeros(n, 3, 16, 16)
    rows = pick(len(pixels))
    images[:, :, :8, :8] = pixels[rows].view(n, 1, 8, 8)
    tallest = pick(3)
    images[:, :, :8, 8:] = _bars(tallest, generator)
    photo = pick(2)
    images[:, :, 8:, :8] = _crops(photo, split, generator)
    colour = pick(3)
    images[:, :, 8:, 8:] = _disc(colour, generator)
    return Scenes(images, torch.stack([labels[rows], tallest, photo, colour], 1))


def _bars(tallest: Tensor, generator: torch.Generator) -> Tensor:
    """Three bars of two pixels; the tallest is one or two pixels above the others."""
    n = len(tallest)
    heights = torch.randint(2, 6, (n, 1), generator=generator) + torch.randint(0, 2, (n, 3), generator=generator)
    top = heights.amax(1, keepdim=True) + 1
    heights = heights.scatter(1, tallest[:, None], top)
    ink = torch.arange(7, -1, -1)[None, :, None] < heights[:, None]  # [n, 8 rows from the top, 3 bars]
    chart = torch.zeros(n, 8, 8)
    for bar, left in enumerate((0, 3, 6)):
        chart[:, :, left : left + 2] = ink[:, :, bar : bar + 1].float()
    return chart[:, None]


@lru_cache(maxsize=1)
def _photos() -> tuple[Tensor, ...]:
    from sklearn.datasets import load_sample_images

    photos = [torch.tensor(photo, dtype=torch.float32).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
    return tuple(photo[:, ::2, ::2] for photo in photos)


def _crops(photo: Tensor, split: str, generator: torch.Generator) -> Tensor:
    """Pieces of 8 x 8 pixels at half size; training pieces are from the left half of a photo."""
    half = _photos()[0].shape[2] // 2
    low = 0 if split == "train" else half
    top = torch.randint(_photos()[0].shape[1] - 8, (len(photo),), generator=generator).tolist()
    left = (low + torch.randint(half - 8, (len(photo),), generator=generator)).tolist()
    pieces = [_photos()[p][:, t : t + 8, s : s + 8] for p, t, s in zip(photo.tolist(), top, left, strict=True)]
    return torch.stack(pieces) if pieces else torch.zeros(0, 3, 8, 8)


def _disc(colour: Tensor, generator: torch.Generator) -> Tensor:
    n = len(colour)
    centre = 3 + 2 * torch.rand(n, 2, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    inside = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < 7
    return torch.tensor(list(COLOURS.values()))[colour][..., None, None] * inside[:, None]
