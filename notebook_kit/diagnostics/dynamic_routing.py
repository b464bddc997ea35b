"""Numbers about compute that differs by token: how many experts, for which tokens, at which threshold."""

from collections.abc import Callable, Iterable, Sequence

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor, nn

from notebook_kit.routers import TopP
from notebook_kit.routing import Routing, RoutingTrace


def experts_per_token(routing: Routing) -> Int[Tensor, " tokens"]:
    """Return how many experts serve each token: slots in use, so nulls and padding count 0."""
    return (routing.experts >= 0).sum(1)


def compute_share(routing: Routing, k: int) -> float:
    """Return the experts' work relative to a router that always uses k: mean experts a token / k.

    Args:
        routing: of one layer; experts of equal size are assumed.
        k: of the router compared with.
    """
    return float(experts_per_token(routing).float().mean()) / k


def experts_by_group(routings: Sequence[Routing], groups: Sequence[str]) -> pd.DataFrame:
    """Tabulate the mean number of experts a token, for every group of tokens and every layer.

    Args:
        routings: one a layer, of the same tokens.
        groups: name of each token's group, such as its label or its byte class.

    Returns:
        DataFrame: groups (in order of first appearance) x "layer 0", ..., and "tokens", how many there are.

    Raises:
        ValueError: another number of groups than tokens.
    """
    for routing in routings:
        if len(routing) != len(groups):
            raise ValueError(f"groups must name each of the {len(routing)} tokens, got {len(groups)} names")
    frame = pd.DataFrame({f"layer {i}": experts_per_token(r).numpy() for i, r in enumerate(routings)})
    grouped = frame.groupby(pd.Series(list(groups), name="group"), sort=False)
    return grouped.mean().assign(tokens=grouped.size())


def byte_classes(trace: RoutingTrace) -> list[str]:
    """Name the class of each byte of a trace: a UTF-8 letter of several bytes has a first and later ones.

    Args:
        trace: of a model that reads bytes.

    Raises:
        ValueError: the trace has a vocabulary: its tokens are no bytes.
    """
    if trace.vocabulary is not None:
        raise ValueError("byte_classes reads bytes, and this trace has a vocabulary of its own")
    known = {token: _byte_class(token) for token in trace.tokens.unique().tolist()}
    return [known[token] for token in trace.tokens.tolist()]


def _byte_class(token: int) -> str:
    if not 0 <= token < 0x80:
        return "other" if not 0 <= token < 0x100 else "first of several" if token >= 0xC0 else "later of several"
    letter = chr(token)
    names = {"letter": letter.isalpha(), "digit": letter.isdigit(), "space": letter.isspace()}
    names["punctuation"] = letter.isprintable()
    return next((name for name, holds in names.items() if holds), "other")


@torch.no_grad()
def threshold_curve(
    model: nn.Module, score: Callable[[nn.Module], float], thresholds: Iterable[float], *, router: TopP | None = None
) -> pd.DataFrame:
    """Score a model of one top-p layer at every threshold; the threshold it had is put back.

    Args:
        model: holds `TopP` routers, all of which get the threshold.
        score: of the model as it is set; it runs the model, higher is better.
        thresholds: p, in [0, 1].
        router: whose experts are counted; None is the first.

    Returns:
        DataFrame: threshold, experts (mean a token), score.

    Raises:
        ValueError: the model has no `TopP`.
    """
    routers = [module for module in model.modules() if isinstance(module, TopP)]
    if not routers:
        raise ValueError(f"no TopP router in {type(model).__name__}")
    counts: list[float] = []

    def count(module, args, routing):
        return counts.append(float(experts_per_token(routing).float().mean()))

    before, rows = [r.threshold for r in routers], []
    hook = (router or routers[0]).register_forward_hook(count)
    try:
        for threshold in thresholds:
            for r in routers:
                r.threshold = float(threshold)
            counts.clear()
            value = float(score(model))
            rows.append({"threshold": float(threshold), "experts": sum(counts) / max(len(counts), 1), "score": value})
    finally:
        hook.remove()
        for r, threshold in zip(routers, before, strict=True):
            r.threshold = threshold
    return pd.DataFrame(rows)
