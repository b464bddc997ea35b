"""The plan: which experts of a layer join, and with what weight.

Every method of this room makes a plan (layer to groups and weights) and applies it (`apply`); they differ in how they
group and in how they combine a group into one expert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.expert_merging.view import expert_view
from notebook_kit.routing import RoutingTrace
from notebook_kit.weights import at_least_float32


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer's N experts.

    Args:
        groups: one tuple of experts for each stored expert, the dominant one first; each expert stands in one group.
        weights: what multiplies each member in its group's average; they sum to 1.
    """

    groups: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        members = sorted(member for group in self.groups for member in group)
        if members != list(range(len(members))) or not all(self.groups):
            raise ValueError(f"groups must hold each expert once, got {self.groups}")
        for group, weights in zip(self.groups, self.weights, strict=True):
            if len(group) != len(weights) or abs(sum(weights) - 1) > 1e-6:
                raise ValueError(f"the weights of group {group} must be one a member and sum to 1, got {weights}")

    @property
    def expert_map(self) -> tuple[int, ...]:
        """Expert (router row) to group (stored expert)."""
        place = {member: number for number, group in enumerate(self.groups) for member in group}
        return tuple(place[member] for member in range(len(place)))

    @property
    def dominant(self) -> tuple[int, ...]:
        """The dominant expert of each group."""
        return tuple(group[0] for group in self.groups)


def usage_of(trace: RoutingTrace, model: nn.Module) -> dict[str, Float[Tensor, " experts"]]:
    """Each expert's share of the routed (token, slot) pairs, layer by layer: f_i, Σ_i f_i = 1.

    Args:
        trace: from `record_routing(model)`.
        model: the model that it was recorded on.

    Returns:
        Block name to shares.

    Raises:
        ValueError: the trace is empty, or is of another model (other layers or numbers of experts).
        TypeError: not a trace at all.
    """
    layers = expert_view(model)
    check_trace(trace)
    names = [layer.name for layer in layers]
    if list(trace.layers) != names:
        raise ValueError(
            f"the trace is of another model: it has {len(trace.layers)} routed layers ({', '.join(trace.layers[:3])}), "
            f"{type(model).__name__} has {len(names)} ({', '.join(names[:3])})"
        )
    usage = {}
    for number, layer in enumerate(layers):
        routing = trace.layer(number)
        rows = len(layer.router)
        if routing.logits.shape[1] != rows:
            raise ValueError(
                f"the trace is of another model: {layer.name!r} has {rows} experts, in the trace "
                f"{routing.logits.shape[1]}"
            )
        if layer.expert_map != tuple(range(rows)):
            raise ValueError(
                f"the experts of {layer.name!r} are merged already ({len(layer)} stored): start from the original"
            )
        usage[layer.name] = routing.load
    return usage


def check_trace(trace: object) -> None:
    """Refuse what is no trace.

    Raises:
        TypeError: not a RoutingTrace.
    """
    if not isinstance(trace, RoutingTrace):
        kind = type(trace).__name__
        raise TypeError(f"trace must be a RoutingTrace, got {kind}: record one with `record_routing(model)`")


def check_n_experts(n_experts: int, usage: Mapping[str, Tensor], owner: str) -> None:
    """Refuse more experts than there are.

    Raises:
        ValueError: n_experts is not in [1, N].
    """
    most = min(len(shares) for shares in usage.values())
    if not 1 <= n_experts <= most:
        raise ValueError(f"n_experts must be in [1, {most}], got {n_experts} ({owner})")


def dominant_experts(
    scores: Mapping[str | int, Float[Tensor, " experts"]], n_experts: int, *, adaptive: bool = False
) -> dict[str | int, list[int]]:
    """Pick the experts that stay: the highest scores, in each layer or over all layers together.

    Args:
        scores: block name (or number) to scores, such as usage.
        n_experts: per layer, or on average per layer where adaptive.
        adaptive: rank (layer, expert) pairs together; each layer's best is forced in, and the rest of the budget
            goes to the highest scores anywhere. Ties go to the earlier layer and expert.

    Returns:
        Block to the experts that stay, in rising order.
    """
    order = {name: shares.argsort(descending=True, stable=True).tolist() for name, shares in scores.items()}
    if not adaptive:
        return {name: sorted(ranked[:n_experts]) for name, ranked in order.items()}
    kept = {name: [ranked[0]] for name, ranked in order.items()}
    rest = [(scores[name][e].item(), name, e) for name, ranked in order.items() for e in ranked[1:]]
    rest.sort(key=lambda row: -row[0])  # stable: a budget is met exactly, ties or not
    for _, name, e in rest[: n_experts * len(scores) - len(scores)]:
        kept[name].append(e)
    return {name: sorted(experts) for name, experts in kept.items()}


def group_by_similarity(
    dominant: Sequence[int], similarity: Float[Tensor, "experts experts"]
) -> tuple[tuple[int, ...], ...]:
    """Attach every other expert to the dominant expert that it is most similar to.

    Args:
        dominant: the experts that lead a group.
        similarity: S, higher is more alike.

    Returns:
        One group a dominant expert, which stands first.
    """
    groups = {leader: [leader] for leader in dominant}
    for expert in range(len(similarity)):
        if expert not in groups:
            nearest = int(similarity[expert, list(dominant)].argmax())
            groups[dominant[nearest]].append(expert)
    return tuple(tuple(group) for group in groups.values())


def cosine_similarity(vectors: Float[Tensor, "experts n"]) -> Float[Tensor, "experts experts"]:
    """S_ij = ½ (1 + cos(v_i, v_j)), in [0, 1] with S_ii = 1."""
    unit = nn.functional.normalize(at_least_float32(vectors), dim=1)
    s = (1 + (unit @ unit.T).clamp(-1, 1)) / 2
    return s.fill_diagonal_(1.0)


def merge_weights_of(
    usage: Float[Tensor, " experts"],
    groups: Sequence[Sequence[int]],
    rule: str,
    generator: torch.Generator | None = None,
) -> tuple[tuple[float, ...], ...]:
    """The weights of each group's average.

    Args:
        usage: shares f.
        groups: experts, group by group.
        rule: "frequency" (f), "uniform" (1), "reversed" (1 − f) or "random" (drawn from [0, 1)), each divided by its
            sum over the group; "dominant" (the first alone). A group that no token was routed to is averaged uniformly.
        generator: of "random".
    """
    if rule == "dominant":
        return tuple((1.0, *(0.0,) * (len(group) - 1)) for group in groups)
    if rule == "random":
        f = torch.rand(len(usage), generator=generator, dtype=torch.float64)
    else:
        f = {"frequency": usage, "uniform": torch.ones_like(usage), "reversed": 1 - usage}[rule].double()
    result = []
    for group in groups:
        share = f[list(group)]
        share = share / share.sum() if share.sum() > 0 else torch.full_like(share, 1 / len(group))
        result.append(tuple(share.tolist()))
    return tuple(result)
