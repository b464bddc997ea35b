"""Which edits of an expert matter: a score for each, and one threshold for the whole model.

    fisher     s = v ⊙ Δ²     twice what undoing one edit costs, to second order
    magnitude  s = |Δ|
    curvature  s = v           what official OTA does where it has no base

Δ = θ_i − θ₀; v ≥ 0: curvature of the same shape. Scores are computed one tensor at a time, so that a model on disk is
never in memory as a whole; the k-th largest is found by `selection`, as for TIES.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from notebook_kit.merging.moments import compress_moment, restore_moment
from notebook_kit.merging.per_parameter import alias, check_overlap, find, place
from notebook_kit.merging.selection import Trim, trims
from notebook_kit.weights import Weights, at_least_float32, float_keys

MADE_BY = "training.fit(..., moments=...), squared_gradients or diagonal_fisher"


class Importance(Mapping):
    """√s of one expert's edits by tensor, flat, computed when asked for. (Of v Δ², the root fits float32's range.)

    Args:
        base: state dict θ₀.
        expert: state dict θ_i.
        moments: v by tensor name; tensors that it lacks are not scored.
        by: "fisher", "magnitude" or "curvature".
    """

    def __init__(self, base: Weights, expert: Weights, moments: Weights, by: str):
        self.base, self.expert, self.moments, self.by = base, expert, moments, by
        self.names: list[str] = []
        places = set()
        for name in float_keys(base):
            if alias(name, base, moments) is not None and (here := _place(base, name)) not in places:
                places.add(here)
                self.names.append(name)

    def __getitem__(self, name: str) -> Tensor:
        delta = at_least_float32(self.expert[name]) - at_least_float32(self.base[name])
        v = None if self.by == "magnitude" else self.moments[alias(name, self.base, self.moments)]
        return score_of(delta, v, self.by).reshape(-1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Nothing(Mapping):
    """A base of zeros that takes no memory: what stands over it is the importance itself."""

    def __init__(self, importance: Importance):
        self.importance = importance

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.importance.base[name]
        kind = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return torch.zeros(1, dtype=kind, device=tensor.device).expand(tensor.numel())

    def __iter__(self) -> Iterator[str]:
        return iter(self.importance)

    def __len__(self) -> int:
        return len(self.importance)


class Restored(Mapping):
    """Second moments as they are after compression, restored when asked for."""

    def __init__(self, moments: Weights, curvature: str, rank: int):
        self.moments, self.curvature, self.rank = moments, curvature, rank

    def __getitem__(self, name: str) -> Tensor:
        factors = compress_moment(self.moments[name], curvature=self.curvature, rank=self.rank, name=name)
        return restore_moment(factors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.moments)

    def __len__(self) -> int:
        return len(self.moments)


def compressed(base: Weights, moments: Sequence[Weights], curvature: str, rank: int) -> Sequence[Weights]:
    """Give the moments that a merge works with: in memory if the base is, else restored one by one."""
    if curvature == "full" or isinstance(moments, Mapping):
        return moments
    lazy = [Restored(of_expert, curvature, rank) for of_expert in moments]
    if not isinstance(base, dict):
        return lazy
    return [{name: of_expert[name] for name in base if name in of_expert.moments} for of_expert in lazy]


def thresholds(
    base: Weights, experts: Sequence[Weights], moments: Sequence[Weights], *, density: float, importance: str
) -> list[dict[str, Trim]]:
    """Find one threshold an expert, over its whole model."""
    for name in float_keys(base):
        find(name, base, moments, len(experts), "moments", source=MADE_BY)
    check_overlap(base, moments, "moments", source=MADE_BY)
    found = []
    for expert, of_expert in zip(experts, moments, strict=True):
        scores = Importance(base, expert, of_expert, importance)
        found += trims(_Nothing(scores), [scores], density=density, scope="model")
    return found


def score_of(delta: Float[Tensor, "..."], v: Tensor | None, by: str) -> Float[Tensor, "..."]:
    """√s of the edits of one tensor; magnitudes are s itself."""
    if by == "magnitude":
        return delta.abs()
    root = at_least_float32(v).to(delta.dtype).sqrt()
    return root if by == "curvature" else root * delta.abs()


def mask_of(
    name: str, base: Weights, delta: Tensor, v: Tensor | None, trim: Mapping[str, Trim], density: float, by: str
) -> Bool[Tensor, "..."]:
    """Say which edits of one tensor are kept; all of them where the tensor has no curvature."""
    if v is None or density == 1:
        return torch.ones_like(delta, dtype=torch.bool)
    first = name if name in trim else next(other for other in trim if place(base[other]) == place(base[name]))
    rule, s = trim[first], score_of(delta, v, by).reshape(-1)
    mask = s > max(rule.just_under(s.dtype), 0.0)
    if rule.drop.get(first):
        mask[(s == rule.threshold).nonzero().squeeze(-1)[: rule.drop[first]]] = False
    return mask.reshape(delta.shape)


def _place(base: Weights, name: str) -> tuple:
    return place(base[name]) if isinstance(base, dict) and base[name].numel() else (name,)
