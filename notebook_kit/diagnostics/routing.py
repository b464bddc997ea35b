"""Numbers about routing: how even the load is, how sure the router, who works together, who works for whom."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from notebook_kit.routers import cv_squared
from notebook_kit.routing import Routing, RoutingTrace


def recorded(trace: RoutingTrace) -> list[Routing]:
    """Return the model's own routing of every layer of a trace."""
    return [trace.layer(i) for i in range(len(trace.layers))]


def max_violation(load: Float[Tensor, " experts"]) -> float:
    """MaxVio = max load / mean load - 1: 0 if the load is even, N - 1 if one expert gets everything.

    Args:
        load: counts or shares, such as `routing.load`.

    Source: Wang et al. 2024 (2408.15664), equation 4.
    """
    mean = float(load.mean())
    return float(load.max()) / mean - 1 if mean else 0.0


def variation(load: Float[Tensor, " experts"]) -> float:
    """CV = standard deviation / mean of the load (unbiased): 0 if even, sqrt(N) if one expert gets everything.

    Args:
        load: counts or shares.
    """
    return float(cv_squared(load)) ** 0.5


def dead_experts(load: Float[Tensor, " experts"]) -> int:
    """Number of experts that get nothing at all.

    Args:
        load: counts or shares.
    """
    return int((load == 0).sum())


def changed(first: Routing, then: Routing) -> float:
    """Share of tokens whose best expert is another one than before, of those that claimed one both times.

    Args:
        first: routing of some tokens.
        then: later routing of the same tokens.
    """
    i, j = ((r.experts if r.claimed is None else r.claimed)[:, 0] for r in (first, then))
    both = (i >= 0) & (j >= 0)
    return float((i != j)[both].float().mean()) if both.any() else 0.0


def entropy(probs: Float[Tensor, "tokens experts"]) -> Float[Tensor, " tokens"]:
    """Entropy of each token's probabilities in bits: 0 if the router is sure, log2 N if it has no opinion.

    Args:
        probs: non-negative; rows are divided by their sum.
    """
    p = probs / probs.sum(1, keepdim=True)
    return -torch.xlogy(p, p).sum(1) / torch.log(torch.tensor(2.0))


def load_table(routings: Sequence[Routing], names: Sequence[str] = ()) -> pd.DataFrame:
    """Tabulate each layer's load.

    Args:
        routings: one a layer.
        names: of the layers; default their numbers.

    Returns:
        DataFrame: layers x experts, shares of the served claims; NaN where a layer has fewer experts.
    """
    return pd.DataFrame([routing.load.numpy() for routing in routings], index=list(names) or None)


def routing_summary(routings: Sequence[Routing], names: Sequence[str] = ()) -> pd.DataFrame:
    """Sum up each layer in one row.

    Args:
        routings: one a layer.
        names: of the layers; default their numbers.

    Returns:
        DataFrame: max_violation and variation (of the demand, before capacity), dead_experts (no claim at all),
        entropy_bits (mean over tokens), experts_per_token (served, mean), dropped (share of claims), unserved (share of
        tokens).
    """
    rows = []
    for routing in routings:
        served = (routing.experts >= 0).sum(1)
        rows.append(
            {
                "max_violation": max_violation(routing.demand),
                "variation": variation(routing.demand),
                "dead_experts": dead_experts(routing.demand),
                "entropy_bits": float(entropy(routing.probs).mean()),
                "experts_per_token": float(served.float().mean()),
                "dropped": routing.dropped,
                "unserved": float((served == 0).float().mean()),
            }
        )
    return pd.DataFrame(rows, index=list(names) or None)


def co_activation(routing: Routing) -> Float[Tensor, "experts experts"]:
    """Share of tokens that use experts i and j together; the diagonal is the share that uses i."""
    used = _used(routing, routing.logits.shape[1]).float()
    return used.T @ used / max(len(routing), 1)


