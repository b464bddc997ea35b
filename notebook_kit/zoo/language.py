"""The language beds: byte models of the Universal Declaration, fine-tuned per language, or a mixture of experts."""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from notebook_kit.data import LANGUAGES, byte_windows, udhr
from notebook_kit.models import tiny_llama, tiny_mixtral
from notebook_kit.zoo import store
from notebook_kit.zoo.bed import Bed

LENGTH = 128
UNIT = "log-likelihood (nats per byte)"
EXPERT_LANGUAGES = ("deu", "spa", "fin", "tur", "pol", "vie")


def language_experts() -> Bed:
    """Return six fine-tunes of one byte-level Llama, each on a language of another family or branch.

    The base learned all twelve languages for a short time; the experts are German, Spanish, Finnish, Turkish, Polish,
    Vietnamese, each trained on batches of which half is its language and half is all twelve (replay).

    Returns:
        Bed of `LlamaForCausalLM` (0.35 M parameters); score: mean log-likelihood in nats per byte over the six
        languages' held-out articles.
    """
    model, base = tiny_llama(**store.read_config("language_experts")), store.read("language_experts", "base")
    model.load_state_dict(base)
    experts = [store.read("language_experts", name) for name in EXPERT_LANGUAGES]
    return Bed(model.eval(), base, experts, list(EXPERT_LANGUAGES), log_likelihood, expert_windows, UNIT)


def language_moe() -> Bed:
    """Return a byte-level Mixtral, 8 experts of which 2 are used, trained on twelve languages.

    How far its router tells languages apart is measured, beside chance, in `manifest()["language_moe"]`.

    Returns:
        Bed of `MixtralForCausalLM` (1 M parameters) without experts of its own; `names` are the languages; score:
        mean log-likelihood in nats per byte over their held-out articles.
    """
    model, base = tiny_mixtral(**store.read_config("language_moe")), store.read("language_moe", "base")
    model.load_state_dict(base)
    return Bed(model.eval(), base, [], list(LANGUAGES), log_likelihood, language_windows, UNIT)


def language_windows(split: str) -> dict[str, Int[Tensor, "n length"]]:
    """Return the windows of all twelve languages."""
    return {language: byte_windows(udhr(language, split), LENGTH) for language in LANGUAGES}


def expert_windows(split: str) -> dict[str, Int[Tensor, "n length"]]:
    """Return the windows of the six languages that have an expert."""
    return {language: byte_windows(udhr(language, split), LENGTH) for language in EXPERT_LANGUAGES}


@torch.no_grad()
def log_likelihood(
    model: nn.Module, weights: Mapping[str, Tensor] | None, data: dict[str, Int[Tensor, "n length"]]
) -> dict[str, float]:
    """Return each language's mean log-likelihood in nats per byte; a window's first byte is given, not predicted."""
    ids = torch.cat(list(data.values()))
    inputs = {"input_ids": ids, "use_cache": False}
    output = model(**inputs) if weights is None else functional_call(model, dict(weights), (), inputs)
    logits = output.logits[:, :-1].transpose(1, 2)  # [n, 256, length - 1]
    per_window = -F.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)
    parts = per_window.split([len(windows) for windows in data.values()])
    return dict(zip(data, [part.mean().item() for part in parts], strict=True))
