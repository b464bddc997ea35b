"""What is done with a model whose adapters mix skills by task: tell it the task, adapt it to a new one, fold one in.

Few-shot adaptation of a trained inventory (Caccia et al. 2022, section 4):

| adaptation | what the new task trains          | numbers a layer      |
|------------|-----------------------------------|----------------------|
| full       | a new row Z (from 0) and A, B     | S r (d_in + d_out) + S h |
| z          | a new row Z only                  | S h                  |
| mu         | the uniform average of all skills, as one LoRA; Z is thrown away | r (d_in + d_out) |

Used as it is, untrained, the average is the zero-shot answer; a row of zeros is the same function.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from notebook_kit.hyperparameters import Choice
from notebook_kit.mixtures.multi_head_routing import MultiHeadRouting


def choose_tasks(model: nn.Module, tasks: Int[Tensor, " batch"] | int | None) -> None:
    """Tell every skill-mixing adapter which task the next examples belong to.

    Args:
        model: with `Polytropon` or `MultiHeadRouting` attached; changed in place.
        tasks: one id for all examples, or the id of each example of the batch; None forgets them.

    Raises:
        ValueError: an id is out of range, or the model mixes no skills.
    """
    layers = skill_layers(model)
    n_tasks = min(layer.n_tasks for layer in layers.values())
    ids = torch.as_tensor([] if tasks is None else tasks)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n_tasks:
        bad = ids[(ids < 0) | (ids >= n_tasks)].reshape(-1)[0]
        raise ValueError(f"task ids must be in [0, {n_tasks - 1}], got {int(bad)}")
    for layer in layers.values():
        layer.tasks = tasks.to(layer.Z.device) if isinstance(tasks, Tensor) else tasks


def skill_layers(model: nn.Module) -> dict[str, MultiHeadRouting]:
    """Return the skill-mixing adapters by the name of their host.

    Raises:
        ValueError: there is none.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, MultiHeadRouting)}
    if not found:
        raise ValueError(f"{type(model).__name__} mixes no skills: attach(model, MultiHeadRouting, n_tasks=...) first")
    return found


def adapt_to_task(
    model: nn.Module, *, n_tasks: int = 1, adaptation: Annotated[str, Choice("full", "z", "mu")] = "full"
) -> nn.Module:
    """Make a trained inventory ready to learn new tasks; the old tasks' rows of the router go.

    Args:
        model: with skills; changed in place (deepcopy it first to keep the old tasks). What trains afterwards has
            requires_grad, everything else of the adapters has not.
        n_tasks: new tasks, with ids from 0; "mu" has one adapter for all of them.
        adaptation: "full", "z" or "mu", see the table above.

    Returns:
        The same model; a single new task is chosen already.
    """
    if adaptation not in ("full", "z", "mu"):
        raise ValueError(f"adaptation must be one of 'full', 'z', 'mu', got {adaptation!r}")
    if n_tasks < 1:
        raise ValueError(f"n_tasks must be at least 1, got {n_tasks} (adapt_to_task)")
    fresh: dict[int, nn.Parameter] = {}  # a router that layers share stays shared
    for layer in skill_layers(model).values():
        old = layer.Z
        if adaptation == "mu":
            layer.A, layer.B = (nn.Parameter(p.detach().mean(1, keepdim=True)) for p in (layer.A, layer.B))
        if id(old) not in fresh:
            fresh[id(old)] = nn.Parameter(old.new_zeros(n_tasks, old.shape[1], layer.A.shape[1]))
        layer.Z = fresh[id(old)]
        layer.Z.requires_grad_(adaptation != "mu")
        for factor in (layer.A, layer.B):
            factor.requires_grad_(adaptation != "z")
        layer.tasks = 0 if n_tasks == 1 else None
    return model


def share_router(model: nn.Module) -> nn.Module:
    """Let all layers of a model use one router Z (Poly-S in the paper), that of the first.

    Args:
        model: with skills, of one number of heads; changed in place.
    """
    layers = list(skill_layers(model).values())
    if len({layer.Z.shape for layer in layers}) > 1:
        raise ValueError("layers can share a router only if n_tasks, n_splits and n_skills are the same in all of them")
    for layer in layers:
        layer.Z = layers[0].Z
    return model


def private_skills(model: nn.Module) -> nn.Module:
    """Give task t the skill t alone and freeze the router: one LoRA a task, the baseline without sharing.

    Args:
        model: with as many skills as tasks; changed in place.
    """
    for name, layer in skill_layers(model).items():
        tasks, _, skills = layer.Z.shape
        if tasks != skills:
            raise ValueError(f"private skills need n_skills = n_tasks, got {skills} and {tasks} ({name})")
        with torch.no_grad():  # sigmoid(40) is 1, sigmoid(-40) 4e-18
            layer.Z.copy_((80 * torch.eye(tasks) - 40)[:, None].expand_as(layer.Z))
        layer.Z.requires_grad_(False)
    return model


@contextmanager
def folded(model: nn.Module, task: int) -> Iterator[nn.Module]:
    """Run a model with one task's adapter folded into the weights; afterwards everything is as before, bit for bit.

    Args:
        model: with skills.
        task: its id.

    Yields:
        The model, whose hosts carry W + Bᵀ Aᵀ / r and whose adapters step aside.
    """
    layers = skill_layers(model)
    before = [(layer, layer.host.weight, layer.tasks, layer.host) for layer in layers.values()]
    choose_tasks(model, task)
    changes = [layer.delta()["weight"] for layer in layers.values()]
    handles = []
    try:
        for (_, weight, _, host), change in zip(before, changes, strict=True):
            host.weight = nn.Parameter(
                (weight.detach().to(change.dtype) + change).to(weight.dtype), weight.requires_grad
            )
        handles = [layer.register_forward_hook(_host_alone) for layer in layers.values()]
        yield model
    finally:
        for handle in handles:
            handle.remove()
        for layer, weight, tasks, host in before:
            host.weight, layer.tasks = weight, tasks


def _host_alone(layer: MultiHeadRouting, inputs: tuple, output: Tensor) -> Tensor:
    return layer.host(*inputs)


def task_weights(model: nn.Module) -> dict[str, Float[Tensor, "tasks heads skills"]]:
    """Return each layer's mixing weights w of all tasks, without noise.

    Args:
        model: with skills.
    """
    result = {}
    for name, layer in skill_layers(model).items():
        s = layer.Z.detach().float().sigmoid()
        result[name] = s / s.sum(-1, keepdim=True)
    return result
