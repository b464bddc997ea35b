"""Dynamic skipping: leave a token's second expert out where the router hardly wanted it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from notebook_kit.expert_merging.mapped_experts import MappedExperts
from notebook_kit.expert_merging.view import ExpertLayer, expert_view
from notebook_kit.routing import RoutingTrace


@dataclass
class Skipping:
    """What `dynamic_skipping` switched on: β of each block, and the way back.

    `undo()`, or the end of a `with` block, gives the original model back.
    """

    beta: dict[str, float]
    handles: list = field(repr=False)

    def undo(self) -> None:
        """Choose as the router does again; twice does no harm."""
        while self.handles:
            self.handles.pop().remove()

    def __enter__(self) -> "Skipping":
        return self

    def __exit__(self, *error) -> None:
        self.undo()


def dynamic_skipping(model: nn.Module, trace: RoutingTrace, *, beta: float | None = None) -> Skipping:
    """Drop a token's second expert when its weight is small beside the first's, on a model that uses two.

    With p_(1) ≥ p_(2) the weights of a token's two experts, the second is left out where p_(2) < β p_(1), and the
    first takes its weight, so that they sum to 1 as before. β is set apart for each layer, as the median of
    p_(2) / p_(1) over calibration tokens: half of them skip.

        with dynamic_skipping(model, trace) as skipping:
            model(ids)

    Args:
        model: a transformers mixture of experts with top-2 routers; works in place, until undone.
        trace: `record_routing(model)` over calibration text.
        beta: for all layers, in [0, 1]: 0 is the full model, 1 is top-1; None for the median of each layer.

    Returns:
        The way back, with `.beta`. A trace recorded while it is on has expert -1 and weight 0 where one was skipped.

    Raises:
        ValueError: routers that choose another number than two, an empty trace or one of another model, β outside
            [0, 1], or a list of experts.

    Limits: time is saved with `model.set_experts_implementation("eager")`, which does not run a skipped expert; other
        implementations, gpt-oss and merged experts run one with weight 0.

    Source: Lu et al. (2024), section 3.2; Lucky-Lance/Expert_Sparsity. A router that does not divide by the sum of
        the picked probabilities leaves the first one's as it is, as its own top-1 would.
    """
    layers = expert_view(model)
    if beta is not None and not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1] or None, got {beta} (dynamic_skipping)")
    if list(trace.layers) != [layer.name for layer in layers]:
        raise ValueError(
            f"the trace is of another model: it has the routed layers {', '.join(trace.layers)}, "
            f"{type(model).__name__} has {', '.join(layer.name for layer in layers)} (dynamic_skipping)"
        )
    found = {}
    for number, layer in enumerate(layers):
        weights, k = trace.layer(number).weights, getattr(layer.router_module, "top_k", trace.k)
        if k != 2 or weights.shape[1] != 2:
            raise ValueError(
                f"dynamic skipping drops the second of two experts; {layer.name!r} uses {k}, and the trace "
                f"has {weights.shape[1]}"
            )
        if not layer.fused:
            raise ValueError(f"the experts of {layer.name!r} are a list; dynamic skipping needs a transformers model")
        # The mean of the two in the middle, unlike torch's median: half of the tokens lie below.
        ratio = (weights.amin(1) / weights.amax(1)).double()
        found[layer.name] = float(ratio.quantile(0.5)) if beta is None else float(beta)
    handles = []
    for layer in layers:
        handles.append(layer.router_module.register_forward_hook(_skip(found[layer.name], trace.normalize)))
        handles.append(layer.experts.register_forward_pre_hook(_leave_out(layer)))
    return Skipping(found, handles)


def _skip(beta: float, normalize: bool):
    def hook(module: nn.Module, args: tuple, output: tuple) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, experts = output
        first = torch.zeros_like(experts, dtype=torch.bool).scatter(1, weights.argmax(1, keepdim=True), True)
        p_1, p_2 = weights.amax(1, keepdim=True), weights.amin(1, keepdim=True)
        skip = p_2 < beta * p_1
        alone = (p_1 + p_2 if normalize else p_1) * first
        return logits, torch.where(skip, alone, weights), experts.masked_fill(skip & ~first, -1)

    return hook


def _leave_out(layer: ExpertLayer):
    """Eager experts of transformers leave out a choice of N; others are given one that exists, with its weight 0."""

    def hook(experts: nn.Module, args: tuple) -> tuple:
        x, chosen, *rest = args
        eager = experts.config._experts_implementation == "eager"
        # gpt-oss, the one with biases, has an eager loop of its own that refuses N.
        nowhere = len(layer) if eager and not layer.biased and not isinstance(experts, MappedExperts) else 0
        return (x, chosen.masked_fill(chosen < 0, nowhere), *rest)

    return hook
