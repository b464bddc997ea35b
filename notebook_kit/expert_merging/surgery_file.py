"""What a learner of `model_surgery` leaves in a file: all that it learnt, and nothing of images or the backbone."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from notebook_kit.expert_merging.class_gaussians import ClassGaussian

if TYPE_CHECKING:
    from notebook_kit.expert_merging.model_surgery import ModelSurgery

NEEDED = ("head.weight", "head.bias", "prototypes", "classes", "tasks", "backbone")
FIELDS = tuple(field.name for field in fields(ClassGaussian))


def weights_of(learner: "ModelSurgery") -> dict[str, Tensor]:
    """Adapters, head, prototypes, Gaussians and classes as tensors, and a fingerprint of the backbone.

    Raises:
        ValueError: nothing was learnt yet.
    """
    if not learner.adapters:
        raise ValueError("nothing was learnt yet, so there is nothing to keep: call `learn` first")
    state = {f"adapters.{t}.{name}": p for t, adapter in enumerate(learner.adapters) for name, p in adapter.items()}
    for c, gaussian in enumerate(learner.gaussians):
        state |= {f"gaussians.{c}.{field}": getattr(gaussian, field) for field in FIELDS}
    state |= {"head.weight": learner.head[0], "head.bias": learner.head[1], "prototypes": learner.prototypes}
    state |= {"classes": torch.tensor(learner.classes), "tasks": torch.tensor(learner.tasks)}
    return state | {"backbone": fingerprint(learner)}


def take_up(learner: "ModelSurgery", state: Mapping[str, Tensor], path: str | Path) -> None:
    """Put what `weights_of` gave in place of what a learner knows; first everything is checked, then changed.

    Args:
        learner: with the same backbone and adapters.
        state: from `weights_of`.
        path: of the file, for error texts.

    Raises:
        ValueError: another backbone, other adapters, a part that is missing, NaN or Inf.
    """
    lacking = [key for key in NEEDED if key not in state]
    if lacking:
        raise ValueError(f"{path} holds no state of ModelSurgery: it lacks {lacking[0]!r}")
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{broken[0]!r} of {path} holds NaN or Inf")
    own = fingerprint(learner)
    if state["backbone"].shape != own.shape or not torch.allclose(state["backbone"], own, rtol=1e-4):
        raise ValueError(f"{path} was made on another backbone; build the model with the weights it had then")
    classes, tasks = state["classes"].tolist(), state["tasks"].tolist()
    adapters, shapes = [], {name: p.shape for name, p in learner.trained.items()}
    for t in range(max(tasks) + 1):
        prefix = f"adapters.{t}."
        adapters.append({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        if {name: p.shape for name, p in adapters[t].items()} != shapes:
            raise ValueError(f"adapter {t} of {path} has other tensors than the adapters of this model")
    lost = [f"gaussians.{c}.{f}" for c in range(len(classes)) for f in FIELDS if f"gaussians.{c}.{f}" not in state]
    if lost:
        raise ValueError(f"{path} lacks {lost[0]!r}")
    lengths = {key: len(state[key]) for key in ("tasks", "head.weight", "head.bias", "prototypes")}
    odd = [key for key, length in lengths.items() if length != len(classes)]
    if odd:
        raise ValueError(f"{odd[0]!r} of {path} is of {lengths[odd[0]]} classes, but it names {len(classes)}")
    learner.classes, learner.tasks, learner.adapters = classes, tasks, adapters
    learner.gaussians = [ClassGaussian(*(state[f"gaussians.{c}.{f}"] for f in FIELDS)) for c in range(len(classes))]
    learner.head, learner.prototypes = (state["head.weight"], state["head.bias"]), state["prototypes"]
    learner.set_adapter(adapters[-1])


def fingerprint(learner: "ModelSurgery") -> Tensor:
    """Norms of the frozen tensors: enough to notice another backbone."""
    frozen = (p for name, p in learner.model.named_parameters() if name not in learner.trained)
    return torch.stack([p.detach().float().norm() for p in frozen])