def leading(routing: Routing) -> Int[Tensor, " tokens"]:
    """The expert that counts most for each token, of those that serve it; -1 where none does."""
    slot = routing.weights.detach().where(routing.experts >= 0, -1.0).argmax(1, keepdim=True)
    return routing.experts.gather(1, slot)[:, 0]


def flows(first: Routing, then: Routing) -> Float[Tensor, "experts experts_after"]:
    """Share of all tokens that one layer's leading expert i and the next one's j serve.

    Args:
        first: routing of some tokens.
        then: of the same tokens, in another layer or by another model.
    """
    i, j = leading(first), leading(then)
    both = (i >= 0) & (j >= 0)
    return _counts(i[both], j[both], first.logits.shape[1], then.logits.shape[1]) / max(len(first), 1)


def transitions(first: Routing, then: Routing) -> Float[Tensor, "experts experts_after"]:
    """Row i says where the tokens of expert i go, in shares: from one layer's leading expert to that of the next."""
    counts = flows(first, then)
    total = counts.sum(1, keepdim=True)
    return counts / (total + (total == 0))


def drift_table(first: Sequence[Routing], then: Sequence[Routing], names: Sequence[str] = ()) -> pd.DataFrame:
    """Say how far two checkpoints route the same text differently, layer by layer.

    Args:
        first: one routing a layer.
        then: of the same tokens, by the other checkpoint.
        names: of the layers; default their numbers.

    Returns:
        DataFrame: best_changed (share of tokens whose leading expert is another one), set_changed (share with any other
        set of experts), replaced (share of the first's claims that the other does not make); over all tokens.

    Raises:
        ValueError: another number of layers or tokens.
    """
    if len(first) != len(then) or any(len(a) != len(b) for a, b in zip(first, then, strict=False)):
        sizes = [f"{len(side)} layers of {len(side[0]) if side else 0} tokens" for side in (first, then)]
        raise ValueError(f"drift needs the same layers and tokens twice, got {sizes[0]} and {sizes[1]}")
    rows = []
    for one, other in zip(first, then, strict=True):
        n = max(one.logits.shape[1], other.logits.shape[1])
        a, b = (_used(routing, n) for routing in (one, other))
        gone = float((a & ~b).sum()) / max(int(a.sum()), 1)
        both = {"best_changed": leading(one) != leading(other), "set_changed": (a != b).any(1)}
        rows.append({name: float(value.float().mean()) for name, value in both.items()} | {"replaced": gone})
    return pd.DataFrame(rows, index=list(names) or None)


def same_text(trace: RoutingTrace, other: RoutingTrace) -> None:
    """Raise ValueError unless two traces are of the same tokens in the same order, and of equally many layers."""
    if len(trace.layers) != len(other.layers):
        raise ValueError(f"two checkpoints need equally many layers, got {len(trace.layers)} and {len(other.layers)}")
    if not torch.equal(trace.tokens, other.tokens) or not torch.equal(trace.positions, other.positions):
        raise ValueError(
            f"both traces must record the same text in the same order; they have {len(trace)} and {len(other)} tokens, "
            "and differ"
        )


def true_experts(routing: Routing, n_experts: int) -> Routing:
    """Leave out the columns of null experts, which serve nobody and would look like dead ones.

    Args:
        routing: logits and probabilities of n_experts and more columns.
        n_experts: how many compute.
    """
    if routing.logits.shape[1] <= n_experts:
        return routing
    return replace(routing, logits=routing.logits[:, :n_experts], probs=routing.probs[:, :n_experts])


