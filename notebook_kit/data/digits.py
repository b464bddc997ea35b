"""Handwritten digits (8 x 8 pixels) and eight ways to label them: tasks that share inputs and differ in labels."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

SIZES = {"train": 1000, "val": 200, "test": 597}


def check_split(split: str) -> str:
    """Return `split` if it is one of train, val, test; raise a ValueError that names them otherwise."""
    if split not in SIZES:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SIZES)}")
    return split


@lru_cache(maxsize=1)
def _all_digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target, dtype=torch.int64)


def digits(split: str, *, seed: int = 0) -> tuple[Float[Tensor, "n 64"], Int[Tensor, " n"]]:
    """Return the 1,797 digits of scikit-learn, one split of a seeded permutation.

    Args:
        split: "train" (1000 images), "val" (200) or "test" (597).
        seed: of the permutation that divides the images.

    Returns:
        Pixels in [0, 1], rows of the 8 x 8 image one after another, and the digit 0 to 9.

    Raises:
        ValueError: the split is unknown.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (1998), UCI, CC BY 4.0; the copy
        in sklearn.datasets.load_digits.
    """
    check_split(split)
    x, y = _all_digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = dict(zip(SIZES, order.split(list(SIZES.values())), strict=True))
    return x[parts[split]], y[parts[split]]


@dataclass(frozen=True)
class Labeling:
    """A task over the digits: called with the images and the digits, it gives a class for each.

    Args:
        n_classes: number of classes.
        rule: (x Float[n, 64], y Int[n]) -> Int[n], classes from 0.
    """

    n_classes: int
    rule: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Float[Tensor, "n 64"], y: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return the class of each image.

        Args:
            x: pixels in [0, 1].
            y: digits, 0 to 9.

        Returns:
            Classes, 0 to n_classes - 1.
        """
        return self.rule(x, y).long()


def _digit(x: Tensor, y: Tensor) -> Tensor:
    return y


def _remainder(x: Tensor, y: Tensor, divisor: int) -> Tensor:
    return y % divisor


def _at_least(x: Tensor, y: Tensor, least: int) -> Tensor:
    return y >= least


def _among(x: Tensor, y: Tensor, members: tuple[int, ...]) -> Tensor:
    return torch.isin(y, torch.tensor(members, device=y.device))


def _top_minus_bottom(x: Tensor) -> Tensor:
    return x[:, :32].sum(1) - x[:, 32:].sum(1)


def _top_heavy(x: Tensor, y: Tensor, threshold: float) -> Tensor:
    return _top_minus_bottom(x) > threshold


def _inky(x: Tensor, y: Tensor, threshold: float) -> Tensor:
    return x.sum(1) > threshold


def digit_labelings(*, seed: int = 0) -> dict[str, Labeling]:
    """Return eight labelings of the digits; two of them look at the ink and not at the digit.

    Args:
        seed: of the split whose training images give the two thresholds (medians).

    Returns:
        Name to labeling, in a fixed order: digit, parity, at_least_five, mod_three, loop, prime, top_heavy, ink.
    """
    x, _ = digits("train", seed=seed)
    return {
        "digit": Labeling(10, _digit),
        "parity": Labeling(2, partial(_remainder, divisor=2)),
        "at_least_five": Labeling(2, partial(_at_least, least=5)),
        "mod_three": Labeling(3, partial(_remainder, divisor=3)),
        "loop": Labeling(2, partial(_among, members=(0, 4, 6, 8, 9))),
        "prime": Labeling(2, partial(_among, members=(2, 3, 5, 7))),
        "top_heavy": Labeling(2, partial(_top_heavy, threshold=_top_minus_bottom(x).median().item())),
        "ink": Labeling(2, partial(_inky, threshold=x.sum(1).median().item())),
    }
