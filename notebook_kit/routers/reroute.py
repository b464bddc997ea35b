"""Route a recorded trace again by another router, from its logits alone."""

import itertools
from collections.abc import Callable
from dataclasses import fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from notebook_kit.hyperparameters import hyperparameters, validate
from notebook_kit.routers.router import Router
from notebook_kit.routing import Routing, RoutingTrace


def reroute(
    trace: RoutingTrace,
    router: type[Router] | Router | Callable[..., Routing],
    layer: int | None = None,
    **hyperparameter_values,
) -> Routing | list[Routing]:
    """Ask what another router would have done with the same logits; the model is not run.

    All tokens of the trace count as one call: capacities are over the whole trace. In a deeper layer the logits
    would themselves change if the layers before it had routed otherwise; that is not seen here.

    Args:
        trace: from `record_routing`.
        router: a class such as `TopK`, a router that is made already (with its own table, bias or distilled
            weights, on whichever device), both in evaluation mode: no noise; or a function from logits
            [tokens, experts] to Routing. Routers by token id read the trace's ids.
        layer: of the trace; None is all.
        hyperparameter_values: of the router's class; for a function, its keyword arguments.

    Returns:
        Routing, or for all layers a list of them.

    Raises:
        ValueError: no such layer, an empty trace, hyperparameters out of range or given with a made router, or one
            that is for another number of experts.
    """
    is_router = isinstance(router, type) and issubclass(router, Router)
    if is_router:
        validate(hyperparameters(router), hyperparameter_values)
    layers = range(len(trace.layers)) if layer is None else [layer]
    results = []
    with torch.no_grad():
        for index in layers:
            logits = trace.layer_logits(index)
            if isinstance(router, Router):
                results.append(_by(router, trace, logits, hyperparameter_values))
            elif is_router:
                # W plays no part: the trace has what it would have computed.
                with torch.random.fork_rng(devices=[]):
                    made = router(1, logits.shape[1], **hyperparameter_values).eval()
                results.append(route_trace(made, trace, logits))
            else:
                results.append(router(logits, **hyperparameter_values))
    return results if layer is None else results[0]


def route_trace(router: Router, trace: RoutingTrace, logits: Float[Tensor, "tokens experts"]) -> Routing:
    """Let a router decide from logits, with the token ids of a trace if it reads them.

    Args:
        router: any.
        trace: of as many tokens.
        logits: of one layer, perhaps changed.
    """
    if not router.needs_tokens:
        return router.route(logits)
    previous = {"previous": previous_ids(trace).to(logits.device)} if router.needs_previous else {}
    return router.route(logits, tokens=trace.tokens.to(logits.device), **previous)


def previous_ids(trace: RoutingTrace) -> Int[Tensor, " tokens"]:
    """The id before each token in its own sequence, -1 at its beginning; a batch being generated is interleaved."""
    by_position = trace.positions.sort(stable=True).indices
    order = by_position[trace.sequences[by_position].sort(stable=True).indices]
    tokens, sequences, positions = (part[order] for part in (trace.tokens, trace.sequences, trace.positions))
    follows = (sequences[1:] == sequences[:-1]) & (positions[1:] == positions[:-1] + 1)
    previous = torch.full_like(tokens, -1)
    previous[order[1:]] = tokens[:-1].where(follows, -1)
    return previous


def _by(router: Router, trace: RoutingTrace, logits: Tensor, values: dict) -> Routing:
    if values:
        raise ValueError(
            f"{type(router).__name__} is made already: {', '.join(values)} cannot be set any more (reroute)"
        )
    if router.n_experts != logits.shape[1]:
        raise ValueError(f"the router is for {router.n_experts} experts, the trace has {logits.shape[1]} (reroute)")
    was_training = router.training
    try:
        device = next(itertools.chain(router.parameters(), router.buffers()), logits).device
        routing = route_trace(router.eval(), trace, logits.to(device))
        values = {field.name: getattr(routing, field.name) for field in fields(routing)}
        return Routing(**{name: None if value is None else value.to(logits.device) for name, value in values.items()})
    finally:
        router.train(was_training)
