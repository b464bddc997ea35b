"""The digit beds: tasks that differ in labels, tasks that differ in inputs, and twins that differ in their seed."""

from collections.abc import Mapping
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from notebook_kit.data import VIEWS, digit_labelings, digits
from notebook_kit.models import MLP, DigitEncoder
from notebook_kit.zoo import store
from notebook_kit.zoo.bed import Bed

TWIN_WIDTHS = (32, 64, 128)
Batch = tuple[Float[Tensor, "n 64"], Int[Tensor, " n"]]


def label_encoder() -> DigitEncoder:
    """Return an untrained encoder with head rows for the classes of all labelings, in their order."""
    return DigitEncoder(sum(labeling.n_classes for labeling in digit_labelings().values()), seed=0)


def view_encoder() -> DigitEncoder:
    """Return an untrained encoder with ten head rows, which all views share."""
    return DigitEncoder(10, seed=0)


def digit_labels() -> Bed:
    """Return the label bed: eight experts that see the same digits and answer eight different questions.

    The base is a denoising autoencoder's encoder; each task reads the encoder through its own frozen head.

    Returns:
        Bed of `DigitEncoder` (33 k parameters); score: mean accuracy over the eight labelings.
    """
    return _bed("digit_labels", label_encoder(), list(digit_labelings()), label_accuracy, label_data)


def digit_views() -> Bed:
    """Return the view bed: eight experts that name the digit, each fine-tuned on one transformation of the image.

    Returns:
        Bed of `DigitEncoder` (33 k parameters) with one frozen 10-class head; score: mean accuracy over the views.
    """
    return _bed("digit_views", view_encoder(), list(VIEWS), view_accuracy, view_data)


def digit_twins(width: int = 64) -> Bed:
    """Return two networks that learned the same task from different seeds, for permutation alignment.

    Args:
        width: of the two hidden layers: 32, 64 or 128.

    Returns:
        Bed of ReLU `MLP` 64-width-width-10; base = A, experts = A and B; score: accuracy.

    Raises:
        ValueError: this width is not in the zoo.
    """
    if width not in TWIN_WIDTHS:
        raise ValueError(f"no twins of width {width}: choose one of {', '.join(map(str, TWIN_WIDTHS))}")
    model = MLP([64, width, width, 10], "relu")
    return _bed(f"digit_twins_{width}", model, ["A", "B"], twin_accuracy, twin_data, base="A")


def _bed(bed: str, model: nn.Module, names: list[str], measure, inputs, base: str = "base") -> Bed:
    weights = store.read(bed, base)
    model.load_state_dict(weights)
    return Bed(model.eval(), weights, [store.read(bed, name) for name in names], names, measure, inputs, "accuracy")


@lru_cache(maxsize=3)
def _labels(split: str) -> dict[str, Tensor]:
    x, y = digits(split)
    return {name: labeling(x, y) for name, labeling in digit_labelings().items()}


def label_data(split: str) -> dict[str, Batch]:
    """Return task to (the same pixels for all, that labeling's classes)."""
    x, _ = digits(split)
    return {name: (x, classes.clone()) for name, classes in _labels(split).items()}


def view_data(split: str) -> dict[str, Batch]:
    """Return view to (transformed pixels, digits)."""
    x, y = digits(split)
    return {name: (view(x), y) for name, view in VIEWS.items()}


def twin_data(split: str) -> dict[str, Batch]:
    """Return the one task: (pixels, digits)."""
    return {"digit": digits(split)}


@torch.no_grad()
def _logits(model: nn.Module, weights: Mapping[str, Tensor] | None, x: Float[Tensor, "n 64"]) -> Float[Tensor, "n c"]:
    return model(x) if weights is None else functional_call(model, dict(weights), (x,))


def label_accuracy(model: nn.Module, weights: Mapping[str, Tensor] | None, data: dict[str, Batch]) -> dict[str, float]:
    """Return each labeling's accuracy; the pixels are the same, so that one forward pass serves all."""
    x, _ = next(iter(data.values()))
    sizes = [labeling.n_classes for labeling in digit_labelings().values()]
    parts = _logits(model, weights, x).split(sizes, dim=-1)
    hits = [(part.argmax(-1) == y).float().mean() for part, (_, y) in zip(parts, data.values(), strict=True)]
    return dict(zip(data, torch.stack(hits).tolist(), strict=True))


def view_accuracy(model: nn.Module, weights: Mapping[str, Tensor] | None, data: dict[str, Batch]) -> dict[str, float]:
    """Return each view's accuracy, from one forward pass over all of them."""
    x, y = (torch.cat(parts) for parts in zip(*data.values(), strict=True))
    hits = (_logits(model, weights, x).argmax(-1) == y).float()
    parts = hits.split([len(classes) for _, classes in data.values()])
    return dict(zip(data, [part.mean().item() for part in parts], strict=True))


def twin_accuracy(model: nn.Module, weights: Mapping[str, Tensor] | None, data: dict[str, Batch]) -> dict[str, float]:
    """Return the accuracy of naming the digit."""
    return view_accuracy(model, weights, data)
