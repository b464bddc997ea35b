"""Route a recorded trace again by another router, from its logits alone."""

from collections.abc import Callable

import torch

from notebook_kit.hyperparameters import hyperparameters, validate
from notebook_kit.routers.router import Router
from notebook_kit.routing import Routing, RoutingTrace


def reroute(
    trace: RoutingTrace,
    router: type[Router] | Callable[..., Routing],
    layer: int | None = None,
    **hyperparameter_values,
) -> Routing | list[Routing]:
    """Ask what another router would have done with the same logits; the model is not run.

    All tokens of the trace count as one call: capacities are over the whole trace. In a deeper layer the logits
    would themselves change if the layers before it had routed otherwise; that is not seen here.

    Args:
        trace: from `record_routing`.
        router: a class such as `TopK` (in evaluation mode: no noise), or a function from logits
            [tokens, experts] to Routing.
        layer: of the trace; None is all.
        hyperparameter_values: of the router; for a function, its keyword arguments.

    Returns:
        Routing, or for all layers a list of them.

    Raises:
        ValueError: no such layer, an empty trace, hyperparameters out of range.
    """
    is_router = isinstance(router, type) and issubclass(router, Router)
    if is_router:
        validate(hyperparameters(router), hyperparameter_values)
    layers = range(len(trace.layers)) if layer is None else [layer]
    results = []
    with torch.no_grad():
        for index in layers:
            logits = trace.layer_logits(index)
            if is_router:
                # W plays no part: the trace has what it would have computed.
                with torch.random.fork_rng(devices=[]):
                    made = router(1, logits.shape[1], **hyperparameter_values).eval()
                results.append(made.route(logits))
            else:
                results.append(router(logits, **hyperparameter_values))
    return results if layer is None else results[0]
