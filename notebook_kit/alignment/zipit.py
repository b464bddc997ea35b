"""ZipIt: merge units that do alike, within a network as well as across, and stop where the tasks part ways."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Int
from torch import Tensor, nn

from notebook_kit.alignment.spec import Part, PermutationSpec
from notebook_kit.alignment.taps import each
from notebook_kit.alignment.unions import greedy_unions
from notebook_kit.alignment.units import feature_correlation, unit_activations
from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.weights import Weights, at_least_float32, check


@dataclass(frozen=True)
class Zipped:
    """What zipping made.

    Args:
        weights: one state dict a model; tensors below the zipped depth are the same objects in all of them, and with
            the outputs zipped too all of them are one.
        groups: permutation to Int[models, n]: the merged unit that each unit went into.
    """

    weights: tuple[dict[str, Tensor], ...]
    groups: dict[str, Int[Tensor, "models n"]]

    @property
    def parameters(self) -> int:
        """Numbers stored, a shared tensor counted once."""
        distinct = {id(tensor): tensor for weights in self.weights for tensor in weights.values()}
        return sum(tensor.numel() for tensor in distinct.values())


@method(family="alignment", paper="zipit")
@torch.no_grad()
def zipit(
    spec: PermutationSpec,
    models: Sequence[nn.Module],
    batches: Iterable,
    *,
    reduction: Annotated[float, Range(0, 1)] = 0.5,
    alpha: Annotated[float, Range(0, 1)] = 0.3,
    beta: Annotated[float, Range(0, 1)] = 0.125,
    depth: Annotated[int | None, Range(0, 4096)] = None,
) -> Zipped:
    """Merge networks by merging their most correlated units, wherever they are.

    Layer by layer, the n units of each of m networks stand side by side. Greedily join the two that correlate most on
    the same inputs, until (1 − r)·m·n groups are left: P [m·n, n'], with P[u, g] = 1 where unit u went into group g,
    P_i the n rows of network i. A group is the mean of its members; a layer that read a member reads the group:

        W = Σ_i M_i W_i U_iᵀ,     M = Pᵀ with rows that sum to 1 (merge),     U_i = P_iᵀ (unmerge: members' weights SUM)

    A permutation is the special case where every group has one unit of each network. Below `depth` there is one
    network; above it each keeps its own layers, of which the first reads the groups.

    Args:
        spec: of the networks, from `permutation_spec`; they are chains or residual networks of linear layers,
            convolutions and norms. Permutations left out of it stay unmerged.
        models: one or more of one architecture; one alone is made narrower.
        batches: inputs that all of them see: tensors, or mappings of keyword arguments.
        reduction: r, share of the units that goes; 1 − 1/m keeps the width, for two networks 0.5.
        alpha: what multiplies a group's correlations after each union, so that groups stay small; 0 forbids to join
            a group again as long as anything else can be joined.
        beta: budget of unions within one network, as a share of the units that it gives up; 0 forbids them as long as
            anything else can be joined. With one network there is no budget.
        depth: number of permutations that are zipped, in the order of the spec; None zips all of them and averages
            the outputs, for networks of one task.

    Returns:
        Zipped: `.weights`, one state dict a network. Where `reduction` changes the width, they fit a network of
        that width.

    Raises:
        ValueError: no models or inputs, a spec that is not of such networks, a depth that cuts through a stage.
        IncompatibleWeights: the models' keys or shapes differ.

    Limits: units that vary on no input correlate with nothing, and are joined last (those that never fire with each
        other first, which is free and this kit's rule). Norms over
        units (layer norm) change with the number of groups; batch norm needs `reset_batch_norm`.

    Source: Stoica et al. (2023), section 4; gstoica27/ZipIt, `matching_functions.py`. There a budget of 0 still
        admits one union within a network, and exhausted budgets end in arbitrary unions; here they are a last resort.
    """
    models = list(models)
    if not models:
        raise ValueError("zipit needs at least one model, got none")
    states = [model.state_dict() for model in models]
    check(states[0], states, names=[f"models[{i}]" for i in range(len(states))])
    spec.check(states[0], "models[0]")
    zipped = list(spec.sizes) if depth is None else list(spec.sizes)[:depth]
    if depth is not None and depth > len(spec.sizes):
        raise ValueError(f"depth must be at most the {len(spec.sizes)} permutations of the spec, got {depth} (zipit)")
    _check_spec(spec, models[0], set(zipped))
    batches = list(each(batches, "zipit"))
    seen = [unit_activations(spec, model, batches, perms=zipped) for model in models]
    groups = {}
    for perm in zipped:
        z = torch.cat([features[perm] for features in seen], dim=1)
        correlation = feature_correlation(z)
        silent = (z == 0).all(0)
        correlation[silent[:, None] & silent] = 1.0  # joining what never fires costs nothing
        n_out = max(1, round((1 - reduction) * len(models) * spec.sizes[perm]))
        flat = greedy_unions(correlation, len(models), n_out, alpha=alpha, beta=beta)
        groups[perm] = flat.reshape(len(models), -1)
    return Zipped(apply_groups(spec, states, groups, outputs=depth is None), groups)


def apply_groups(
    spec: PermutationSpec, states: Sequence[Weights], groups: dict[str, Int[Tensor, "models n"]], *, outputs: bool
) -> tuple[dict[str, Tensor], ...]:
    """W = Σ_i M_i W_i U_iᵀ for what is zipped, W_i U_iᵀ for the first layer above, W_i for the rest.

    Args:
        spec: of the networks.
        states: their state dicts.
        groups: permutation to merged unit of each unit; those left out stay apart.
        outputs: average what writes to no permutation, too.
    """
    result = [dict(state) for state in states]
    for name, w_0 in states[0].items():
        if not w_0.is_floating_point():
            continue
        parts = spec.parts(name) if name in spec.axes else []
        written = [part.perm for axis, part in parts if axis == 0]
        shared = written[0] in groups if written else outputs
        pieces = [project(spec, parts, at_least_float32(state[name]), i, groups) for i, state in enumerate(states)]
        if shared:
            # M's rows sum to 1 over all members; what writes to no units is averaged over networks.
            total = sum(pieces[1:], pieces[0]) / (1 if written else len(states))
            pieces = [total.to(w_0.dtype)] * len(states)
        for weights, piece in zip(result, pieces, strict=True):
            weights[name] = piece if piece.dtype == w_0.dtype else piece.to(w_0.dtype)
    return tuple([result[0]] * len(states)) if outputs else tuple(result)


def project(spec: PermutationSpec, parts: list[tuple[int, Part]], w: Tensor, i: int, groups: dict) -> Tensor:
    """M_i W U_iᵀ of one network's share of one tensor."""
    for axis, part in parts:
        if part.perm not in groups:
            continue
        group = groups[part.perm].to(w.device)
        n_out = int(group.max()) + 1
        view = part.view(w, axis, spec.sizes[part.perm])  # ..., 1, n, block, ...
        if axis == 0:  # written: the mean of the members
            size = torch.bincount(group.flatten(), minlength=n_out).to(w)
            view = view / size[group[i]].reshape(-1, *[1] * (view.dim() - 2))
        shape = list(view.shape)
        shape[axis + 1] = n_out
        w = w.new_zeros(shape).index_add_(axis + 1, group[i], view).flatten(axis, axis + 2)  # read: the sum
    return w


def _check_spec(spec: PermutationSpec, model: nn.Module, zipped: set[str]) -> None:
    modules = dict(model.named_modules())
    for name in spec.axes:
        embedding = isinstance(modules.get(name.rpartition(".")[0]), nn.Embedding)
        odd = any(
            part.slice
            or part.start
            or len(part.signs) > 1
            or part.perm in spec.inside
            or (part.block > 1 and axis == 0)
            for axis, part in spec.parts(name)
        )
        if embedding or (odd and len(spec.axes[name]) > 1):
            raise ValueError(
                f"zipit merges units of linear layers and convolutions; {name!r} is an embedding, or has heads or "
                "experts"
            )
        perms = {axis: part.perm for axis, part in spec.parts(name)}
        if perms.get(0) in zipped and perms.get(1, perms[0]) not in zipped:
            raise ValueError(
                f"a depth of {len(zipped)} zips {perms[0]!r} but not {perms[1]!r}, which it reads: choose a depth that "
                f"ends a stage; the order is {', '.join(spec.sizes)} (zipit)"
            )
