"""ZipIt's matching: join the two most correlated units, again and again, until few enough are left."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

LAST_RESORT = 10.0  # more than any correlation


def greedy_unions(
    correlation: Float[Tensor, "units units"], n_models: int, n_out: int, *, alpha: float = 0.3, beta: float = 0.125
) -> Int[Tensor, " units"]:
    """Join units greedily into n_out groups.

    Each step takes the two groups i < j of the largest entry; i becomes their union. Its correlation with any k is
    the smaller of theirs, times alpha: min(C_ik, C_jk)·α. So a union must suit all its members, and large ones wait.

    Args:
        correlation: C of all units with all, those of one model next to each other.
        n_models: models that they come from, with equally many units each.
        n_out: groups to leave, 1 to units.
        alpha: repeat penalty; with 0, unions are joined again only when nothing else can be.
        beta: budget of each model's unions among its own groups (a union counts as its first unit's model), as a share
            of the unions per model, rounded down; a spent budget is overdrawn only when nothing else can be joined.
            One model alone has no budget.

    Returns:
        Number of the group of each unit; groups are numbered by their first units.

    Raises:
        ValueError: n_out or the number of units does not fit.
    """
    units = len(correlation)
    if units % n_models or not 1 <= n_out <= units:
        raise ValueError(
            f"{units} units of {n_models} models cannot be joined into {n_out} groups: it needs equally many of each "
            f"model, and 1 to {units} groups"
        )
    c = correlation.double().cpu().numpy().copy()
    np.fill_diagonal(c, -np.inf)
    label, everything = np.arange(units), np.arange(units)
    model = label // (units // n_models)  # of a group: that of its first unit
    alive = np.ones(units, bool)
    budget = np.full(n_models, int((units - n_out) // n_models * beta + 1e-4))
    # Pairs that are only joined when no other is left.
    refused = np.zeros((units, units), bool)
    if n_models > 1:
        refused |= (model[:, None] == model) & (budget[model] == 0)

    def best_of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = c[rows] - LAST_RESORT * refused[rows]
        column = values.argmax(1)
        return values[np.arange(len(rows)), column], column

    value, column = best_of(everything)
    for _ in range(units - n_out):
        i = int(value.argmax())
        i, j = sorted((i, int(column[i])))
        c[i] = c[:, i] = np.minimum(c[i], c[j]) * (alpha if alpha > 0 else 1.0)
        refused[i] = refused[:, i] = refused[i] | refused[j] | (alpha == 0)
        c[i, i] = -np.inf
        c[j] = c[:, j] = -np.inf
        label[label == j] = i
        alive[j], value[j] = False, -np.inf
        # Only rows whose best entry was touched are searched again; all of them when a budget is spent.
        again = alive & ((column == i) | (column == j))
        again[i] = True
        if n_models > 1 and model[i] == model[j]:
            budget[model[i]] -= 1
            if budget[model[i]] == 0:
                mine = model == model[i]
                refused |= mine[:, None] & mine
                again = alive.copy()
        rows = np.flatnonzero(again)
        value[rows], column[rows] = best_of(rows)
        others = np.flatnonzero(alive & ~again)
        new = c[others, i] - LAST_RESORT * refused[others, i]
        better = (new > value[others]) | ((new == value[others]) & (i < column[others]))
        value[others[better]], column[others[better]] = new[better], i
    return torch.from_numpy(np.unique(label, return_inverse=True)[1])
