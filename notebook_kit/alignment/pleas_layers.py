"""How PLeaS makes its layers: block averages, least squares around them, and wider batch norm."""

import copy

import torch
from torch import Tensor, nn

from notebook_kit.alignment.batch_norm import reset_batch_norm
from notebook_kit.alignment.pleas_pair import Pair
from notebook_kit.alignment.pleas_plan import PleasPlan
from notebook_kit.alignment.split_layer import Split, SplitLayer


@torch.no_grad()
def build(pair: Pair, plan: PleasPlan, heads: str, ridge: float | None, batches: list | None) -> nn.Module:
    """Make the network of a plan.

    Args:
        pair: the two networks with what their layers see.
        plan: which units are merged.
        heads: "shared" or "separate".
        ridge: pull towards the block average; None leaves the average as it is.
        batches: for batch norm's statistics.
    """
    model = copy.deepcopy(pair.model_a)
    widths = plan.widths
    for name in pair.layers:
        own_a, own_b = pair.model_a.get_submodule(name), pair.model_b.get_submodule(name)
        out_a, out_b = len(own_a.weight), len(own_b.weight)
        outputs = Split(0, out_a, out_b) if heads == "separate" else Split(out_a, 0, 0)
        before, columns = pair.before(name), own_a.weight.shape[1]
        inputs = widths.get(before, Split(columns, 0, 0))
        block = columns // pair.sizes(before)[0] if before else 1
        layer = SplitLayer(own_a, inputs, widths.get(name, outputs), block)
        _average(pair, plan, name, layer)
        if ridge is not None:
            _refit(pair, plan, name, layer, ridge)
        model.set_submodule(name, layer)
    for norm, name in pair.norms.items():
        _widen_norm(model, pair, plan, norm, name)
    if pair.norms:
        reset_batch_norm(model, batches)
    return model.eval()


def _units(plan: PleasPlan, name: str | None, n_a: int, n_b: int, group: str, *, apart: bool = False):
    """(a's, b's) unit numbers of one group at one place; a layer without a permutation is merged whole, or kept."""
    if name not in plan.merged:
        everything = {"a": (torch.arange(n_a), None), "b": (None, torch.arange(n_b))}
        if apart and group != "merged":
            return everything[group]
        n = 0 if apart or group != "merged" else n_a
        return torch.arange(n), torch.arange(n)
    index = plan.permutations[name]
    if group == "merged":
        return plan.merged[name], index[plan.merged[name]]
    return (plan.separate[name], None) if group == "a" else (None, index[plan.separate[name]])


def _average(pair: Pair, plan: PleasPlan, name: str, layer: SplitLayer) -> None:
    """Step 3: the block average."""
    own = [model.get_submodule(name) for model in (pair.model_a, pair.model_b)]
    w_a, w_b = (x.weight.detach().double().unflatten(1, (-1, layer.block)) for x in own)
    before, apart = pair.before(name), not layer.outputs.merged
    for group, rows in layer.rows.items():
        out_a, out_b = _units(plan, name, len(w_a), len(w_b), group, apart=apart)
        columns = []
        for part in layer.reads(group):
            in_a, in_b = _units(plan, before, w_a.shape[1], w_b.shape[1], part)
            blocks = []
            if out_a is not None and in_a is not None:
                blocks.append(w_a[out_a][:, in_a])
            if out_b is not None and in_b is not None:
                blocks.append(w_b[out_b][:, in_b])
            # Merged rows take half of either network; the rows of one network take all of it.
            columns.append(sum(blocks) / (2 if group == "merged" else 1))
        rows.weight.copy_(torch.cat(columns, 1).flatten(1, 2))
        if rows.bias is not None:
            halves = [x.bias[index] for x, index in zip(own, (out_a, out_b), strict=True) if index is not None]
            rows.bias.copy_(sum(halves) / len(halves))


