"""RouterExplorer: a recorded trace, routed again live by other rules."""

from notebook_kit.diagnostics.routing import same_text
from notebook_kit.figures.routing import PAIRS, WINDOW, routing_view
from notebook_kit.hyperparameters import Choice, Range, hyperparameters
from notebook_kit.routing import RoutingTrace
from notebook_kit.widgets.explorer import Explorer


class RouterExplorer(Explorer):
    """Look at every router call of a run, re-routed live: text, tokens, layers, labels, load, entropy, flow, drift.

    Args:
        trace: from `record_routing`.
        other: the same text recorded with another checkpoint; adds the pictures "drift" and "confusion".
        options: hyperparameters of `routing_view` to start with, such as picture="labels"; or of `Explorer`.

    Raises:
        ValueError: the trace is empty, or the other is of another text.
    """

    def __init__(self, trace: RoutingTrace, other: RoutingTrace | None = None, **options):
        n_experts = min(trace.layer_logits(i).shape[1] for i in range(len(trace.layers)))
        limits: dict = {
            "layer": Range(0, len(trace.layers) - 1),
            "k": Range(1, n_experts),
            "start": Range(0, max(len(trace) - WINDOW, 0)),
        }
        schema, missing = hyperparameters(routing_view), set()
        if set(trace.label_names) <= {""}:
            missing.add("labels")
        if len(trace.layers) < 2:
            missing.add("flow")
        if other is None:
            missing |= set(PAIRS)
        else:
            same_text(trace, other)
            options["other"] = other
        limits["picture"] = Choice(*(name for name in schema["picture"].options if name not in missing))
        if int(trace.tokens.min()) < 0:  # a hash table needs ids
            limits["router"] = Choice(*(name for name in schema["router"].options if name != "hash"))
        limits |= options.pop("limits", None) or {}
        super().__init__(routing_view, trace, limits=limits, **({"k": min(trace.k, n_experts)} | options))
