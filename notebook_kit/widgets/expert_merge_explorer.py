"""ExpertMergeExplorer: which experts join, in what order of units, and what it costs, live."""

import functools
from collections.abc import Callable, Iterable

from torch import nn

from notebook_kit.diagnostics.experts import expert_merge_view
from notebook_kit.expert_merging import expert_inputs, expert_view, usage_of
from notebook_kit.figures.experts import expert_merge_figure
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routing import RoutingTrace
from notebook_kit.widgets.explorer import Explorer


class ExpertMergeExplorer(Explorer):
    """Shrink a mixture of experts: drag the number of experts, switch method and alignment, watch groups and score.

    Below, every setting seen so far stays as a dot: score against what experts store.

    Args:
        model: a mixture of experts; not modified.
        trace: `record_routing(model)` over calibration text.
        score: merged model to a number, higher is better.
        batches: inputs that experts are run on, for activation alignment and for methods that look at outputs; by
            default a part of the trace's own text, and no activation alignment.
        fixed: starting values, such as `n_experts=6`.

    Raises:
        ValueError: the trace is empty or of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: RoutingTrace,
        score: Callable[[nn.Module], float] | None = None,
        *,
        batches: Iterable | None = None,
        **fixed,
    ):
        cache: dict = {}

        @functools.wraps(expert_merge_view)
        def remembered(*args, **settings):
            return expert_merge_view(*args, cache=cache, **settings)

        most = min(len(shares) for shares in usage_of(trace, model).values())
        layers = len(expert_view(model))
        limits: dict = {"n_experts": Range(1, most), "layer": Range(0, layers - 1) if layers > 1 else None}
        if batches is not None:
            fixed["inputs"] = expert_inputs(model, batches)
        else:
            limits["align"] = Choice(True, False)
            if (trace.tokens < 0).any():  # nothing to run experts on
                limits["method"] = Choice("merge", "drop", "replace")
        last: list = [None, 0.0]

        def scored(view):
            # Looking at another layer leaves the model, and its score, as they are.
            if last[0] is not view.model:
                last[:] = view.model, score(view.model)
            return last[1]

        seen: dict = {}

        def drawn(view, score=None, settings=None):
            if score is not None:
                seen[view.parameters[1], settings["method"], bool(settings["align"]), round(float(score), 4)] = None
            return expert_merge_figure(view, score, seen=list(seen))

        super().__init__(
            remembered,
            model,
            trace,
            score=None if score is None else scored,
            draw=drawn,
            limits=limits,
            **fixed,
        )