def _groups(pair: Pair, plan: PleasPlan, name: str, side: str, layer: SplitLayer) -> dict[str, Tensor]:
    """What the units of each group see (or make), [rows, columns]: merged ones as the mean of their pair."""
    x_a, x_b = (x.double() for x in getattr(pair, side)[name])
    place = name if side == "outputs" else pair.before(name)
    n_a, n_b = (sum(layer.inputs[:2]), sum(layer.inputs[::2]))
    if side == "outputs":
        n_a, n_b = x_a.shape[1], x_b.shape[1]
    x_a, x_b = x_a.unflatten(1, (n_a, -1)), x_b.unflatten(1, (n_b, -1))
    groups = {}
    for group in Split._fields:
        apart = side == "outputs" and not layer.outputs.merged
        of_a, of_b = _units(plan, place, n_a, n_b, group, apart=apart)
        parts = [x[:, of] for x, of in ((x_a, of_a), (x_b, of_b)) if of is not None]
        groups[group] = (sum(parts) / len(parts)).flatten(1)
    return groups


def _refit(pair: Pair, plan: PleasPlan, name: str, layer: SplitLayer, ridge: float) -> None:
    """Step 4: each group of rows by ridge regression around the block average; the bias is not pulled."""
    x, y = (_groups(pair, plan, name, side, layer) for side in ("inputs", "outputs"))
    for group, rows in layer.rows.items():
        X, Y = torch.cat([x[part] for part in layer.reads(group)], 1), y[group]
        mean_x, mean_y = (z.mean(0) if rows.bias is not None else torch.zeros_like(z[0]) for z in (X, Y))
        X, Y = X - mean_x, Y - mean_y
        W = _rows_of(rows.weight)
        gram = X.T @ X + ridge * len(X) * torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
        W = W + torch.linalg.solve(gram, X.T @ (Y - X @ W.T)).T
        rows.weight.copy_(W.reshape(rows.weight.shape))
        if rows.bias is not None:
            rows.bias.copy_(mean_y - W @ mean_x)


def _rows_of(weight: Tensor) -> Tensor:
    return weight.detach().double().flatten(1)


def _widen_norm(model: nn.Module, pair: Pair, plan: PleasPlan, norm: str, name: str) -> None:
    """Batch norm of the wider layer: [½(A + B) | A | B]."""
    own = [x.get_submodule(norm) for x in (pair.model_a, pair.model_b)]
    n = len(own[0].running_mean)
    block, units = n // pair.sizes(name)[0], pair.sizes(name)[0]
    state = {}
    for key, value in own[0].state_dict().items():
        parts = []
        for group in Split._fields if value.dim() else ():
            chosen = _units(plan, name, units, units, group)
            vectors = [
                x.state_dict()[key].unflatten(0, (units, block))[index].flatten()
                for x, index in zip(own, chosen, strict=True)
                if index is not None
            ]
            parts.append(sum(vectors) / len(vectors))
        state[key] = torch.cat(parts) if parts else value
    like = {"device": own[0].running_mean.device, "dtype": own[0].running_mean.dtype}
    shape = {key: getattr(own[0], key) for key in ("eps", "momentum", "affine")}
    wide = type(own[0])(len(state["running_mean"]), **shape, **like)
    wide.load_state_dict(state)
    model.set_submodule(norm, wide)


@torch.no_grad()
def layer_errors(model: nn.Module, pair: Pair, plan: PleasPlan) -> dict[str, float]:
    """The squares that step 4 makes small, layer by layer.

    Args:
        model: what `build_pleas` or `pleas` made from the plan.
        pair: the two networks with what their layers see.
        plan: which units are merged.

    Returns:
        Layer to mean squared error of its outputs.
    """
    errors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SplitLayer):
            x, y = (_groups(pair, plan, name, side, layer) for side in ("inputs", "outputs"))
            wrong = [
                torch.cat([x[g] for g in layer.reads(group)], 1) @ _rows_of(rows.weight).T
                + (0 if rows.bias is None else rows.bias.double())
                - y[group]
                for group, rows in layer.rows.items()
            ]
            errors[name] = float(torch.cat(wrong, 1).square().mean())
    return errors
