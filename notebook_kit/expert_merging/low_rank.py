"""A matrix as low rank plus rows: W = L R + S, and the rows of S that matter."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.expert_merging.factored import KINDS, FactoredExperts, factor_experts
from notebook_kit.expert_merging.mapped import describe
from notebook_kit.expert_merging.view import expert_view
from notebook_kit.weights import at_least_float32


def split(
    w: Float[Tensor, "out in"], rank: int, svd: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"], Float[Tensor, "out in"]]:
    """W = L R + S with L R the best approximation of rank r, its singular values shared out to both sides.

    Args:
        w: W.
        rank: r.
        svd: of W, if it is known already.

    Raises:
        ValueError: the rank is above what W can have.
    """
    if not 1 <= rank <= min(w.shape):
        raise ValueError(f"rank must be in [1, {min(w.shape)}] for matrices of {tuple(w.shape)}, got {rank}")
    w = at_least_float32(w)
    u, s, vt = torch.linalg.svd(w, full_matrices=False) if svd is None else svd
    root = s[:rank].sqrt()
    left, right = u[:, :rank] * root, root[:, None] * vt[:rank]
    return left, right, w - left @ right


@torch.no_grad()
def factor(model: nn.Module, rank: int, split: Callable = split) -> nn.Module:
    """Copy a (merged) model with every expert's matrix as L R + S, all rows of S kept: the same function."""
    experts = {}
    for layer in expert_view(model):
        stored = [dict(zip(layer.parts, layer.expert(e), strict=True)) for e in range(len(layer))]
        experts[layer.name] = [{n: split(w, rank) if n in KINDS else w for n, w in one.items()} for one in stored]
    return factor_experts(model, experts, {layer.name: layer.expert_map for layer in expert_view(model)})


def row_sizes(student: nn.Module) -> list[Tensor]:
    """Mean square of each row of S: its importance before anything is learned."""
    places = [(layer.experts, kind) for layer in expert_view(student) for kind in layer.experts.kinds]
    return [rows_of(*place).detach().float().square().mean(1).cpu() for place in places]


def drop_rows(student: nn.Module, importance: list[Tensor], density: float, alive: list[Tensor] | tuple = ()) -> None:
    """Keep the most important rows of S over all layers together, and really drop the others, in place."""
    places = [(layer.experts, kind) for layer in expert_view(student) for kind in layer.experts.kinds]
    for (experts, kind), rows in zip(places, top_rows(importance, alive, density), strict=True):
        experts.keep_rows(kind, rows)
    describe(student.config, {layer.name: layer.experts for layer in expert_view(student)})


def rows_of(experts: FactoredExperts, kind: str) -> Float[Tensor, "kept in"]:
    """The rows of S that one kind of matrix keeps, of all experts together."""
    return getattr(experts, f"{kind}_rows")


def top_rows(importance: list[Tensor], alive: list[Tensor] | tuple, share: float) -> list[Tensor]:
    """Of all rows together, the share that matters most; a row that fell is never among them."""
    scores = torch.cat(importance)
    if alive:
        scores = scores.masked_fill(~torch.cat(alive), -1)
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[scores.argsort(descending=True, stable=True)[: round(share * len(scores))]] = True
    return list((keep & (scores >= 0)).split([len(i) for i in importance]))
