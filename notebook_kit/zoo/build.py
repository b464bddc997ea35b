"""Train the zoo again: `python -m notebook_kit.zoo.build [name ...]`, all beds when no name is given."""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from notebook_kit.zoo import diffusion, digits, language, store, train_diffusion, train_digits, train_language
from notebook_kit.zoo.bed import Bed

SEED = 0


def _recipes() -> dict[str, tuple[Callable[..., None], Callable[[], Bed]]]:
    recipes = {
        "digit_labels": (train_digits.train_digit_labels, digits.digit_labels),
        "digit_views": (train_digits.train_digit_views, digits.digit_views),
    }
    for width in digits.TWIN_WIDTHS:
        train = partial(train_digits.train_digit_twins, width)
        recipes[f"digit_twins_{width}"] = (train, partial(digits.digit_twins, width))
    for kind in diffusion.KINDS:
        train = partial(train_diffusion.train_digit_diffusion, kind)
        recipes[f"digit_diffusion_{kind}"] = (train, partial(diffusion.digit_diffusion, kind))
    recipes["language_experts"] = (train_language.train_language_experts, language.language_experts)
    recipes["language_moe"] = (train_language.train_language_moe, language.language_moe)
    return recipes


def build(name: str) -> dict:
    """Train one bed, save its checkpoints, measure what was saved, and write its entry of the manifest.

    Args:
        name: of the bed.

    Returns:
        The entry: seed, minutes (CPU time), score (test split: checkpoint to task to figure).

    Raises:
        ValueError: the name is unknown.
    """
    recipes = _recipes()
    if name not in recipes:
        raise ValueError(f"unknown bed {name!r}: choose one of {', '.join(recipes)}")
    train, load = recipes[name]
    started = time.process_time()
    extra = train(seed=SEED) or {}
    minutes = (time.process_time() - started) / 60
    bed = load()
    measured = dict(zip(bed.names, bed.experts, strict=True)) if bed.experts else {}
    if "A" not in measured:  # of twins, A is the base
        measured = {"base": bed.base} | measured
    scores = {key: {task: round(v, 5) for task, v in bed.score(w).tasks.items()} for key, w in measured.items()}
    entry = {"seed": SEED, "minutes": round(minutes, 2), "score": scores, **extra}
    store.record(name, entry)
    return entry


def main() -> None:
    """Build the beds named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"any of {', '.join(_recipes())}")
    names = parser.parse_args().names or list(_recipes())
    torch.set_num_threads(1)
    for name in names:
        entry = build(name)
        print(name, f"{entry['minutes']:.2f} CPU-minutes", flush=True)
        for checkpoint, tasks in entry["score"].items():
            figures = " ".join(f"{task}={value:.3f}" for task, value in tasks.items())
            print(f"  {checkpoint:>14} {figures}", flush=True)


if __name__ == "__main__":
    main()
