"""Experts averaged entry by entry, each entry as far as the loss feels it: an ablation of M-SMoE.

    W = Σ_i F_i * π_i(W_i) / Σ_i F_i,     F = mean over batches of (∂L/∂W)²

L is the mean loss of the next token on a batch, F the diagonal of the empirical Fisher information, in W's shape; it is
permuted with W, but has no signs. Where no member of a group feels an entry, the plan's weights decide.
Source: Li et al. (2023), ablation of the merging weights; UNITES-Lab/MC-SMoE, `merging/fisher.py`. With one gradient a
batch, as there, gradients of different sequences cancel before they are squared: small batches are better.
"""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.alignment import Permutations, permute_tensor
from notebook_kit.alignment.taps import each, listening
from notebook_kit.expert_merging.align_experts import Aligner, ExpertWeights, spec_of
from notebook_kit.expert_merging.apply import Combine, Expert
from notebook_kit.expert_merging.view import ExpertLayer, expert_view

FELT = 1e-12  # as a share of a tensor's mean Fisher information: below, nothing is felt


def expert_fishers(model: nn.Module, batches: Iterable) -> dict[str, ExpertLayer]:
    """Measure how much the loss feels every entry of every expert.

    Args:
        model: a language model; not modified.
        batches: token ids [n, length], or mappings with `input_ids`, of an encoder and a decoder with
            `decoder_input_ids` too; one gradient each.

    Returns:
        Block name to an `ExpertLayer` that holds F in place of weights.

    Raises:
        ValueError: no batches, one without token ids, or a model without logits.
    """
    layers = expert_view(model)
    weights = [p for layer in layers for p in layer.experts.parameters()]
    total, n = [torch.zeros_like(p, dtype=torch.float32) for p in weights], 0
    wanted = [p.requires_grad for p in weights]
    try:
        with listening(model, ()), torch.enable_grad():
            for p in weights:
                p.requires_grad_()
            for batch in each(batches, "expert_fishers"):
                gradients = torch.autograd.grad(_loss(model, batch), weights, allow_unused=True)
                for square, g in zip(total, gradients, strict=True):
                    if g is not None:
                        square.add_(g.float().square())
                n += 1
    finally:
        for p, want in zip(weights, wanted, strict=True):
            p.requires_grad_(want)
    squares = iter(total)
    fishers = {}
    for layer in layers:
        experts = copy.deepcopy(layer.experts)
        for p in experts.parameters():
            p.data = next(squares) / n
        block = nn.Module()
        block.experts, block.gate = experts, layer.router_module
        fishers[layer.name] = ExpertLayer(layer.name, block)
    return fishers


def fisher_average(aligner: Aligner, fishers: Mapping[str, ExpertLayer]) -> Combine:
    """Combine a group by W = Σ_i F_i π_i(W_i) / Σ_i F_i, every member first brought into the order of the first.

    Args:
        aligner: how members are brought into that order.
        fishers: from `expert_fishers`.
    """

    def combine(layer: ExpertLayer, group: tuple[int, ...], weights: tuple[float, ...]) -> Expert:
        spec, merged = spec_of(layer), []
        orders = [aligner.order(layer, e, group[0]) for e in group]
        for name in ExpertWeights(layer, group[0]):
            places, parts, felt = spec.parts(name), [], []
            for e, order in zip(group, orders, strict=True):
                parts.append(permute_tensor(spec, order, ExpertWeights(layer, e)[name], places))
                unsigned, f = Permutations(order), ExpertWeights(fishers[layer.name], e)[name]
                felt.append(permute_tensor(spec, unsigned, f, places))
            whole = sum(felt)
            blind = whole <= FELT * whole.mean()
            shares = [torch.where(blind, f, one / whole.clamp(min=1e-38)) for f, one in zip(weights, felt, strict=True)]
            merged.append(sum(share * part for share, part in zip(shares, parts, strict=True)))
        return tuple(merged)

    return combine


def _loss(model: nn.Module, batch) -> Tensor:
    pairs = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if pairs and not (hasattr(batch, "keys") and "decoder_input_ids" in batch):
        raise ValueError(
            f"Fisher information of a {type(model).__name__} needs batches with input_ids and decoder_input_ids"
        )
    ids = batch["decoder_input_ids" if pairs else "input_ids"] if hasattr(batch, "keys") else batch
    if ids.dim() != 2 or ids.shape[1] < 2 or ids.is_floating_point():
        raise ValueError(f"Fisher information needs token ids [n, length >= 2], got {list(ids.shape)} of {ids.dtype}")
    logits = getattr(model(**batch) if pairs else model(ids), "logits", None)
    if logits is None:
        raise ValueError(f"Fisher information needs a language model, and {type(model).__name__} gives no logits")
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:])
