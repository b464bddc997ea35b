"""The walk of `frank_wolfe`: ask the gradient, pick a vertex, step towards it, and write down what happened."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from notebook_kit.merging.frank_wolfe_moves import move_towards, start_of
from notebook_kit.merging.frank_wolfe_oracle import gradients_of, pick
from notebook_kit.merging.objective import Objective
from notebook_kit.weights import Weights, check


@dataclass(frozen=True)
class FrankWolfePath:
    """What Frank-Wolfe did, step by step; `layers` is ["model"] where a whole model is picked.

    Args:
        merged: the last iterate, a state dict.
        vertices: names: "experts[0]", ..., and "initial" where the start is one.
        layers: names of the parts that are picked apart from each other.
        tasks: the target tasks.
        picks: vertex picked, Int[steps, picked at once, layers].
        gaps: ⟨g, θᵗ⟩ − min_v ⟨g, v⟩ before each step, Float[steps]; below 0 only where the start is no vertex.
        losses: of each task before each step and after the last, Float[steps + 1, tasks].
        coefficients: of the start and each expert, Float[steps + 1, layers, 1 + experts]; each row adds up to 1.
            NaN from the first step on where `move` is "ties", which has none.
    """

    merged: dict[str, Tensor] = field(repr=False)
    vertices: list[str]
    layers: list[str]
    tasks: list[str]
    picks: Int[Tensor, "steps at_once layers"] = field(repr=False)
    gaps: Float[Tensor, " steps"] = field(repr=False)
    losses: Float[Tensor, "steps_and_start tasks"] = field(repr=False)
    coefficients: Float[Tensor, "steps_and_start layers start_and_experts"] = field(repr=False)


def walk(
    base: Weights,
    experts: Sequence[Weights],
    *,
    variant: str = "hard",
    granularity: str = "task",
    oracle: str = "inner",
    steps: int = 10,
    step_size: float = 1.0,
    scale: float = 1.0,
    init: str = "merge",
    init_scale: float = 0.3,
    initial_vertex: bool = True,
    move: str = "task_arithmetic",
    density: float = 0.3,
    move_steps: int = 100,
    tolerance: float = 0.0,
    loss: str = "cross_entropy",
    seed: int = 0,
    **data: Any,
) -> FrankWolfePath:
    """Take the steps; the arguments are `frank_wolfe`'s, `data` are those of its `Objective`."""
    check(base, experts)
    data |= {"loss": loss, "seed": seed}
    objective = Objective(**data)
    owners = objective.owners(base)
    names = [name for name in owners if owners[name] == name]
    theta = start_of(base, experts, names, init, init_scale)  # θ⁰
    initial = {k: tensor.clone() for k, tensor in theta.items()} if initial_vertex else None
    pool = [*experts] if initial is None else [*experts, initial]
    groups = [[name] for name in names] if granularity == "layer" else [names]

    weights = torch.zeros(len(groups), 1 + len(experts))
    weights[:, 0] = 1.0  # the start, then the experts
    coefficients, picks, gaps, losses = [weights], [], [], []
    with objective.evaluating():
        for t in range(steps):
            values, gradients = gradients_of(objective, theta, owners, names, variant)
            losses.append(values)
            picked, gap = pick(gradients, theta, pool, groups, oracle)
            started = initial_vertex or float(weights[:, 0].max()) == 0  # outside of the hull the gap says nothing
            if started and gap <= tolerance:
                break
            how = {"move": move, "size": scale * 2 / (t + 2) * step_size, "first": t == 0, "density": density}
            learn = {**data, "steps": move_steps, "seed": seed + t}
            theta, weights = move_towards(theta, weights, pool, picked, groups, owners, learn=learn, **how)
            coefficients.append(weights)
            picks.append(picked)
            gaps.append(gap)
        else:
            losses.append(gradients_of(objective, theta, owners, names, variant)[0])
    merged = {k: theta[owners[k]].to(v.dtype).clone() if k in owners else v.clone() for k, v in base.items()}
    vertices = [f"experts[{i}]" for i in range(len(experts))] + (["initial"] if initial_vertex else [])
    layers = names if granularity == "layer" else ["model"]
    at_once = min(len(objective.tasks), len(pool)) if variant == "soft" else 1
    chosen = torch.stack(picks) if picks else torch.zeros(0, at_once, len(groups), dtype=torch.int64)
    story = {"gaps": torch.tensor(gaps), "losses": torch.stack(losses), "coefficients": torch.stack(coefficients)}
    return FrankWolfePath(merged, vertices, layers, objective.tasks, chosen, **story)
