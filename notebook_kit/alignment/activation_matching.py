"""Activation matching: pair the hidden units of two networks that do alike on the same inputs."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from notebook_kit.alignment.spec import Part, Permutations, PermutationSpec
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
    own, N·h·w rows. Entries of several rows (heads) and several readers
    (the residual stream) add their correlations up. Gated units have a free sign: there |C|, and the sign with it.

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
        ValueError: no inputs, or a permutation whose activations cannot be captured.

    Limits: units that never vary (dead ReLU units, experts that no token reaches) correlate with nothing; they are
        paired last, in order. Experts are compared on the tokens that either model routes to them; with fewer than
        two such tokens they stay as they are.

    Source: Ainsworth, Hayase and Srinivasa (2022), section 3.1; samuela/git-re-basin.
    """
    places = _places(spec, model_a)
    moments: dict[Key, _Moments] = {key: _Moments() for rows in places.values() for key, _, _ in rows}
    n_batches = 0
    for batch in batches:
        seen = tuple(_run(model, batch, moments) for model in (model_a, model_b))
        for key, moment in moments.items():
            moment.add(*_features(key, (model_a, model_b), seen))
        n_batches += 1
    if n_batches == 0:
        raise ValueError("activation_matching needs at least one batch, got none (was a generator already used up?)")
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
        index = torch.from_numpy(linear_sum_assignment(free.cpu().numpy(), maximize=True)[1])
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
    index = torch.from_numpy(linear_sum_assignment((c.abs() if signs else c).cpu().numpy(), maximize=True)[1])
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
        mean_a, mean_b, square_a, square_b, product = (total / self.n for total in self.sums)
        deviation_a, deviation_b = (
            (square - mean**2).clamp(min=0).sqrt() for square, mean in ((square_a, mean_a), (square_b, mean_b))
        )
        scale = deviation_a[:, None] * deviation_b[None]
        covariance = product - mean_a[:, None] * mean_b[None]
        return torch.where(scale > 1e-10, covariance / scale.clamp(min=1e-10), 0.0)


LAYERS = (nn.Linear, nn.Conv2d)
Key = tuple[str, ...]
Place = tuple[Key, Part, list[Part]]


def _places(spec: PermutationSpec, model: nn.Module) -> dict[str, list[Place]]:
    """For each permutation where its entries are watched: (what is watched, part, parts that come before it there).

    The input of the layer that reads the units where there is one (for fused experts their hidden activations), else
    the output of the layer that makes them.
    """
    modules, found, blind = dict(model.named_modules()), {}, []
    for perm in spec.sizes:
        sides: dict[str, list[Place]] = {"input": [], "output": []}
        outer = spec.inside.get(perm, (None,))[0]
        for name, axis, part in spec.uses[perm]:
            parts = spec.axes[name][axis]
            # Entries that others reorder inside have no order of their own to be compared in.
            if any(spec.inside.get(other.perm, ("",))[0] == perm for other in parts):
                continue
            before = [other for other in parts if other.perm == outer]
            module, leaf = name.rsplit(".", 1) if "." in name else ("", name)
            if part.slice is not None and leaf == "down_proj" and hasattr(modules[module], "act_fn"):
                sides["input"].append((("expert", module, str(part.slice[1])), replace(part, slice=None), before))
            # An expert in a list sees other tokens in each model: its rows cannot be paired.
            elif leaf == "weight" and isinstance(modules.get(module), LAYERS) and ".experts." not in module:
                side = "input" if axis == 1 else "output"
                sides[side].append(((side, module), part, before))
        found[perm] = sides["input"] or sides["output"]
        if not found[perm]:
            blind.append(perm)
    if blind:
        raise ValueError(
            f"activation_matching cannot capture the activations of {', '.join(blind[:5])} in {type(model).__name__}: "
            "it watches nn.Linear and nn.Conv2d layers and fused experts; use weight_matching, or a spec without them"
        )
    return found


def _features(key: Key, models: tuple[nn.Module, nn.Module], seen: tuple[dict, dict]) -> list[Tensor]:
    """What was seen at one place in both models, [N, features]."""
    if key[0] != "expert":
        return [one[key] for one in seen]
    _, name, e = key
    # Hidden activations on the tokens that either model routes to this expert.
    routed = torch.stack([(one["chosen", name] == int(e)).any(-1) for one in seen]).any(0)
    return [
        hidden_activations(model.get_submodule(name), int(e), one["experts", name][routed])
        for model, one in zip(models, seen, strict=True)
    ]


def _run(model: nn.Module, batch, taps: Iterable[Key]) -> dict[Key, Tensor]:
    """Run a model on one batch and keep what passes the taps."""
    seen: dict[Key, Tensor] = {}

    def keep_input(key):
        def hook(module, args, kwargs):
            inputs = (*args, *kwargs.values())
            seen[key] = rows_of(module, inputs[0])
            if key[0] == "experts":
                seen["chosen", key[1]] = inputs[1]

        return hook

    def keep_output(key):
        return lambda module, args, output: seen.__setitem__(key, rows_of(module, output))

    keys = {key if key[0] != "expert" else ("experts", key[1]) for key in taps}
    modules, was_training = dict(model.named_modules()), model.training
    handles = [
        modules[key[1]].register_forward_hook(keep_output(key))
        if key[0] == "output"
        else modules[key[1]].register_forward_pre_hook(keep_input(key), with_kwargs=True)
        for key in keys
    ]
    try:
        model.eval()
        model(**batch) if hasattr(batch, "keys") else model(batch)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return seen


def rows_of(module: nn.Module, z: Tensor) -> Float[Tensor, "n features"]:
    """Features as columns; each place of a convolution's maps [n, c, h, w] is a row of its own."""
    z = z.detach()
    z = z.movedim(1, -1) if isinstance(module, nn.Conv2d) else z
    return z.reshape(-1, z.shape[-1])


def hidden_activations(experts: nn.Module, e: int, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens f"]:
    """act(gate·x) * (up·x) of one expert of a fused module."""
    gate, up = nn.functional.linear(x, experts.gate_up_proj[e]).chunk(2, dim=-1)
    return experts.act_fn(gate) * up
