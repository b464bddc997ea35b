"""Look at PCB's competition: which experts keep which parameter, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from notebook_kit.hyperparameters import hyperparameters, validate
from notebook_kit.merging.pcb import pcb
from notebook_kit.merging.pcb_balance import Levels, Scoring, levels_of
from notebook_kit.weights import Weights, at_least_float32, check, float_keys


@dataclass(frozen=True)
class PcbScores:
    """Every parameter's scores, by tensor name, each [experts, *shape]."""

    intra: dict[str, Tensor]
    inter: dict[str, Tensor]
    kept: dict[str, Tensor]  # S

    def claims(self) -> dict[str, Tensor]:
        """How many experts keep each parameter, [*shape]."""
        return {name: (s > 0).sum(dim=0) for name, s in self.kept.items()}


def pcb_scores(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: float = 0.1,
    clip: float = 1e-4,
    intra: str = "exp",
    inter: str = "sum",
    power: float | None = None,
    scope: str = "model",
    levels: dict[str, list[Levels]] | None = None,
) -> PcbScores:
    """Look at the competition: the scores that `pcb` with the same arguments merges by.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i.
        density: as in `pcb`, and so are the others.
        clip: outlier quantile.
        intra: form of the score inside a task; what is returned lies between e^-K and 1.
        inter: form of the score between tasks.
        power: K.
        scope: where parameters compete.
        levels: from `pcb`'s statistics; None computes them.

    Returns:
        PcbScores: tensors [experts, *shape] by name.

    Raises:
        IncompatibleWeights, ValueError: as `pcb`.
    """
    settings = {"density": density, "clip": clip, "intra": intra, "inter": inter, "power": power, "scope": scope}
    validate(hyperparameters(pcb), settings)
    check(base, experts)
    scoring = Scoring(intra, inter, len(experts) if power is None else power)
    if levels is None:
        levels = levels_of(base, experts, scoring, density=density, clip=clip, scope=scope)
    found: tuple[dict, dict, dict] = {}, {}, {}
    for name in float_keys(base):
        start = at_least_float32(base[name]).reshape(-1)
        tau = torch.stack([at_least_float32(expert[name]).reshape(-1) - start for expert in experts])
        rows = (
            [scoring.intra_score(tau[i], levels[name][i]) for i in range(len(tau))],
            [scoring.inter_score(tau, i, levels[name]) for i in range(len(tau))],
            [scoring.kept(tau, i, levels[name]) for i in range(len(tau))],
        )
        for into, scores in zip(found, rows, strict=True):
            into[name] = torch.stack(scores).reshape(len(experts), *base[name].shape)
    return PcbScores(*found)
