"""Numbers about keeping the load even: a bias moved batch by batch over a recorded trace, and where token ids go."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
import torch

from notebook_kit.diagnostics.routing import max_violation
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routers import LossFreeBias
from notebook_kit.routing import Routing, RoutingTrace


@dataclass(frozen=True)
class BiasStream:
    """What `bias_stream` saw: one row a batch, each before the bias moved; then the whole trace by the last bias."""

    max_violation: np.ndarray  # [updates]
    bias: np.ndarray  # [updates, experts]
    routing: Routing
    bias_rate: float

    def __repr__(self) -> str:
        late = self.max_violation[len(self.max_violation) // 2 :].mean()
        return f"BiasStream({len(self.bias)} updates of {self.bias_rate:g}, MaxVio {late:.2f} in the second half)"


def bias_stream(
    trace: RoutingTrace,
    *,
    bias_rate: Annotated[float, Range(1e-4, 1, log=True)] = 0.01,
    k: Annotated[int, Range(1, 512)] = 2,
    scores: Annotated[str, Choice("sigmoid", "softmax")] = "softmax",
    batch_size: Annotated[int, Range(32, 2048, log=True)] = 512,
    updates: Annotated[int, Range(10, 300)] = 150,
    layer: Annotated[int, Range(0, 255)] = 0,
    seed: int = 0,
) -> BiasStream:
    """Let loss-free balancing work on a recorded trace: batches of its tokens, and after each one step of the bias.

    The model does not learn meanwhile, so the load has one best bias: a small step creeps towards it, a large one jumps
    over it again and again.

    Args:
        trace: from `record_routing`.
        bias_rate: the step.
        k: experts a token.
        scores: what the bias is added to.
        batch_size: tokens between two steps, drawn without order; a small batch is not even by chance alone.
        updates: number of steps.
        layer: of the trace, from 0.
        seed: of the draw.

    Returns:
        BiasStream

    Raises:
        ValueError: no such layer, or k above the number of experts.
    """
    logits = trace.layer_logits(layer)
    router = LossFreeBias(1, logits.shape[1], k=k, scores=scores, normalize=k > 1, bias_rate=bias_rate)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(logits), (updates, batch_size), generator=generator)
    violations, biases = [], []
    with torch.no_grad():
        for chosen in rows:
            load = router.route(logits[chosen]).load
            violations.append(max_violation(load))
            biases.append(router.bias.clone())
            router.counts.copy_(load)  # shares have the same signs as counts
            router.update_bias()
        routing = router.route(logits)
    return BiasStream(np.array(violations), torch.stack(biases).numpy(), routing, bias_rate)


def id_table(routing: Routing, trace: RoutingTrace, *, n_ids: int = 24) -> pd.DataFrame:
    """Say where the most frequent token ids go.

    Args:
        routing: of one layer, recorded or re-routed.
        trace: gives the ids and their texts.
        n_ids: how many ids.

    Returns:
        DataFrame: text of the id x expert, share of the id's first choices; rows sum to 1 where any was served.
    """
    ids, n_experts = trace.tokens, routing.logits.shape[1]
    best = routing.experts[:, 0]
    known, inverse, counts = ids.unique(return_inverse=True, return_counts=True)
    often = counts.sort(descending=True, stable=True).indices[:n_ids]
    served = best >= 0
    flat = torch.bincount(inverse[served] * n_experts + best[served], minlength=len(known) * n_experts)
    table = flat.reshape(-1, n_experts)[often].float()
    table = table / table.sum(1, keepdim=True).clamp_min(1)
    return pd.DataFrame(table.numpy(), index=_texts(trace, known[often].tolist()))


def constancy(routing: Routing, trace: RoutingTrace) -> float:
    """How far a token's id alone settles its best expert: share of tokens at their id's most frequent expert.

    Args:
        routing: of one layer.
        trace: gives the ids.
    """
    best, ids = routing.experts[:, 0], trace.tokens.unique(return_inverse=True)[1]
    served, n_experts = best >= 0, routing.logits.shape[1]
    counts = torch.bincount(ids[served] * n_experts + best[served], minlength=(int(ids.max()) + 1) * n_experts)
    return float(counts.reshape(-1, n_experts).amax(1).sum() / served.sum().clamp_min(1))


def _texts(trace: RoutingTrace, ids: Sequence[int]) -> list[str]:
    if trace.vocabulary is not None:
        return [trace.vocabulary.get(i, f"#{i}") for i in ids]
    return [chr(i) if 0 <= i < 128 else f"\\x{i:02x}" if 0 <= i < 256 else f"#{i}" for i in ids]
