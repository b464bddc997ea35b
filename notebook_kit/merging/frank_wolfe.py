"""Frank-Wolfe merging: from a large pool, step towards the one checkpoint that the gradient says helps most.

    g      = ∇ℓ(θᵗ)                            ℓ: mean loss of the target tasks, on a few samples
    s      = argmin_v ⟨g, v⟩                   over the vertices: the pool's models, and the start ("initial")
    θᵗ⁺¹   = θᵗ + γ_t λ (s − θᵗ)               γ_t = 2/(t + 2) · step_size, λ: `scale`
    gap    = ⟨g, θᵗ − argmin_v ⟨g, v⟩⟩ ≥ 0     for convex ℓ at least ℓ(θᵗ) − min ℓ: where to stop

Granularity "layer" takes the argmin for each tensor, a larger set (a product of hulls). FW-soft: in each step every
target task picks with its own gradient a model not picked yet, and all picked are merged at once into θᵗ. Every
iterate is an affine combination of the vertices: `coefficients` writes it down. Chen et al., 2025, sections 3 and 4.
The pool may be `Checkpoint`s on disk: one tensor of one model is read at a time, memory does not grow with the pool.
A pool of LoRA adapters: give `adapters.adapter_on(base, adapter)` of each. The base is then the zero change, a vertex
with init="base"; and the path's `coefficients`, given to `adapters.merge_adapters` as weights, make one LoRA of the
pool. (Official code takes the dicts of A and B as vertices. That runs here too, but half of two factors is no half.)
Where the official code differs: its oracle sums cosines of g_l with the raw weights v_l (`oracle="cos_checkpoint"`),
which measure mostly what all models share; the exact inner product is the default here. Its layer-wise code puts a
zero tensor where no cosine is negative, which pulls weights to zero: not copied. Its scaling is 0.3; 1 is textbook.
Task heads do not belong into the pool: leave them to `model`.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range, hyperparameters, validate
from notebook_kit.merging.frank_wolfe_walk import FrankWolfePath, walk
from notebook_kit.merging.objective import Models, TaskLoss
from notebook_kit.weights import Weights, check


def frank_wolfe_path(
    base: Weights, experts: Sequence[Weights], *, model: Models, batches: Mapping[str, Any], **settings: Any
) -> FrankWolfePath:
    """Merge by Frank-Wolfe and keep every step; the arguments are `frank_wolfe`'s."""
    numbers = {name: value for name, value in settings.items() if name not in ("heads", "task_loss")}
    validate(hyperparameters(frank_wolfe), numbers)
    return walk(base, experts, model=model, batches=batches, **settings)


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
    return walk(base, experts, model=model, batches=batches, **path, **data).merged
