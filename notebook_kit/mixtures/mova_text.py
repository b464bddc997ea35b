"""MoVA's words: the routing prompt, letters to experts and back, labels from losses, and a small vocabulary.

    prompt = "A <description> B <description> ... <question>"        answer = "A , C" or "none"
    label of a sample = experts that lower its answer loss by more than `margin`, best first, at most three

Source: Zong et al. 2024, section 3.2. Letters are matched as whole words: looking for the letter anywhere in the text
finds the A in "Answer".
"""

import re
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def routing_prompt(descriptions: Sequence[str], question: str) -> str:
    """List the experts by letter, then ask.

    Args:
        descriptions: one for each expert, at most 26.
        question: of the user.
    """
    if len(descriptions) > len(LETTERS):
        raise ValueError(f"there are {len(LETTERS)} letters, got {len(descriptions)} experts (MoVA)")
    return " ".join(f"{letter} {text}" for letter, text in zip(LETTERS, descriptions, strict=False)) + f" {question}"


def read_letters(text: str, n_experts: int, *, at_most: int = 3) -> Bool[Tensor, " experts"]:
    """Find the experts that a text names.

    Args:
        text: what the language model wrote, such as "A,D" or "none".
        n_experts: K; letters beyond it name nobody.
        at_most: the first so many different letters count.
    """
    found = dict.fromkeys(LETTERS.index(word) for word in re.findall(r"\b[A-Z]\b", text))
    mask = torch.zeros(n_experts, dtype=torch.bool)
    mask[[index for index in found if index < n_experts][:at_most]] = True
    return mask


def write_letters(experts: Sequence[int]) -> str:
    """Name experts, best first, or "none".

    Args:
        experts: their numbers.
    """
    return " , ".join(LETTERS[expert] for expert in experts) or "none"


def loss_labels(
    base: Float[Tensor, " samples"],
    with_expert: Float[Tensor, "samples experts"],
    *,
    at_most: int = 3,
    margin: float = 0.0,
) -> list[list[int]]:
    """Label each sample by the experts that help it, lowest loss first.

    Args:
        base: answer loss with the base encoder alone, in nats.
        with_expert: answer loss with each expert added.
        at_most: experts in a label.
        margin: nats by which an expert must lower the loss; 0 is the paper's, and labels luck too.
    """
    order = with_expert.argsort(dim=1, stable=True).tolist()
    helps = (with_expert < base[:, None] - margin).tolist()
    return [[e for e in row if ok[e]][:at_most] for row, ok in zip(order, helps, strict=True)]


class WordTokens:
    """A vocabulary of whole words; `encode` and `decode` as a tokenizer has them.

    Args:
        texts: all that will ever be said.
    """

    def __init__(self, texts: Sequence[str]):
        words = dict.fromkeys(word for text in texts for word in self._split(text))
        self.words = ["<pad>", "<end>", *words]
        self.ids = {word: index for index, word in enumerate(self.words)}
        self.pad, self.end = 0, 1

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Give the ids of a text's words.

        Raises:
            ValueError: a word that is not in the vocabulary.
        """
        unknown = [word for word in self._split(text) if word not in self.ids]
        if unknown:
            raise ValueError(f"the vocabulary has no word {unknown[0]!r}, only {', '.join(self.words[2:])}")
        return [self.ids[word] for word in self._split(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Join words up to the end."""
        kept = []
        for index in ids:
            if index == self.end:
                break
            kept.append(self.words[index])
        return " ".join(kept)

    @staticmethod
    def _split(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text)
