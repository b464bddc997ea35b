"""What compressing experts saves, counted exactly, and how far their matrices can be cut."""

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.expert_merging import ExpertLayer, expert_view, m_smoe
from notebook_kit.expert_merging.factored import KINDS, FactoredExperts
from notebook_kit.expert_merging.low_rank import drop_rows, factor, row_sizes, split
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routing import RoutingTrace
from notebook_kit.routing.switch import heard_by


def compression_frame(model: nn.Module, trace: RoutingTrace) -> pd.DataFrame:
    """Count what each routed layer stores and computes, exactly.

    A token costs 2 operations (multiply, add) for each number of each expert it is sent to: what an expert stores is
    what it computes with. Merging alone stores less and computes the same; factors save both. Biases and gating, a
    few operations a unit, are left out.

    Args:
        model: a mixture of experts, whole, merged or factored.
        trace: of the model before it was merged (routers keep their rows), which says how often each row is picked.

    Returns:
        DataFrame: layer, experts, parameters, bytes (indices of kept rows included), flops (per token, on average).
    """
    rows = []
    for number, layer in enumerate(expert_view(model)):
        each, picks = _matrix_numbers(layer), trace.layer(number)
        load = torch.zeros(len(layer), dtype=torch.double)
        load.index_add_(0, torch.tensor(layer.expert_map), picks.load[: len(layer.expert_map)].double())
        per_token = (picks.experts >= 0).sum().item() / max(int(heard_by(trace, number).sum()), 1)
        stored = {id(t): t for t in layer.experts.parameters()}.values()
        size = sum(t.nbytes for t in [*stored, *layer.experts.buffers()])
        flops = 2 * per_token * float(load @ each)
        rows.append((layer.name, len(layer), sum(t.numel() for t in stored), size, flops))
    return pd.DataFrame(rows, columns=["layer", "experts", "parameters", "bytes", "flops"])


def _matrix_numbers(layer: ExpertLayer) -> Float[Tensor, " experts"]:
    """How many numbers the matrices of each stored expert hold."""
    if not isinstance(layer.experts, FactoredExperts):
        numbers = sum(part.numel() for name, part in zip(layer.parts, layer.expert(0), strict=True) if _is_matrix(name))
        return torch.full((len(layer),), float(numbers)).double()
    each = torch.zeros(len(layer), dtype=torch.double)
    for kind in layer.experts.kinds:
        left, right, place = (getattr(layer.experts, f"{kind}_{part}") for part in ("left", "right", "place"))
        kept = torch.bincount(place.long() // left.shape[1], minlength=len(layer))
        each += left[0].numel() + right[0].numel() + kept * right.shape[2]
    return each


def _is_matrix(part: str) -> bool:
    return not part.endswith("_bias")


def stable_rank_frame(model: nn.Module) -> pd.DataFrame:
    """How many directions each expert's matrices really use: stable rank ‖W‖_F² / ‖W‖_2², between 1 and the rank.

    Returns:
        DataFrame: layer, expert (stored), matrix, stable_rank.
    """
    rows = []
    for layer in expert_view(model):
        for kind in filter(_is_matrix, layer.parts):
            w = getattr(layer, kind).float()
            w = w if w.shape[1] <= w.shape[2] else w.mT
            squares = torch.linalg.eigvalsh(w @ w.mT)  # of the singular values
            for expert, value in enumerate((squares.sum(-1) / squares[:, -1]).tolist()):
                rows.append((layer.name, expert, kind, value))
    return pd.DataFrame(rows, columns=["layer", "expert", "matrix", "stable_rank"])


@dataclass(frozen=True)
class CompressionView:
    """One look at experts stored as low rank plus rows.

    Args:
        model: the compressed model.
        spectrum: singular values of the matrix shown, falling.
        rank: r.
        stored: numbers of the experts' factors: {"low rank": n, "rows": n}.
        before: numbers that the experts of the original store.
        flops: operations per token in the experts, before and after.
        name: of the matrix shown.
    """

    model: nn.Module = field(repr=False)
    spectrum: np.ndarray = field(repr=False)
    rank: int
    stored: dict[str, int]
    before: int
    flops: tuple[float, float]
    name: str


def compression_view(
    model: nn.Module,
    trace: RoutingTrace,
    *,
    n_experts: Annotated[int, Range(1, 512)] = 4,
    rank: Annotated[int, Range(1, 1024, log=True)] = 32,
    density: Annotated[float, Range(0, 1)] = 0.1,
    layer: Annotated[int, Range(0, 511)] = 0,
    matrix: Annotated[str, Choice(*KINDS)] = "gate",
    cache: dict | None = None,
) -> CompressionView:
    """Merge experts and store them as low rank plus rows, untrained: `mc_smoe` with steps=0, fast enough to drag.

    Args:
        model: a fused mixture of experts; not modified.
        trace: `record_routing(model)`.
        n_experts: experts that each layer stores.
        rank: r.
        density: share of the rows of S that stays.
        layer: whose first expert's spectrum is shown.
        matrix: which of its matrices.
        cache: remembers decompositions from call to call.

    Raises:
        ValueError: as `mc_smoe`; no such layer.
    """
    layers = expert_view(model)
    if layer >= len(layers):
        raise ValueError(f"layer must be in [0, {len(layers) - 1}], got {layer} (compression_view)")
    cache = {} if cache is None else cache
    if n_experts not in cache:
        cache[n_experts] = m_smoe(model, trace, n_experts=n_experts), {}
    merged, known = cache[n_experts]

    def remembered(w: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
        key = (w.data_ptr(), tuple(w.shape))
        if key not in known:
            known[key] = torch.linalg.svd(w.float(), full_matrices=False)
        return split(w, r, known[key])

    key = (n_experts, rank, density)
    if cache.get("key") != key:
        new = factor(merged, rank, remembered)
        drop_rows(new, row_sizes(new), density)
        cache |= {"key": key, "model": new}
    new = cache["model"]
    numbers = {"low rank": 0, "rows": 0}
    for one in expert_view(new):
        for name, parameter in one.experts.named_parameters():
            if not name.endswith("_bias"):
                numbers["rows" if name.endswith("_rows") else "low rank"] += parameter.numel()
    old, now = (compression_frame(m, trace)[["parameters", "flops"]].sum() for m in (model, new))
    spectrum = torch.linalg.svdvals(getattr(expert_view(merged)[layer], matrix)[0].float()).cpu().numpy()
    name = f"{matrix}, layer {layer}"
    return CompressionView(new, spectrum, rank, numbers, int(old["parameters"]), (old["flops"], now["flops"]), name)
