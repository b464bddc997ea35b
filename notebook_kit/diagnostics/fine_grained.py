"""Numbers about thin experts: what a budget buys, how replaceable experts are, what a union of experts computes."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.mixtures import DeepSeekMoE, SelectiveAttention, UnionOfExperts


def budget(d_ff: int, n_experts: int, k: int, settings: Iterable[tuple[int, int]]) -> pd.DataFrame:
    """Tabulate what segmentation and shared experts make of one budget.

    Args:
        d_ff: D, width of a coarse expert.
        n_experts: N.
        k: K.
        settings: pairs of granularity m and shared experts K_s.

    Returns:
        DataFrame: granularity, shared, routed, picks, width (of an expert), total and active (hidden units),
        combinations (of routed experts that a token can pick).
    """
    rows = []
    for m, n_shared in settings:
        routed, picks, thin = m * n_experts - n_shared, m * k - n_shared, d_ff // m
        sizes = {"total": (routed + n_shared) * thin, "active": (picks + n_shared) * thin}
        row = {"granularity": m, "shared": n_shared, "routed": routed, "picks": picks, "width": thin}
        rows.append(row | sizes | {"combinations": math.comb(routed, picks)})
    return pd.DataFrame(rows)


@contextmanager
def altered(
    layer: DeepSeekMoE, *, masked: float = 0.0, shared: bool = True, k: int | None = None
) -> Iterator[DeepSeekMoE]:
    """Change how a trained layer routes while the block runs; afterwards it is as before.

    Args:
        layer: any.
        masked: share of the routed experts, each token's most probable, that it may not use; it picks among the rest,
            and the softmax is over these. So many are left that it can.
        shared: False takes the shared experts away and lets each token pick as many routed ones more.
        k: routed experts a token; None is as trained.

    Raises:
        ValueError: masked outside [0, 1), or k of none or more than there are.
    """
    router, n = layer.router, layer.router.n_experts
    if not 0 <= masked < 1:
        raise ValueError(f"masked must be in [0, 1), got {masked} (altered)")
    picks = (router.k if k is None else k) + (0 if shared else layer.n_shared)
    if not 1 <= picks <= n:
        raise ValueError(f"k must leave 1 to {n} routed experts a token, got {picks} (altered)")
    gone = min(round(masked * n), n - picks)
    before, common, plain = router.k, layer.shared, router.logits

    def logits(x: Tensor) -> Tensor:
        z = plain(x)
        return z.scatter(1, z.topk(gone, dim=1).indices, -torch.inf) if gone else z

    try:
        router.k, router.logits = picks, logits
        layer.shared = common if shared else None
        yield layer
    finally:
        router.k, layer.shared = before, common
        del router.logits


@torch.no_grad()
def ablations(
    layer: DeepSeekMoE, score: Callable[[], float], changes: Sequence[dict], *, name: str = "score"
) -> pd.DataFrame:
    """Score a model under changes of one of its layers.

    Args:
        layer: of the model.
        score: runs the model in evaluation mode and says how it did.
        changes: arguments of `altered`, one dict a row; {} is the layer as trained.
        name: of the score's column.

    Returns:
        DataFrame: a column for each argument of `altered`, and the score.
    """
    rows = []
    for change in changes:
        with altered(layer, **change):
            full = {"masked": 0.0, "shared": True, "k": layer.router.k} | change
            rows.append(full | {name: float(score())})
    return pd.DataFrame(rows)


@torch.no_grad()
def expert_similarity(layer: DeepSeekMoE, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "experts experts"]:
    """Compare what any two routed experts answer: the cosine of their outputs, mean over tokens.

    Args:
        layer: its routed experts are all run on all tokens.
        x: what the layer is given.

    Returns:
        Symmetric, ones on the diagonal; near 0 where experts have nothing to do with each other.
    """
    experts = layer.experts
    answers = experts(x.repeat(len(experts), 1), [len(x)] * len(experts)).unflatten(0, (len(experts), len(x)))
    unit = nn.functional.normalize(answers.float(), dim=-1)
    return torch.einsum("itd,jtd->ij", unit, unit) / max(len(x), 1)


def mean_similarity(similarity: Float[Tensor, "experts experts"]) -> float:
    """Return the mean over pairs of different experts; 0 for a single expert."""
    n = len(similarity)
    return float((similarity.sum() - similarity.diagonal().sum()) / max(n * (n - 1), 1))


def gate_gradient(layer: UnionOfExperts | SelectiveAttention, loss: Callable[[], Tensor]) -> float:
    """Return the norm of the loss's gradient in the gate of a union; 0 where there is none.

    Args:
        layer: with a gate for patches.
        loss: runs the model that the layer is in.
    """
    weight = layer.gate.router.weight
    value = loss()
    if not value.requires_grad:
        return 0.0
    (grad,) = torch.autograd.grad(value, weight, allow_unused=True)
    return 0.0 if grad is None else float(grad.norm())


def union_flops(layer: UnionOfExperts | SelectiveAttention) -> dict[str, float]:
    """Count multiply-adds of the last call, fillers included, and of the dense layer on the same tokens.

    Args:
        layer: after a call.

    Returns:
        "experts" and "dense"; for attention both with the scores, whose number is quadratic. Gates are not counted.

    Raises:
        ValueError: the layer was not called yet.
    """
    if layer.gate.taken is None:
        raise ValueError(f"{type(layer).__name__} must be called before its work can be counted (union_flops)")
    n_samples, m, n = layer.gate.taken.shape
    length = m * layer.gate.patch_size
    if isinstance(layer, UnionOfExperts):
        per_row = layer.slices.w_in[0].numel() + layer.slices.w_out[0].numel()
        return {"experts": float(layer.rows * per_row), "dense": float(n * n_samples * length * per_row)}
    head = layer.w_out.shape[2]
    per_row = layer.w_in[0].numel() + layer.w_out[0].numel()
    heads = n * n_samples
    count = math.isqrt(layer.pairs // max(heads, 1))  # tokens a head took, fillers included
    work = [heads * (c * per_row + 2 * c * c * head) for c in (count, length)]
    return dict(zip(("experts", "dense"), map(float, work), strict=True))


@contextmanager
def set_union(
    layers: Iterable[UnionOfExperts | SelectiveAttention],
    *,
    k: int | None = None,
    capacity_factor: float | None = None,
    gate_mode: str | None = None,
) -> Iterator[None]:
    """Let layers with gates for patches choose otherwise while the block runs.

    Args:
        layers: with data selection.
        k: experts a patch; None leaves it, and more than a layer has is all it has.
        capacity_factor: None is no limit.
        gate_mode: None leaves it.
    """
    layers = list(layers)
    before = [(layer.gate.k, layer.gate.capacity_factor, layer.gate.gate_mode) for layer in layers]
    try:
        for layer in layers:
            gate = layer.gate
            gate.k = gate.router.k = gate.k if k is None else min(k, gate.n_experts)
            gate.capacity_factor, gate.gate_mode = capacity_factor, gate_mode or gate.gate_mode
        yield
    finally:
        for layer, (old, factor, mode) in zip(layers, before, strict=True):
            layer.gate.k = layer.gate.router.k = old
            layer.gate.capacity_factor, layer.gate.gate_mode = factor, mode


@torch.no_grad()
def union_curve(
    layers: Sequence[UnionOfExperts | SelectiveAttention],
    score: Callable[[], float],
    settings: Iterable[dict],
) -> pd.DataFrame:
    """Score a model at several choices of k and capacity, beside the share of the dense layers' work.

    Args:
        layers: the unions in the model.
        score: runs the model, says how it did.
        settings: arguments of `set_union`.

    Returns:
        DataFrame: k, capacity_factor, gate_mode, share (of the dense layers' multiply-adds), score.
    """
    rows = []
    for setting in settings:
        with set_union(layers, **setting):
            value = float(score())
            flops = [union_flops(layer) for layer in layers]
            share = sum(f["experts"] for f in flops) / sum(f["dense"] for f in flops)
            gate = layers[0].gate
            rows.append(
                {"k": gate.k, "capacity_factor": gate.capacity_factor, "gate_mode": gate.gate_mode}
                | {"share": share, "score": value}
            )
    return pd.DataFrame(rows)
