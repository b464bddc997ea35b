"""Adapters merged where they act, in the change of the weights: never factor by factor.

    ΔW_i = s_i B_i A_i        ΔW = Σ_i w_i ΔW_i = [w_1 s_1 B_1 ... w_K s_K B_K] [A_1; ...; A_K]

B_i [d_out, r_i], A_i [r_i, d_in]; s_i: the scaling, alpha / rank (rsLoRA: alpha / sqrt(rank)); w_i: `weights`.
The right side has rank Σ r_i at most. QR of both thin factors and the SVD of one small matrix give its singular
values without forming ΔW; the leading `rank` of them are the best approximation of that rank (Eckart, Young 1936).
Sums of the factors themselves, (Σ √w_i B_i)(Σ √w_i A_i), carry the cross terms B_i A_j of strangers; they are what
peft's `add_weighted_adapter(combination_type="linear")` makes (`diagnostics.merges.factorwise`).
Limits: LoRA on linear layers. A merging method other than the sum looks at one dense ΔW at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from notebook_kit.adapters.merged import MergedAdapter
from notebook_kit.adapters.read import AdapterFactors, Source, read_adapter
from notebook_kit.catalog import entry_of
from notebook_kit.hyperparameters import hyperparameters, validate
from notebook_kit.weights import expert_weights

ZERO = 1e-7  # singular values below this share of the largest are rounding


def merge_adapters(
    adapters: Sequence[Source],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    *,
    method: Callable | None = None,
    names: Sequence[str] | None = None,
    **values,
) -> MergedAdapter:
    """Merge LoRA adapters in the space of the weights' changes, and write the result as one adapter again.

    Args:
        adapters: what `read_adapter` reads: peft folders; models that carry LoRA; (tensors, scaling) with the tensors
            of `adapter_weights` or of a peft file. Ranks, alphas and target modules may differ: a module that an
            adapter lacks has ΔW = 0 there. The merge is made on the first adapter's device.
        weights: one factor an adapter, which multiplies its ΔW before anything else; None means 1 for each.
        rank: of the result, at most; None keeps every direction (the sum is then exact).
        method: a merge of the kit, such as `ties`, on base 0 and experts w_i ΔW_i; None is the plain sum.
        names: of the adapters, for the report and errors.
        values: hyperparameters of `method`.

    Returns:
        MergedAdapter: `.factors`, `.report` (rank, error and missing adapters of each module), `.error`, `.deltas()`,
        `.on(base)`, `.save(folder)`.

    Raises:
        ValueError: no adapter, a rank below 1, two adapters with different shapes for one module, or what
            `read_adapter` raises.
        TypeError: `adapters` is one adapter, or hyperparameters without a method.
    """
    if isinstance(adapters, (str, Path, Mapping, nn.Module)):
        raise TypeError(f"adapters must be a sequence of adapters, got one {type(adapters).__name__}; write [adapter]")
    if not adapters:
        raise ValueError("adapters must hold at least one adapter, got none")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a whole number of at least 1, or None for the exact sum, got {rank!r}")
    if method is None and values:
        raise TypeError(f"{', '.join(values)}: only a `method` has hyperparameters; the plain sum has none")
    sources = [read_adapter(source) for source in adapters]
    device = next((left.device for left, _ in sources[0].factors.values()), torch.device("cpu"))
    sources = [source.to(device) for source in sources]
    factors = expert_weights(weights, len(sources))
    labels = _labels(sources, names)
    modules = _modules(sources, labels)
    merged = None if method is None else _by_method(method, sources, factors, modules, device, values)

    result, rows = {}, []
    for name in modules:
        pairs = [
            (w, source.factors[name]) for w, source in zip(factors, sources, strict=True) if name in source.factors
        ]
        u, s, vh = _sum_svd(pairs) if merged is None else torch.linalg.svd(merged(name).double(), full_matrices=False)
        full = max(1, int((s > ZERO * s[0]).sum())) if s[0] > 0 else 1
        kept = min(full, rank or full)
        root = s[:kept].sqrt()
        result[name] = ((u[:, :kept] * root).float(), (root[:, None] * vh[:kept]).float())
        norm = float(s.norm())
        missing = [label for label, each in zip(labels, sources, strict=True) if name not in each.factors]
        row = {"module": name, "rank_before": full if norm else 0, "rank": kept, "norm": norm}
        rows.append(row | {"error": float(s[kept:full].norm()) / norm if norm else 0.0, "missing": ", ".join(missing)})
    return MergedAdapter(result, tuple(rows), sources[0])


def _sum_svd(pairs: Sequence[tuple[float, tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of Σ w left @ right from the thin factors, in float64; one larger than the matrix is formed instead."""
    left = torch.cat([w * left.double() for w, (left, _) in pairs], dim=1)
    right = torch.cat([right.double() for _, (_, right) in pairs], dim=0)
    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        return torch.linalg.svd(left @ right, full_matrices=False)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, s, vh @ q_right.T


class _Deltas(Mapping[str, Tensor]):
    """An adapter's dense changes as a state dict: one is made when it is asked for, and not kept."""

    def __init__(
        self, source: AdapterFactors, weight: float, modules: Mapping[str, tuple[int, int]], device: torch.device
    ):
        self.source, self.weight, self.modules, self.device = source, weight, modules, device

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.source.factors:
            return torch.zeros(self.modules[name], device=self.device)
        left, right = self.source.factors[name]
        return (self.weight * left) @ right

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


def _by_method(
    method: Callable,
    sources: Sequence[AdapterFactors],
    factors: Sequence[float],
    modules: Mapping[str, tuple[int, int]],
    device: torch.device,
    values: dict,
) -> Callable[[str], Tensor]:
    """A function that merges one module's dense changes by `method`; what it must know of the whole is seen before."""
    if isinstance(method, partial):
        values, method = {**method.keywords, **values}, method.func
    schema = hyperparameters(method)
    validate(schema, {name: value for name, value in values.items() if name in schema})
    base = _Deltas(AdapterFactors({}), 0.0, modules, device)
    experts = [_Deltas(source, weight, modules, device) for source, weight in zip(sources, factors, strict=True)]
    entry = entry_of(method)
    if entry is not None and entry.statistics is not None:
        values = values | entry.statistics(base, experts, **values)

    def merged(name: str) -> Tensor:
        return method({name: base[name]}, [{name: expert[name]} for expert in experts], **values)[name]

    return merged


def _modules(sources: Sequence[AdapterFactors], labels: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Every module that some adapter changes, with (d_out, d_in)."""
    shapes: dict[str, tuple[int, int]] = {}
    owner: dict[str, str] = {}
    for label, source in zip(labels, sources, strict=True):
        for name, (left, right) in source.factors.items():
            shape = (left.shape[0], right.shape[1])
            if shapes.setdefault(name, shape) != shape:
                here, there = (f"{shape[0]} x {shape[1]}" for shape in (shape, shapes[name]))
                raise ValueError(
                    f"{name} is {here} in {label} but {there} in {owner[name]}: they belong to different models"
                )
            owner.setdefault(name, label)
    return shapes


def _labels(sources: Sequence[AdapterFactors], names: Sequence[str] | None) -> list[str]:
    if names is not None and len(names) != len(sources):
        raise ValueError(f"names must have one entry per adapter, {len(sources)}, got {len(names)}")
    return list(names or [source.label or f"adapters[{i}]" for i, source in enumerate(sources)])
