"""RouterExplorer: a recorded trace, routed again live by other rules."""

from notebook_kit.figures.routing import WINDOW, routing_view
from notebook_kit.hyperparameters import Choice, Range, hyperparameters
from notebook_kit.routing import RoutingTrace
from notebook_kit.widgets.explorer import Explorer


class RouterExplorer(Explorer):
    """Look at every router call of a run: tokens, layers, labels, load, entropy, co-activation; re-route them live.

    Args:
        trace: from `record_routing`.
        options: hyperparameters of `routing_view` to start with, such as picture="labels"; or of `Explorer`.

    Raises:
        ValueError: the trace is empty.
    """

    def __init__(self, trace: RoutingTrace, **options):
        n_experts = min(trace.layer_logits(i).shape[1] for i in range(len(trace.layers)))
        limits: dict = {
            "layer": Range(0, len(trace.layers) - 1),
            "k": Range(1, n_experts),
            "start": Range(0, max(len(trace) - WINDOW, 0)),
        }
        if set(trace.label_names) <= {""}:
            pictures = hyperparameters(routing_view)["picture"].options
            limits["picture"] = Choice(*(picture for picture in pictures if picture != "labels"))
        limits |= options.pop("limits", None) or {}
        super().__init__(routing_view, trace, limits=limits, **({"k": min(trace.k, n_experts)} | options))
