"""OPCM as experts arrive: a merge that grows, is saved, and goes on; see `opcm` for the method."""

from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.hyperparameters import Choice, Range, hyperparameters, validate
from notebook_kit.merging.matrices import matrix_names
from notebook_kit.merging.opcm_project import Projected, project
from notebook_kit.weights import Weights, at_least_float32, check, float_keys, load, save

STATE = "opcm.state"
SETTINGS = {"block": ("corner", "cross"), "matrices": ("linear", "all")}


class Step(NamedTuple):
    """One expert's arrival: λ_t, ‖θ_t − θ₀‖, and for each matrix r and the energy removed, ‖D − D̂‖² / ‖D‖²."""

    lambda_t: float
    norm: float
    split_ranks: dict[str, float]
    removed: dict[str, float]


class Opcm:
    """A merge that grows by one expert at a time and keeps no expert.

    Args:
        base: state dict θ₀; kept by reference.
        alpha: share of the merge's spectrum whose block is protected; at 0 only the diagonal is removed.
        block: what is protected, the leading "corner" of P (official code) or its "cross" of rows and columns (paper).
        rescale: keep the merge as far from the base as the average expert is; off adds up.
        project: off is a running sum of task vectors.
        matrices: "linear" leaves embeddings unprojected, as the paper does; "all" projects them too.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        base: Weights,
        *,
        alpha: Annotated[float, Range(0, 1)] = 0.5,
        block: Annotated[str, Choice(*SETTINGS["block"])] = "corner",
        rescale: bool = True,
        project: bool = True,
        matrices: Annotated[str, Choice(*SETTINGS["matrices"])] = "linear",
    ):
        self.settings = {"alpha": alpha, "block": block, "rescale": rescale, "project": project, "matrices": matrices}
        validate(hyperparameters(Opcm), self.settings)
        self.base = base
        self.count, self.norms = 0, 0.0  # t, Σ_i ‖θ_i − θ₀‖
        self.total: dict[str, Tensor] = {}  # S_t
        self._treated = matrix_names(base, matrices) if project else set()

    @torch.no_grad()
    def add(self, expert: Weights) -> Step:
        """Take in one expert; it is not kept.

        Args:
            expert: state dict θ_t.

        Returns:
            Step: what was removed, and λ_t.

        Raises:
            IncompatibleWeights, ValueError: as `weights.check`.
        """
        check(self.base, [expert])
        square, ranks, removed = 0.0, {}, {}
        for name in float_keys(self.base):
            d = at_least_float32(expert[name]) - at_least_float32(self.base[name])
            square += float(d.double().square().sum())
            if self.count == 0:
                self.total[name] = d
                continue
            if name in self._treated:
                parts = self._project(d, self.total[name])
                ranks[name] = sum(part.split_rank for part in parts) / len(parts)
                removed[name] = sum(part.removed for part in parts) / len(parts)
                d = torch.stack([part.update for part in parts]).reshape(d.shape)
            self.total[name] += d
        self.count += 1
        self.norms += square**0.5
        return Step(self.lambda_t, square**0.5, ranks, removed)

    @property
    def lambda_t(self) -> float:
        """λ_t, what divides the sum; 1 with `rescale=False` and where there is nothing to scale."""
        length = sum(float(s.double().square().sum()) for s in self.total.values()) ** 0.5
        return length / (self.norms / self.count) if self.settings["rescale"] and length else 1.0

    @property
    def merged(self) -> dict[str, Tensor]:
        """The merge of all experts so far, a state dict like base; base itself before the first."""
        return self.at(self.lambda_t)

    def at(self, lambda_t: float) -> dict[str, Tensor]:
        """The merge under a given λ_t, for a model that is merged in parts."""
        merged = {name: tensor.clone() for name, tensor in self.base.items()}
        for name, total in self.total.items():
            merged[name] = (at_least_float32(merged[name]) + total / lambda_t).to(merged[name].dtype)
        return merged

    def save(self, path: str | Path) -> Path:
        """Write base, sum and settings to one safetensors file, from which `Opcm.load` goes on."""
        numbers = [self.count, self.norms, self.settings["alpha"], self.settings["rescale"], self.settings["project"]]
        numbers += [SETTINGS[name].index(self.settings[name]) for name in SETTINGS]
        tensors = {f"base.{name}": tensor for name, tensor in self.base.items()}
        tensors |= {f"sum.{name}": tensor for name, tensor in self.total.items()}
        return save(tensors | {STATE: torch.tensor(numbers, dtype=torch.float64)}, path)

    @classmethod
    def load(cls, path: str | Path) -> "Opcm":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is none of `Opcm.save`.
            BadCheckpoint, FileNotFoundError: as `notebook_kit.weights.load`.
        """
        tensors = load(path)
        if STATE not in tensors or tensors[STATE].shape != (5 + len(SETTINGS),):
            raise ValueError(f"{path} holds no {STATE!r}: it was not written by Opcm.save")
        count, norms, alpha, rescale, project, *chosen = tensors.pop(STATE).tolist()
        choices = {name: SETTINGS[name][int(i)] for name, i in zip(SETTINGS, chosen, strict=True)}
        parts = {"base": {}, "sum": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        state = cls(parts["base"], alpha=alpha, rescale=bool(rescale), project=bool(project), **choices)
        state.count, state.norms, state.total = int(count), norms, parts["sum"]
        return state

    def _project(self, d: Float[Tensor, "*batch m n"], total: Float[Tensor, "*batch m n"]) -> list[Projected]:
        pairs = [(d, total)] if d.dim() == 2 else zip(d, total, strict=True)
        return [project(new, old, self.settings["alpha"], self.settings["block"]) for new, old in pairs]
