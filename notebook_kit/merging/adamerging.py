"""AdaMerging: learn how much of each task vector to add, without labels, by making the merged model sure of itself.

    θ_l(λ) = θ₀,l + Σ_i λ_il τ_il            l: a parameter tensor; task-wise all l share one λ_i
    λ      = argmin Σ_tasks mean entropy of softmax(model(x; θ(λ)))          by Adam; only λ learns

τ_i = θ_i − θ₀: task vectors, K of them; λ: `coefficients` [K, L], all of them λ₀ = `scale` at the start. Yang et al.,
2024, equations 5 to 7. "AdaMerging++" (`density`) first trims the task vectors and drops entries against the elected
sign, as TIES does.
Hazard: entropy also falls when the model becomes confidently wrong. Stop early, and look at the accuracy of a few
labelled pictures; `loss="cross_entropy"` on such labels is the control. Logits without a fixed scale collapse soonest.
Task heads do not belong into base and experts: leave them to `model`. Buffers (running statistics of a batch norm) are
merged by their λ, but teach it nothing: measure them anew afterwards (`alignment.reset_batch_norm`).
Peers: fusion_bench has the same update, and offers a clamp to [0, 1] (here `clamp`), off by default as there. All
models are in memory at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range, hyperparameters, validate
from notebook_kit.merging.objective import Models, Objective, TaskLoss
from notebook_kit.merging.task_vectors import TaskVectors
from notebook_kit.weights import Weights, check


@dataclass(frozen=True)
class AdaMergingPath:
    """How the coefficients moved.

    Args:
        coefficients: λ before each step and after the last, Float[steps + 1, experts, layers]; one layer if task-wise.
        losses: of each task at these λ, Float[steps + 1, tasks].
        layers: names of the columns; ["model"] if task-wise.
        tasks: names of the tasks.
    """

    coefficients: Float[Tensor, "steps experts layers"] = field(repr=False)
    losses: Float[Tensor, "steps tasks"] = field(repr=False)
    layers: list[str]
    tasks: list[str]
    vectors: TaskVectors = field(repr=False)

    def merged(self, step: int = -1) -> dict[str, Tensor]:
        """The merged state dict after a number of steps; -1 is the last."""
        return self.vectors.state_dict(self.coefficients[step])


def adamerging_path(
    base: Weights,
    experts: Sequence[Weights],
    *,
    model: Models,
    batches: Mapping[str, Any],
    granularity: str = "layer",
    loss: str = "entropy",
    scale: float = 0.3,
    steps: int = 1000,
    lr: float = 1e-3,
    density: float | None = None,
    clamp: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    heads: Mapping[str, slice] | None = None,
    task_loss: TaskLoss | None = None,
) -> AdaMergingPath:
    """Learn the coefficients and keep every step; the arguments are `adamerging`'s."""
    settings = {"granularity": granularity, "loss": loss, "scale": scale, "steps": steps, "lr": lr, "density": density}
    settings |= {"clamp": clamp, "batch_size": batch_size, "seed": seed}
    validate(hyperparameters(adamerging), settings)
    check(base, experts)
    sampled = {"batch_size": batch_size, "seed": seed}
    objective = Objective(model, batches, loss=loss, heads=heads, task_loss=task_loss, **sampled)
    vectors = TaskVectors(base, experts, objective.owners(base), density)
    layers = vectors.layers if granularity == "layer" else ["model"]
    coefficients = torch.full((len(experts), len(layers)), float(scale), requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=lr)
    path, losses = [], []
    with objective.evaluating(), torch.enable_grad():
        for step in range(steps + 1):
            used = coefficients.clamp(0, 1) if clamp else coefficients
            theta = vectors.combine(used)
            values = dict(objective.losses(theta, objective.draw()))
            path.append(used.detach().clone())
            losses.append(torch.stack([value.detach().float().cpu() for value in values.values()]))
            if step < steps:
                total = torch.stack(list(values.values())).sum()
                (coefficients.grad,) = torch.autograd.grad(total, [coefficients])
                optimizer.step()
    return AdaMergingPath(torch.stack(path), torch.stack(losses), layers, objective.tasks, vectors)


def statistics(base: Weights, experts: Sequence[Weights], **settings) -> dict[str, object]:
    """The whole merge: when files are merged tensor by tensor, coefficients are learned once, on the whole model."""
    settings.pop("merged", None)
    return {"merged": adamerging_path(base, experts, **settings).merged()}


@method(family="merging", paper="adamerging", statistics=statistics)
def adamerging(
    base: Weights,
    experts: Sequence[Weights],
    *,
    model: Models,
    batches: Mapping[str, Any],
    granularity: Annotated[str, Choice("task", "layer")] = "layer",
    loss: Annotated[str, Choice("entropy", "cross_entropy")] = "entropy",
    scale: Annotated[float, Range(0, 2)] = 0.3,
    steps: Annotated[int, Range(0, 10_000)] = 1000,
    lr: Annotated[float, Range(1e-5, 1, log=True)] = 1e-3,
    density: Annotated[float | None, Range(0, 1)] = None,
    clamp: bool = False,
    batch_size: Annotated[int | None, Range(1, 4096)] = None,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
    heads: Mapping[str, slice] | None = None,
    task_loss: TaskLoss | None = None,
    merged: Weights | None = None,
) -> dict[str, Tensor]:
    """Merge with learned coefficients, one a task vector or one a task vector and tensor.

    `adamerging_path` takes the same arguments and keeps coefficients and losses of every step.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i, fine-tuned from it.
        model: takes a batch's inputs and returns logits, or an output with `.logits`; or task to model, where heads
            differ. Put into evaluation mode, and back.
        batches: task to unlabelled inputs, to (inputs, labels), to a mapping of named arguments, or to a list of such.
        granularity: one coefficient for each expert ("task"), or for each expert and tensor ("layer").
        loss: mean entropy of the predictions, or cross-entropy on labels.
        scale: λ₀, where all coefficients start; with 0 steps the result is task arithmetic.
        steps: of Adam.
        lr: learning rate of the coefficients.
        density: share of each task vector kept by TIES trimming (AdaMerging++); None trims nothing.
        clamp: keep coefficients in [0, 1].
        batch_size: rows drawn anew for each task and step (official code: 16); None takes the batch as it is.
        seed: of the rows drawn.
        heads: task to the slice of the logits that is its own; a task that is not named has them all.
        task_loss: (output, batch, task) -> scalar tensor, in place of `loss` and `heads`.
        merged: from `statistics`, when the model is merged in parts; None learns it.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor or a loss, labels that are missing, or a tensor the model does not have.

    Source:
        Yang et al., 2024, arXiv 2310.02575; EnnengYang/AdaMerging.
    """
    if merged is not None:
        check(base, experts)
        return {name: merged[name].clone() for name in base}
    learned = {"granularity": granularity, "loss": loss, "scale": scale, "steps": steps, "lr": lr, "density": density}
    data = {"model": model, "batches": batches, "heads": heads, "task_loss": task_loss}
    path = adamerging_path(base, experts, clamp=clamp, batch_size=batch_size, seed=seed, **learned, **data)
    return path.merged()
