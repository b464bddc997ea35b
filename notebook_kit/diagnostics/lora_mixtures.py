"""Numbers about mixtures of LoRA experts: how alike the experts are, who uses which, and what each k is worth."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from notebook_kit.mixtures import LoRAExperts
from notebook_kit.routing import Routing


@torch.no_grad()
def expert_distances(
    layer: LoRAExperts,
) -> tuple[Float[Tensor, "experts experts"], Float[Tensor, "experts experts"]]:
    """Compare what the experts of a layer add: ΔW_i = s_i B_i A_i, without making the matrices.

    Args:
        layer: a mixture.

    Returns:
        Frobenius distances ‖ΔW_i - ΔW_j‖, and cosines of the flattened ΔW (0 where one is zero), which know no scale.

    Source: Gao et al. 2024, section 4 (the distances).
    """
    B = layer.B.double() * layer.scaling.double()[:, None, None]
    A = layer.A.double()
    # <B_i A_i, B_j A_j> = Σ (B_iᵀ B_j) ⊙ (A_i A_jᵀ)
    inner = (torch.einsum("ior,jos->ijrs", B, B) * torch.einsum("ird,jsd->ijrs", A, A)).sum((2, 3))
    squares = inner.diagonal()
    distance = (squares[:, None] + squares[None] - 2 * inner).clamp_min(0).sqrt()
    distance.fill_diagonal_(0)
    size = squares.clamp_min(0).sqrt()
    cosine = inner / (size[:, None] * size[None]).clamp_min(torch.finfo(torch.float64).tiny)
    return distance.float(), cosine.clamp(-1, 1).float()


def redundancy(model: nn.Module) -> pd.DataFrame:
    """List how alike the experts of each layer are, and how evenly they are used.

    Args:
        model: carries mixtures of LoRA experts.

    Returns:
        DataFrame: a row a layer: module, n_experts, parameters (trainable), distance and cosine (means over pairs of
        experts, NaN for a single one), largest_load (share of the claims of the busiest expert in the last forward
        pass, NaN before any).

    Raises:
        ValueError: there is no such layer.
    """
    rows = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoRAExperts):
            continue
        distance, cosine = expert_distances(layer)
        i, j = torch.triu_indices(layer.n_experts, layer.n_experts, offset=1)
        own = [p for key, p in layer.named_parameters() if not key.startswith("host.") and p.requires_grad]
        rows.append(
            {
                "module": name,
                "n_experts": layer.n_experts,
                "parameters": sum(p.numel() for p in own),
                "distance": distance[i, j].mean().item(),
                "cosine": cosine[i, j].mean().item(),
                "largest_load": float("nan") if layer.routing is None else layer.routing.load.max().item(),
            }
        )
    if not rows:
        raise ValueError(f"{type(model).__name__} carries no mixture of LoRA experts")
    return pd.DataFrame(rows)


def usage(routing: Routing, labels: Int[Tensor, " tokens"], n_labels: int) -> Float[np.ndarray, "labels experts"]:
    """Say how much each label's tokens use each expert: mean of the weights.

    Args:
        routing: of a layer.
        labels: of each token, from 0; -1 is left out.
        n_labels: rows.
    """
    n_experts = routing.logits.shape[1]
    weights = routing.weights.detach()
    dense = weights.new_zeros(len(routing), n_experts).scatter_add(1, routing.experts.clamp_min(0), weights)
    keep = labels >= 0
    sums = dense.new_zeros(n_labels, n_experts).index_add(0, labels[keep], dense[keep])
    counts = torch.bincount(labels[keep], minlength=n_labels)
    return (sums / counts.clamp_min(1)[:, None]).cpu().numpy()


@torch.no_grad()
def group_shares(model: nn.Module) -> Float[np.ndarray, " layers"]:
    """Share of the weight that the first half of the experts got in the last forward pass, layer by layer.

    Args:
        model: carries `LoRAMoE`, and has been run.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoRAExperts)]
    return np.array([float(layer.routing.probs[:, : layer.n_experts // 2].sum(1).mean()) for layer in layers])


@dataclass(frozen=True)
class RankUse:
    """What `rank_use` measured.

    Args:
        scores: of each layer, s + b of every token and rank.
        labels: of each token.
        names: of the labels.
        curve: k to the model's score with k active ranks.
        k: of the training.
    """

    scores: Sequence[Float[np.ndarray, "tokens ranks"]]
    labels: Int[np.ndarray, " tokens"]
    names: Sequence[str]
    curve: dict[int, float]
    k: int


@torch.no_grad()
def rank_use(
    model: nn.Module,
    x: Tensor,
    labels: Int[Tensor, " tokens"],
    names: Sequence[str],
    score: Callable[[nn.Module], float],
    ks: Iterable[int],
) -> RankUse:
    """Record SMoRA's scores, and score the model with other numbers of active ranks than it was trained with.

    The gates keep the sum they were trained with, so that the strength of the change stays the same.

    Args:
        model: carries `SMoRA` of granularity 1 with renormalised gates; left as it was, in evaluation mode.
        x: inputs of the model.
        labels: of each token.
        names: of the labels.
        score: of the model, higher is better.
        ks: numbers of active ranks.
    """
    layers = [layer for layer in model.eval().modules() if isinstance(layer, LoRAExperts)]
    model(x)
    scores = [(layer.routing.probs + layer.router.bias).cpu().numpy() for layer in layers]
    trained, curve = layers[0].router.k, {}
    before = [(layer.router.k, layer.router.routed_scaling_factor) for layer in layers]
    try:
        for k in ks:
            for layer in layers:
                layer.router.k, layer.router.routed_scaling_factor = k, float(trained)
            curve[k] = float(score(model))
    finally:
        for layer, (k, factor) in zip(layers, before, strict=True):
            layer.router.k, layer.router.routed_scaling_factor = k, factor
    return RankUse(scores, labels.cpu().numpy(), list(names), curve, trained)
