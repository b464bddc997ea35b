"""Which experts a layer can do without: try every set, and look at the layer's output."""

import math
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from notebook_kit.expert_merging.outputs import expert_outputs
from notebook_kit.expert_merging.view import ExpertLayer
from notebook_kit.routing import RoutingTrace
from notebook_kit.routing.switch import is_switch_router, switch_decision

EXHAUSTIVE = 1000  # sets that are tried one by one; above that, experts are removed greedily
Losses = dict[tuple[int, ...], float]


@torch.no_grad()
def best_subset(
    layer: ExpertLayer, x: Float[Tensor, "tokens d"], trace: RoutingTrace, n_experts: int, *, greedy: bool | None = None
) -> tuple[tuple[int, ...], Losses]:
    """Find the set of experts whose layer output is nearest to the whole layer's.

        loss(S) = ‖Z − Z_S‖_F,   Z_S: logits outside S at −∞, softmax and top-k over the rest

    All C(N, r) sets where they are at most 1000 (8 choose 4 is 70); beyond, one expert after the other is removed,
    each time the one that costs least, which may miss the best set.

    Args:
        layer: from `expert_view`.
        x: what its experts receive, [T, d]; every expert's output on all of it is kept, N T d numbers.
        trace: of the model: says how many experts are used, and whether their weights are divided by their sum.
        n_experts: r.
        greedy: choose the search; None lets the number of sets decide.

    Returns:
        The set, rising; and the loss of every set that was tried.

    Raises:
        ValueError: a router that scores experts apart from each other (sigmoid), more experts than there are, or NaN.

    Source: Lu et al. (2024), equation 4; its code adds up plain norms over batches: here there is one batch. Greedy
        removal is this kit's. Layers are judged apart, on inputs from the whole model; that Switch's router drops
        tokens beyond an expert's capacity is left out of account.
    """
    if trace.scoring != "softmax":
        raise ValueError(f"reconstruction masks a softmax router; {layer.name!r} scores with a {trace.scoring}")
    logits, outputs = router_logits(layer, x), expert_outputs(layer, x)
    n = len(outputs)
    if not 1 <= n_experts <= n:
        raise ValueError(f"n_experts must be in [1, {n}], got {n_experts} (best_subset)")
    everything = tuple(range(n))
    z = mixture(outputs, logits, everything, trace)
    if not torch.isfinite(z).all():
        raise ValueError(f"the outputs of {layer.name!r} hold NaN or Inf: is the model broken? (best_subset)")

    def loss(kept: tuple[int, ...]) -> float:
        return torch.linalg.vector_norm(z - mixture(outputs, logits, kept, trace)).item()

    if greedy is None:
        greedy = math.comb(n, n_experts) > EXHAUSTIVE
    losses: Losses = {}
    if not greedy:
        losses = {kept: loss(kept) for kept in combinations(everything, n_experts)}
        return min(losses, key=losses.get), losses
    kept = everything
    losses[kept] = 0.0
    while len(kept) > n_experts:
        tried = {tuple(e for e in kept if e != gone): 0.0 for gone in kept}
        tried = {smaller: loss(smaller) for smaller in tried}
        losses |= tried
        kept = min(tried, key=tried.get)
    return kept, losses


def mixture(
    outputs: Float[Tensor, "experts tokens d"],
    logits: Float[Tensor, "tokens experts"],
    kept: tuple[int, ...],
    trace: RoutingTrace,
) -> Float[Tensor, "tokens d"]:
    """The layer's output when only some experts may be chosen."""
    probs, places = logits[:, list(kept)].softmax(-1).topk(min(trace.k, len(kept)))
    if trace.normalize:
        probs = probs / probs.sum(-1, keepdim=True)
    chosen: Int[Tensor, "tokens k"] = torch.tensor(kept, device=logits.device)[places]
    tokens = torch.arange(len(logits), device=logits.device)[:, None]
    return (probs[..., None] * outputs[chosen, tokens]).sum(1)


def router_logits(layer: ExpertLayer, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens experts"]:
    """What the router of a layer says about its inputs."""
    router = layer.router_module
    if is_switch_router(router):
        return switch_decision(router(x[None]))[0].float()
    output = router(x)
    return (output[0] if isinstance(output, tuple) else output.logits).float()