def specialisation(routing: Routing, trace: RoutingTrace) -> pd.DataFrame:
    """Say which experts each label's tokens go to.

    Args:
        routing: of one layer, recorded or re-routed.
        trace: gives the labels.

    Returns:
        DataFrame: labels x experts, share of the label's served claims; rows sum to 1.

    Raises:
        ValueError: the trace has no labels.
    """
    names = _label_names(trace)
    n_experts, slots = routing.logits.shape[1], routing.experts.shape[1]
    experts, labels = routing.experts.reshape(-1), trace.labels.repeat_interleave(slots)
    counts = _counts(labels[experts >= 0], experts[experts >= 0], len(names), n_experts)
    return pd.DataFrame((counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy(), index=names)


@dataclass(frozen=True)
class Information:
    """Mutual information of label and expert in bits, and what chance alone reaches."""

    bits: float
    chance_mean: float
    chance_99: float

    def __repr__(self) -> str:
        return f"{self.bits:.3f} bits (chance {self.chance_mean:.3f}, 99 % below {self.chance_99:.3f})"


def mutual_information(routing: Routing, trace: RoutingTrace, *, n_shuffles: int = 200, seed: int = 0) -> Information:
    """Measure how much a token's best expert tells about its label, beside what chance alone reaches.

        I(L; E) = Σ p(l, e) log2( p(l, e) / (p(l) p(e)) )

    A finite sample never gives 0, so the labels are shuffled to see what it gives when there is nothing to tell.
    Tokens of one sequence share a label and resemble each other: labels of whole sequences are shuffled, because
    shuffling tokens would make chance look far too small.

    Args:
        routing: of one layer, recorded or re-routed.
        trace: gives labels and sequences.
        n_shuffles: at least 1.
        seed: of the shuffles.

    Returns:
        Information: bits, mean and 99th percentile over the shuffles.

    Raises:
        ValueError: the trace has no labels, or fewer than two sequences.
    """
    names, n_experts = _label_names(trace), routing.logits.shape[1]
    sequences = trace.sequences.unique(return_inverse=True)[1]
    n_sequences = int(sequences.max()) + 1
    if n_sequences < 2 or n_shuffles < 1:
        raise ValueError(f"needs 2 sequences and 1 shuffle at least, got {n_sequences} and {n_shuffles}")
    best = routing.experts[:, 0]
    served = best >= 0
    counts = _counts(sequences[served], best[served], n_sequences, n_experts)
    label_of = torch.zeros(n_sequences, dtype=torch.int64).scatter_(0, sequences, trace.labels)
    generator = torch.Generator().manual_seed(seed)
    orders = [label_of] + [label_of[torch.randperm(n_sequences, generator=generator)] for _ in range(n_shuffles)]
    tables = torch.stack([counts.new_zeros(len(names), n_experts).index_add_(0, order, counts) for order in orders])
    bits = _information(tables)
    return Information(float(bits[0]), float(bits[1:].mean()), float(bits[1:].quantile(0.99)))


def shared_information(a: Int[Tensor, " n"], b: Int[Tensor, " n"]) -> float:
    """Return the mutual information of two labelings of the same tokens in bits, with no regard to chance.

    Args:
        a: from 0; entries below 0 are left out.
        b: likewise.
    """
    both = (a >= 0) & (b >= 0)
    if not both.any():
        return 0.0
    a, b = a[both], b[both]
    return float(_information(_counts(a, b, int(a.max()) + 1, int(b.max()) + 1)[None])[0])


def _information(counts: Float[Tensor, "tables labels experts"]) -> Float[Tensor, " tables"]:
    joint = counts.double() / counts.double().sum((1, 2), keepdim=True).clamp_min(1)
    apart = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    return torch.where(joint > 0, joint * (joint / apart).log2(), 0.0).sum((1, 2)).float()


def _used(routing: Routing, n_experts: int) -> Bool[Tensor, "tokens experts"]:
    """Which experts serve each token."""
    used = torch.zeros(len(routing), n_experts + 1, dtype=torch.bool)
    return used.scatter_(1, routing.experts + 1, True)[:, 1:]


def _counts(rows: Int[Tensor, " n"], columns: Int[Tensor, " n"], n_rows: int, n_columns: int) -> Tensor:
    flat = torch.bincount(rows * n_columns + columns, minlength=n_rows * n_columns)
    return flat.reshape(n_rows, n_columns).float()


def _label_names(trace: RoutingTrace) -> list[str]:
    if len(trace) and set(trace.label_names) <= {""}:
        raise ValueError("the trace has no labels: record inside `with trace.labelled(text):`")
    return [name or "(none)" for name in trace.label_names]
