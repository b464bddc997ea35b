"""WeightExplorer: what experts changed, layers by metrics, live."""

from collections.abc import Sequence

from notebook_kit.diagnostics.weights import task_vectors
from notebook_kit.figures.weights import WHOLE, weight_view
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.weights import Weights
from notebook_kit.widgets.explorer import Explorer


class WeightExplorer(Explorer):
    """Explore what experts changed: norms, cosines, sign agreement, spectra and shared subspaces, by layer.

    `tensor` picks one matrix for its details; `density` acts on sign agreement, `rank` on subspace overlap.

    Args:
        base: state dict θ₀.
        experts: state dicts of the same keys and shapes.
        names: of the experts.
        settings: starting values of `weight_view`'s hyperparameters.

    Raises:
        IncompatibleWeights: the experts do not fit the base.
    """

    def __init__(self, base: Weights, experts: Sequence[Weights], names: Sequence[str] | None = None, **settings):
        vectors = task_vectors(base, experts, names)
        limits = {"tensor": Choice(WHOLE, *vectors.matrices), "rank": Range(1, min(64, vectors.widest))}
        extra = {} if names is None else {"names": list(names)}
        super().__init__(weight_view, base, experts, limits=limits, **extra, **settings)
