"""Continual baselines: what a merge that sees its experts one after another, and keeps none, is compared with.

    average           θ^(t) = ((t − 1) θ^(t-1) + θ_t) / t                  the same as averaging all at the end
    task_arithmetic   θ^(t) = θ^(t-1) + λ τ_t
    ties              θ^(t) = θ^(t-1) + λ TIES(θ^(t-1) − θ₀, τ_t)          of two task vectors, agreeing entries summed

τ_t = θ_t − θ₀; θ^(0) = θ₀; TIES takes the first expert's vector untrimmed. As in the official code of OPCM (Tang et
al., 2025), which takes λ = 0.3 for task arithmetic, λ = 0.5 and a density of 0.2 for TIES.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated

from torch import Tensor

from notebook_kit.hyperparameters import Choice, Range, hyperparameters, validate
from notebook_kit.merging.average import average
from notebook_kit.merging.task_arithmetic import task_arithmetic
from notebook_kit.merging.ties import ties
from notebook_kit.weights import Weights, check

RULES = ("average", "task_arithmetic", "ties")


def continual(
    base: Weights,
    experts: Iterable[Weights],
    *,
    rule: Annotated[str, Choice(*RULES)] = "average",
    scale: Annotated[float, Range(-2, 3)] = 0.3,
    density: Annotated[float, Range(0, 1)] = 0.2,
) -> Iterator[dict[str, Tensor]]:
    """Yield the merge after each expert's arrival; only it and the base are kept.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_t, in the order of their arrival; an iterator will do.
        rule: the baseline.
        scale: λ of "task_arithmetic" and "ties".
        density: share kept by "ties".

    Yields:
        dict: θ^(1), θ^(2), ...

    Raises:
        IncompatibleWeights, ValueError: as `weights.check`, and for settings out of range.

    Source:
        tanganke/opcm: fusion_bench/method/opcm/{weight_average,task_arithmetic,ties_merging}.py.
    """
    validate(hyperparameters(continual), {"rule": rule, "scale": scale, "density": density})
    merged = {name: tensor.clone() for name, tensor in base.items()}
    for t, expert in enumerate(experts, 1):
        check(base, [expert])
        if rule == "average":
            merged = average(base, [merged, expert], weights=[t - 1, 1])
        elif rule == "ties" and t > 1:
            joined = ties(base, [merged, expert], density=density, combine="sum")
            merged = task_arithmetic(base, [merged, joined], scale=1.0, weights=[1.0, scale])
        else:
            merged = task_arithmetic(base, [merged, expert], scale=1.0, weights=[1.0, scale])
        yield merged
