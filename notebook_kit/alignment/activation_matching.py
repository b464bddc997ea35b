"""Activation matching: pair the hidden units of two networks that do alike on the same inputs."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from notebook_kit.alignment.permutations import Permutations
from notebook_kit.alignment.spec import PermutationSpec
from notebook_kit.alignment.taps import Key, each, features_at, places_of, watch
from notebook_kit.catalog import method


@method(family="alignment", paper="git-re-basin")
@torch.no_grad()
def activation_matching(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Iterable,
    *,
    signs: bool = True,
) -> Permutations:
    """Find the permutations of model b's hidden units whose activations correlate most with model a's.

    For each permutation of n entries, both models see the same inputs; with z_A, z_B [N, n] what the next linear
    layer reads (after the nonlinearity), C is Pearson's correlation of their columns and the permutation is the best
    assignment, Σ_i C[i, p[i]] → max. One pass, no iteration. For channels every place of the maps is an input of its
    own, N·h·w rows. Entries of several rows (heads) and several readers (the residual stream) add their correlations
    up. Gated units have a free sign: there |C|, and the sign with it.

    Args:
        spec: what may move together, from `permutation_spec`.
        model_a: its order is kept.
        model_b: of the same architecture; its units are to be reordered.
        batches: inputs: tensors, or mappings of keyword arguments; read once.
        signs: use the free sign of gated units, where the spec has them.

    Returns:
        Permutations: name to index vector for `permute(spec, result, weights_b)`; `.objective` holds one sum of
        correlations per permutation.

    Raises:
        IncompatibleWeights: a model is not what the spec was made for.
        ValueError: no inputs, activations with NaN or Inf, or a permutation whose activations cannot be captured.

    Limits: units that never vary (dead ReLU units, experts that no token reaches) correlate with nothing; they are
        paired last, in order. Experts are compared on the tokens that either model routes to them; with fewer than
        two such tokens they stay as they are.

    Source: Ainsworth, Hayase and Srinivasa (2022), section 3.1; samuela/git-re-basin.
    """
    for model, name in ((model_a, "model_a"), (model_b, "model_b")):
        spec.check(model.state_dict(), name)
    places = places_of(spec, model_a)
    moments: dict[Key, _Moments] = {key: _Moments() for rows in places.values() for key, _, _ in rows}
    for batch in each(batches, "activation_matching"):
        seen = tuple(watch(model, batch, moments) for model in (model_a, model_b))
        for key, moment in moments.items():
            moment.add(*features_at(key, (model_a, model_b), seen))
    correlations = {key: moment.correlation() for key, moment in moments.items()}

    found = Permutations()
    for perm, n in spec.sizes.items():  # an outer permutation stands before those inside it
        total, gated = torch.zeros(n, n, dtype=torch.float64), False
        for key, part, before in places[perm]:
            c = correlations[key]
            if c is None:
                continue
            columns = torch.arange(len(c))
            for outer in before:
                view = outer.view(columns, 0, spec.sizes[outer.perm])
                view.copy_(view.index_select(1, found[outer.perm]))
            rows = part.view(torch.arange(len(c)), 0, n)  # [repeats, n, block]
            chosen = part.view(columns, 0, n)
            for repeat in range(len(part.signs)):
                for b in range(part.block):
                    total += c[rows[repeat, :, b]][:, chosen[repeat, :, b]]
            gated = gated or any(part.signs)
        free = total.abs() if gated and signs else total
        index = torch.from_numpy(linear_sum_assignment(free.numpy(), maximize=True)[1])
        found[perm], order = index, torch.arange(n)
        if gated and signs:
            found.signs[perm] = torch.where(total[order, index] < 0, -1.0, 1.0)
        found.objective.append(free[order, index].sum().item())
    return found


@torch.no_grad()
def match_features(
    z_a: Float[Tensor, "n features"], z_b: Float[Tensor, "n features"], name: str = "units", *, signs: bool = False
) -> Permutations:
    """Pair the columns of two sets of features by their correlation.

    Args:
        z_a: features of a, row by row on the same inputs as z_b.
        z_b: features of b.
        name: of the permutation in the result.
        signs: let a unit count with either sign.

    Returns:
        Permutations: the one permutation, with its sign; the identity if there are fewer than two rows.
    """
    moments = _Moments()
    moments.add(z_a, z_b)
    c = moments.correlation()
    order = torch.arange(z_a.shape[1])
    if c is None:
        return Permutations({name: order})
    index = torch.from_numpy(linear_sum_assignment((c.abs() if signs else c).numpy(), maximize=True)[1])
    sign = {name: torch.where(c[order, index] < 0, -1.0, 1.0)} if signs else {}
    return Permutations({name: index}, signs=sign)


class _Moments:
    """Sums from which the correlation of every column of a with every column of b follows."""

    def __init__(self):
        self.n, self.sums = 0, None

    def add(self, z_a: Float[Tensor, "n features"], z_b: Float[Tensor, "n features"]) -> None:
        z_a, z_b = z_a.double(), z_b.double()
        new = (z_a.sum(0), z_b.sum(0), (z_a**2).sum(0), (z_b**2).sum(0), z_a.T @ z_b)
        self.sums = new if self.sums is None else tuple(old + more for old, more in zip(self.sums, new, strict=True))
        self.n += len(z_a)

    def correlation(self) -> Float[Tensor, "features features"] | None:
        if self.n < 2:
            return None
        if not all(torch.isfinite(total).all() for total in self.sums):
            raise ValueError("activations hold NaN or Inf: is a model broken, or its inputs?")
        mean_a, mean_b, square_a, square_b, product = (total / self.n for total in self.sums)
        deviation_a, deviation_b = (
            (square - mean**2).clamp(min=0).sqrt() for square, mean in ((square_a, mean_a), (square_b, mean_b))
        )
        scale = deviation_a[:, None] * deviation_b[None]
        covariance = product - mean_a[:, None] * mean_b[None]
        return torch.where(scale > 1e-10, covariance / scale.clamp(min=1e-10), 0.0).cpu()
