"""Batch norm after averaging: measure the running statistics again."""

from collections.abc import Iterable

import torch
from torch import nn

from notebook_kit.alignment.taps import each, listening, run

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def reset_batch_norm(model: nn.Module, batches: Iterable) -> None:
    """Measure the running mean and variance of every batch norm again, in place; nothing is trained.

    Averaged units vary less than the units they come from, since matched units are not perfectly correlated. The
    averaged statistics then divide by too much, layer after layer, and signals fade; with fresh statistics they do not.

    Args:
        model: merged network; its weights stay, its mode too.
        batches: inputs: tensors, or mappings of keyword arguments; every batch counts the same.

    Raises:
        ValueError: no batches, or a model without batch norm.

    Source: Ainsworth, Hayase and Srinivasa (2022) recompute them for ResNets; Jordan et al. (2022), REPAIR, say why.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch norm: there is nothing to reset (reset_batch_norm)")
    momenta = [norm.momentum for norm in norms]
    try:
        with listening(model, ()):  # dropout stays off
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean over batches
                norm.train()
            for batch in each(batches, "reset_batch_norm"):
                run(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
