"""What Frank-Wolfe asks at each step: the gradient of the targets' loss, and which vertex it points away from most."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from notebook_kit.merging.objective import Objective
from notebook_kit.weights import Weights, at_least_float32


def gradients_of(
    objective: Objective, theta: Mapping[str, Tensor], owners: Mapping[str, str], names: Sequence[str], variant: str
) -> tuple[Float[Tensor, " tasks"], list[dict[str, Tensor]]]:
    """Losses of the tasks, and g: their mean's gradient, or one for each task in FW-soft."""
    leaves = {name: theta[name].detach().requires_grad_() for name in names}
    every = {name: leaves[owner] for name, owner in owners.items()}
    losses, found = [], []
    with torch.enable_grad():
        for _, value in objective.losses(every, objective.draw()):
            losses.append(value.detach().float().cpu())
            each = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
            if variant == "soft" or not found:
                found.append(dict(zip(names, each, strict=True)))
            else:
                found = [{name: found[0][name] + g for name, g in zip(names, each, strict=True)}]
    if variant == "hard":
        found = [{name: g / len(losses) for name, g in found[0].items()}]
    return torch.stack(losses), found


def pick(
    gradients: Sequence[Mapping[str, Tensor]],
    theta: Mapping[str, Tensor],
    pool: Sequence[Weights],
    groups: Sequence[Sequence[str]],
    oracle: str,
) -> tuple[Int[Tensor, "at_once layers"], float]:
    """The linear minimisation oracle: a vertex for each gradient and group, and the duality gap."""
    inner = torch.zeros(len(gradients), len(groups), len(pool), dtype=torch.float64)
    ranked = torch.zeros_like(inner)
    for j, vertex in enumerate(pool):
        for i, group in enumerate(groups):
            for name in group:
                v = at_least_float32(vertex[name])  # the one tensor of the pool that is in memory
                delta = v - theta[name]
                for k, g in enumerate(gradients):
                    product = float((g[name] * delta).sum(dtype=torch.float64))
                    inner[k, i, j] += product
                    if oracle == "inner":
                        ranked[k, i, j] += product
                    else:
                        ranked[k, i, j] += _cosine(g[name], v if oracle == "cos_checkpoint" else delta)
    picks = torch.zeros(min(len(gradients), len(pool)), len(groups), dtype=torch.int64)
    for k in range(len(picks)):  # FW-soft: tasks pick in turn, no vertex twice in one step
        ranked[k].scatter_(1, picks[:k].T, float("inf"))
        picks[k] = ranked[k].argmin(1)
    return picks, float(-inner.mean(0).min(1).values.sum())


def _cosine(g: Tensor, v: Tensor) -> float:
    norms = float(g.norm()) * float(v.norm())
    return float((g * v).sum()) / norms if norms > 0 else 0.0
