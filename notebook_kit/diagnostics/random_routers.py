"""Numbers about random routers: one model at every k, and what paths through stochastic experts agree on."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from notebook_kit.routers import StochasticExperts, consistency_loss, set_path


@torch.no_grad()
def slim_curve(model: nn.Module, score: Callable[[nn.Module], float], ks: Iterable[int]) -> dict[int, float]:
    """Score a model of random routers with every number of experts; the number it had is put back.

    Args:
        model: holds `RandomRouter`s, or other routers with a `k`.
        score: of the model as it is set, higher is better.
        ks: experts a token.

    Returns:
        k to score.

    Raises:
        ValueError: no such router, or a k that is out of range for one.
    """
    routers = [module for module in model.modules() if hasattr(module, "route") and hasattr(module, "k")]
    if not routers:
        raise ValueError(f"no router with a k in {type(model).__name__}")
    before, curve = [router.k for router in routers], {}
    try:
        for k in ks:
            for router in routers:
                router.check_k(k)
                router.k = k
            curve[k] = float(score(model))
    finally:
        for router, k in zip(routers, before, strict=True):
            router.k = k
    return curve


@dataclass(frozen=True)
class Paths:
    """What the paths through stochastic experts say.

    Args:
        paths: the expert of each layer.
        disagreement: mean symmetric divergence of two paths' predictions in nats, Float[paths, paths].
        agreement: share of inputs on which two paths name the same class, Float[paths, paths].
        scores: of each path.
        ensemble: score with all experts.
    """

    paths: list[tuple[int, ...]]
    disagreement: Float[Tensor, "paths paths"] = field(repr=False)
    agreement: Float[Tensor, "paths paths"] = field(repr=False)
    scores: dict[tuple[int, ...], float] = field(repr=False)
    ensemble: float

    @property
    def mean_disagreement(self) -> float:
        """Mean over pairs of different paths, in nats; 0 if there is one path only."""
        n = len(self.paths)
        return float(self.disagreement.sum()) / max(n * (n - 1), 1)

    @property
    def mean_agreement(self) -> float:
        """Mean over pairs of different paths; 1 if there is one path only."""
        n = len(self.paths)
        return float(self.agreement.sum() - n) / (n * (n - 1)) if n > 1 else 1.0


@torch.no_grad()
def compare_paths(
    model: nn.Module,
    inputs: Any,
    paths: Sequence[Sequence[int]],
    score: Callable[[Float[Tensor, "*batch classes"]], float],
    *,
    mask: Bool[Tensor, "*batch"] | None = None,
) -> Paths:
    """Run a model along paths through its stochastic experts and compare what they predict.

    Args:
        model: holds `StochasticExperts`; left in evaluation mode, each router with the rule it had.
        inputs: what the model is called with.
        paths: an expert for each stochastic layer.
        score: of the logits, higher is better.
        mask: True for real tokens.

    Returns:
        Paths.

    Raises:
        ValueError: a path that does not fit the model.
    """
    routers = [module for module in model.eval().modules() if isinstance(module, StochasticExperts)]
    before = [(router.inference, router.path) for router in routers]
    try:
        logits = {tuple(path): _along(model, inputs, path) for path in paths}
        ensemble = float(score(_along(model, inputs, "ensemble")))
    finally:
        for router, (rule, path) in zip(routers, before, strict=True):
            router.inference, router.path = rule, path
    names = list(logits)
    disagreement, agreement = torch.zeros(len(names), len(names)), torch.eye(len(names))
    for i, a in enumerate(names):
        for j, b in enumerate(names[:i]):
            same = logits[a].argmax(-1) == logits[b].argmax(-1)
            disagreement[i, j] = disagreement[j, i] = consistency_loss(logits[a], logits[b], mask=mask)
            agreement[i, j] = agreement[j, i] = (same if mask is None else same[mask]).float().mean()
    return Paths(names, disagreement, agreement, {path: float(score(z)) for path, z in logits.items()}, ensemble)


def _along(model: nn.Module, inputs: Any, path: Sequence[int] | str) -> Tensor:
    set_path(model, path)
    return model(inputs)
