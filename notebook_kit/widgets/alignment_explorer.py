"""AlignmentExplorer: two networks, their units matched, and the line between them, live."""

import functools
from collections.abc import Callable, Mapping, Sequence

from notebook_kit.alignment import Permutations, PermutationSpec
from notebook_kit.diagnostics.alignment import alignment_view
from notebook_kit.figures.alignment import alignment_figure
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.weights import Weights
from notebook_kit.widgets.explorer import Explorer


class AlignmentExplorer(Explorer):
    """What a permutation does to the line between two networks: drag the layer, the place on the line, the method.

    Args:
        a: state dict whose order is kept.
        b: state dict of the same architecture.
        spec: from `permutation_spec`.
        score: state dict to a number, higher is better; without it the units alone are drawn.
        models: the two models, which activation matching needs.
        batches: inputs for them.
        found: method to permutations that are known already; what "straight-through" needs.
        y: what the score measures, with its unit.
        fixed: starting values, such as `points=21`.

    Raises:
        IncompatibleWeights: a, b and the spec do not belong together.
    """

    def __init__(
        self,
        a: Weights,
        b: Weights,
        spec: PermutationSpec,
        score: Callable[[Weights], float] | None = None,
        *,
        models: Sequence | None = None,
        batches: Sequence | None = None,
        found: Mapping[str, Permutations] | None = None,
        y: str = "score",
        **fixed,
    ):
        cache: dict = {}

        @functools.wraps(alignment_view)
        def remembered(*args, **settings):
            # A line that was scored once is not scored again; the line of Python shown is without the memory.
            return alignment_view(*args, cache=cache, **settings)

        limits: dict = {"layer": Range(0, len(spec.sizes) - 1) if len(spec.sizes) > 1 else None}
        live = models is not None and batches is not None
        fixed |= {"models": models, "batches": batches} if live else {}
        fixed |= {"found": found} if found else {}
        possible = {"weight": True, "activation": live, "straight-through": False, "none": True}
        limits["method"] = Choice(*(name for name, yes in possible.items() if yes or name in (found or {})))
        if score is None:
            limits |= {"t": None, "points": None}
        if not any(any(part.signs) for uses in spec.uses.values() for _, _, part in uses):
            limits["signs"] = None
        arguments = (a, b, spec) if score is None else (a, b, spec, score)
        super().__init__(remembered, *arguments, draw=lambda view: alignment_figure(view, y=y), limits=limits, **fixed)
