"""How the language beds were trained: minutes each, on one core.

The text is small (about 90 kB for training), so that a model soon learns it by heart. Against that: a tenth of the
input bytes is replaced by random ones, weights decay, and of all evaluations the checkpoint with the best validation
loss is kept.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.data import LANGUAGES, byte_batches, byte_windows, udhr
from notebook_kit.models import tiny_llama, tiny_mixtral
from notebook_kit.training import fit
from notebook_kit.zoo import language as beds
from notebook_kit.zoo import store
from notebook_kit.zoo.specialisation import expert_load, first_experts, window_information

LLAMA = {"hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 256, "initializer_range": 0.05}
MIXTRAL = {**LLAMA, "intermediate_size": 128, "tie_word_embeddings": False}
NOISE, WEIGHT_DECAY, BALANCE = 0.1, 0.1, 1e-3
Batch = tuple[Tensor, Tensor]


class KeepBest:
    """Evaluate on validation text and remember the weights that did best.

    Args:
        languages: whose validation text counts.
    """

    def __init__(self, languages: Sequence[str]):
        self.windows = {name: byte_windows(udhr(name, "val"), beds.LENGTH) for name in languages}
        self.loss, self.weights = math.inf, {}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the validation loss in nats per byte."""
        figures = beds.log_likelihood(model, None, self.windows)
        loss = -sum(figures.values()) / len(figures)
        if loss < self.loss:
            self.loss = loss
            self.weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        return {"val_loss": loss}


def _draw(languages: Sequence[str], batch_size: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    texts = {name: udhr(name, "train") for name in languages}
    return byte_batches(texts, batch_size=batch_size, length=beds.LENGTH)


def _batches(language: str | None = None) -> Callable[[torch.Generator], Batch]:
    """Draw 32 windows of all languages; with a language, half of them from it alone."""
    parts = [_draw(LANGUAGES, 32)] if language is None else [_draw(LANGUAGES, 16), _draw([language], 16)]

    def batches(generator: torch.Generator) -> Batch:
        ids = torch.cat([part(generator)[0] for part in parts])
        inputs, targets = ids[:, :-1], ids[:, 1:]
        noisy = torch.rand(inputs.shape, generator=generator) < NOISE
        return torch.where(noisy, torch.randint(256, inputs.shape, generator=generator), inputs), targets

    return batches


def next_byte(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy in nats per byte."""
    return F.cross_entropy(model(input_ids=batch[0]).logits.flatten(0, 1), batch[1].flatten())


def imbalance(logits: Float[Tensor, "tokens experts"], k: int) -> Tensor:
    """Return one layer's load-balancing loss E * sum_e f_e P_e, 1 when the load is even (Switch Transformers)."""
    probs = logits.softmax(-1)
    chosen = torch.zeros_like(probs).scatter_(-1, logits.topk(k, dim=-1).indices, 1.0)
    return logits.shape[-1] * (chosen.mean(0) / k * probs.mean(0)).sum()


def next_byte_balanced(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy plus the balance of each layer (transformers' own loss balances only their sum)."""
    output = model(input_ids=batch[0], output_router_logits=True)
    balance = torch.stack([imbalance(logits, model.config.num_experts_per_tok) for logits in output.router_logits])
    return F.cross_entropy(output.logits.flatten(0, 1), batch[1].flatten()) + BALANCE * balance.mean()


def cosine(share: float) -> float:
    """Return the learning rate's factor: up over the first twentieth, then down half a cosine."""
    return min(1.0, 20 * share + 0.02) * (0.5 + 0.5 * math.cos(math.pi * share))


def train_language_experts(seed: int = 0) -> None:
    """Train the base on twelve languages, then fine-tune one copy for each of six.

    The base stops early, so that experts have something to learn; half of an expert's batch is still of all languages
    (replay), so that it does not forget the others.
    """
    store.write_config("language_experts", LLAMA)
    best, model = KeepBest(LANGUAGES), tiny_llama(seed, **LLAMA)
    settings = {"weight_decay": WEIGHT_DECAY, "evaluate": best, "evaluate_every": 50, "schedule": cosine}
    settings |= {"seed": seed, "desc": "language_experts: base"}
    fit(model, _batches(), next_byte, steps=400, lr=2e-3, **settings)
    store.write("language_experts", "base", best.weights, torch.float16)
    base = store.read("language_experts", "base")
    for i, name in enumerate(beds.EXPERT_LANGUAGES):
        model.load_state_dict(base)
        best = KeepBest([name])
        settings |= {"evaluate": best, "evaluate_every": 20, "seed": seed + 1 + i, "desc": f"language_experts: {name}"}
        fit(model, _batches(name), next_byte, steps=80, lr=4e-4, **settings)
        store.write("language_experts", name, best.weights, torch.float16)


def train_language_moe(seed: int = 0) -> dict:
    """Train the mixture and report its router, on held-out text: information about the language, and load."""
    store.write_config("language_moe", MIXTRAL)
    best, model = KeepBest(LANGUAGES), tiny_mixtral(seed, **MIXTRAL)
    settings = {"weight_decay": WEIGHT_DECAY, "evaluate": best, "evaluate_every": 50, "schedule": cosine}
    fit(model, _batches(), next_byte_balanced, steps=1400, lr=2e-3, seed=seed, desc="language_moe", **settings)
    store.write("language_moe", "base", best.weights, torch.float16)
    return {"router": router_report(beds.language_moe().model)}


def router_report(model: nn.Module, split: str = "test") -> list[dict]:
    """Return, per layer, bits of information about the language beside chance, and each expert's load."""
    windows = beds.language_windows(split).values()
    ids = torch.cat(list(windows))
    labels = torch.repeat_interleave(torch.arange(len(windows)), torch.tensor([len(w) for w in windows]))
    loads = expert_load(model, ids, model.config.num_experts_per_tok).tolist()
    layers = [window_information(labels, experts) for experts in first_experts(model, ids)]
    return [
        {key: round(bits, 4) for key, bits in layer.items()} | {"load": [round(share, 4) for share in load]}
        for layer, load in zip(layers, loads, strict=True)
    ]
