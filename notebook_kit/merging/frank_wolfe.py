"""Frank-Wolfe merging: from a large pool, step towards the one checkpoint that the gradient says helps most.

    g      = ∇ℓ(θᵗ)                            ℓ: mean loss of the target tasks, on a few samples
    s      = argmin_v ⟨g, v⟩                   over the vertices: the pool's models, and the start ("initial")
    θᵗ⁺¹   = θᵗ + γ_t λ (s − θᵗ)               γ_t = 2/(t + 2) · step_size, λ: `scale`
    gap    = ⟨g, θᵗ − argmin_v ⟨g, v⟩⟩ ≥ 0     for convex ℓ at least ℓ(θᵗ) − min ℓ: where to stop

Granularity "layer" takes the argmin for each tensor, a larger set (a product of hulls). FW-soft: in each step every
target task picks with its own gradient a model not picked yet, and all picked are merged at once into θᵗ. Every
iterate is an affine combination of the vertices: `coefficients` writes it down. Chen et al., 2025, sections 3 and 4.
The pool may be `Checkpoint`s on disk: one tensor of one model is read at a time, memory does not grow with the pool.
Where the official code differs: its oracle sums cosines of g_l with the raw weights v_l (`oracle="cos_checkpoint"`),
which measure mostly what all models share; the exact inner product is the default here. Its layer-wise code puts a
zero tensor where no cosine is negative, which pulls weights to zero: not copied. Its scaling is 0.3; 1 is textbook.
Task heads do not belong into the pool: leave them to `model`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.frank_wolfe_moves import move_towards, start_of
from notebook_kit.merging.frank_wolfe_oracle import gradients_of, pick
from notebook_kit.merging.objective import Models, Objective, TaskLoss
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


def frank_wolfe_path(
    base: Weights,
    experts: Sequence[Weights],
    *,
    model: Models,
    batches: Mapping[str, Any],
    loss: str = "cross_entropy",
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
    batch_size: int | None = None,
    seed: int = 0,
    heads: Mapping[str, slice] | None = None,
    task_loss: TaskLoss | None = None,
) -> FrankWolfePath:
    """Merge by Frank-Wolfe and keep every step; the arguments are `frank_wolfe`'s."""
    check(base, experts)
    options = {"loss": loss, "heads": heads, "task_loss": task_loss, "batch_size": batch_size, "seed": seed}
    objective = Objective(model, batches, **options)
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
            learn = {"model": model, "batches": batches, "steps": move_steps, **options, "seed": seed + t}
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


def statistics(base: Weights, experts: Sequence[Weights], **settings) -> dict[str, object]:
    """The whole merge: when files are merged tensor by tensor, the walk is taken once, on the whole model."""
    settings.pop("merged", None)
    return {"merged": frank_wolfe_path(base, experts, **settings).merged}


@method(family="merging", paper="fw-merging", statistics=statistics)
def frank_wolfe(
    base: Weights,
    experts: Sequence[Weights],
    *,
    model: Models,
    batches: Mapping[str, Any],
    loss: Annotated[str, Choice("cross_entropy", "entropy")] = "cross_entropy",
    variant: Annotated[str, Choice("hard", "soft")] = "hard",
    granularity: Annotated[str, Choice("task", "layer")] = "task",
    oracle: Annotated[str, Choice("inner", "cos_checkpoint", "cos_delta")] = "inner",
    steps: Annotated[int, Range(0, 1000)] = 10,
    step_size: Annotated[float, Range(0.01, 1)] = 1.0,
    scale: Annotated[float, Range(0.01, 1)] = 1.0,
    init: Annotated[str, Choice("merge", "base")] = "merge",
    init_scale: Annotated[float, Range(0, 1)] = 0.3,
    initial_vertex: bool = True,
    move: Annotated[str, Choice("task_arithmetic", "ties", "adamerging")] = "task_arithmetic",
    density: Annotated[float, Range(0, 1)] = 0.3,
    move_steps: Annotated[int, Range(0, 10_000)] = 100,
    tolerance: Annotated[float, Range(0, 1e9)] = 0.0,
    batch_size: Annotated[int | None, Range(1, 4096)] = None,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
    heads: Mapping[str, slice] | None = None,
    task_loss: TaskLoss | None = None,
    merged: Weights | None = None,
) -> dict[str, Tensor]:
    """Merge a pool by Frank-Wolfe steps towards the checkpoints that the gradient picks.

    `frank_wolfe_path` takes the same arguments and keeps picks, gaps, losses and convex coefficients.

    Args:
        base: state dict θ₀.
        experts: the pool: state dicts, or `Checkpoint`s on disk.
        model: takes a batch's inputs and returns logits, or an output with `.logits`; or task to model, where heads
            differ. Put into evaluation mode, and back.
        batches: the TARGET tasks' samples only: task to (inputs, labels), a mapping of named arguments, or a list.
        loss: cross-entropy on labels, or entropy of the predictions without.
        variant: one pick a step ("hard"), or one for each target task ("soft").
        granularity: pick a whole model ("task"), or one for each tensor ("layer").
        oracle: what ranks vertices: ⟨g, v⟩ (exact), Σ_l cos(g_l, v_l) (official code), or Σ_l cos(g_l, v_l − θ_l).
            The card calls it score; here that word is a merge's quality.
        steps: T, at most; it stops earlier where the gap is not above `tolerance`.
        step_size: multiplies 2/(t + 2); official: 1 for language, 0.1 for vision.
        scale: λ of each move (official: 0.3); 1 is textbook Frank-Wolfe, its first step lands on a vertex. In FW-soft
            plain moves add up: above 1/(number of target tasks) they may leave the hull.
        init: start at task arithmetic of the pool, or at base.
        init_scale: scale of that task arithmetic.
        initial_vertex: the start may be picked too (official).
        move: plain step, TIES merge of θᵗ with what was picked, or AdaMerging of it (official for FW-soft).
        density: share kept by a TIES move.
        move_steps: of Adam, in an AdaMerging move (official: 500, at lr 1e-3; its models are in memory meanwhile).
        tolerance: largest gap to stop at.
        batch_size: rows drawn anew for each task and step; None takes the batch as it is.
        seed: of the rows drawn.
        heads: task to the slice of the logits that is its own; a task that is not named has them all.
        task_loss: (output, batch, task) -> scalar tensor, in place of `loss` and `heads`.
        merged: from `statistics`, when the model is merged in parts; None walks.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor or a loss, labels that are missing, or a tensor the model does not have.

    Source:
        Chen et al., 2025, arXiv 2503.12649, algorithm 1; hmarkc/FW-Merging.
    """
    if merged is not None:
        check(base, experts)
        return {name: merged[name].clone() for name in base}
    path = {"variant": variant, "granularity": granularity, "oracle": oracle, "steps": steps, "step_size": step_size}
    path |= {"scale": scale, "init": init, "init_scale": init_scale, "initial_vertex": initial_vertex, "move": move}
    path |= {"density": density, "move_steps": move_steps, "tolerance": tolerance}
    data = {"loss": loss, "batch_size": batch_size, "seed": seed, "heads": heads, "task_loss": task_loss}
    return frank_wolfe_path(base, experts, model=model, batches=batches, **path, **data).merged
