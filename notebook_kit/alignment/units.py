"""What the hidden units of a network do on inputs: the features that correlations are taken of."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.alignment.spec import PermutationSpec
from notebook_kit.alignment.taps import each, places_of, watch


@torch.no_grad()
def unit_activations(
    spec: PermutationSpec,
    model: nn.Module,
    batches: Iterable,
    *,
    perms: Iterable[str] | None = None,
    per_input: bool = False,
) -> dict[str, Float[Tensor, "rows n"]]:
    """Activations of a network's units, as the next layer reads them (after the nonlinearity).

    Args:
        spec: from `permutation_spec`.
        model: the network.
        batches: inputs: tensors, or mappings of keyword arguments; read once.
        perms: permutations whose units are watched; all when None.
        per_input: one row an input, the mean over its places, as seen by the first layer that reads the units; so
            layers with maps of different sizes can be compared.

    Returns:
        Permutation to activations: one column a unit. Every input is a row, and so is every place of a convolution's
        maps, every entry of a block, and every layer that reads a residual stream.

    Raises:
        ValueError: no inputs; a permutation that the spec does not have; units that cannot be watched: routed experts,
            and query heads within a group.
    """
    wanted = list(spec.sizes) if perms is None else list(perms)
    unknown = [perm for perm in wanted if perm not in spec.sizes]
    if unknown:
        names = ", ".join(list(spec.sizes)[:8])
        raise ValueError(f"no permutation is called {unknown[0]!r}; the spec has {names} ... (unit_activations)")
    places = places_of(spec, model)
    apart = [perm for perm in wanted if any(key[0] == "expert" or before for key, _, before in places[perm])]
    if apart:
        raise ValueError(f"the units of {apart[0]!r} have no activations of their own to compare (unit_activations)")
    keys = {key for perm in wanted for key, _, _ in places[perm]}
    rows: dict[str, list[Tensor]] = {perm: [] for perm in wanted}
    for batch in each(batches, "unit_activations"):
        seen = watch(model, batch, keys)
        for perm in wanted:
            for key, part, _ in places[perm][: 1 if per_input else None]:
                z = part.view(seen[key], 1, spec.sizes[perm])  # [rows, repeats, n, block]
                z = z.movedim(2, -1).flatten(0, -2)
                rows[perm].append(z.reshape(_length(batch), -1, z.shape[1]).mean(1) if per_input else z)
    return {perm: torch.cat(parts) for perm, parts in rows.items()}


def feature_correlation(x: Float[Tensor, "rows n"], y: Float[Tensor, "rows m"] | None = None) -> Float[Tensor, "n m"]:
    """Pearson's correlation of every column of x with every column of y; 0 where a column never varies.

    Args:
        x: features.
        y: features on the same inputs; x itself when None.

    Raises:
        ValueError: NaN or Inf, which would correlate with nothing and everything.
    """
    unit = [_standardised(z) for z in ((x,) if y is None else (x, y))]
    return unit[0].T @ unit[-1]


def _length(batch) -> int:
    return len(next(iter(batch.values())) if hasattr(batch, "keys") else batch)


def _standardised(z: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
    z = z.double()
    if not torch.isfinite(z).all():
        raise ValueError("features hold NaN or Inf: is a model broken, or its inputs? (feature_correlation)")
    z = z - z.mean(0)
    norm = z.norm(dim=0)
    return torch.where(norm > 1e-10 * len(z) ** 0.5, z / norm.clamp(min=1e-30), 0.0)
