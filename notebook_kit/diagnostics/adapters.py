"""Numbers about adapters: how large and how wide the change of the weights is, and what folding costs."""

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.adapters import Adapter, CannotFold, detach, fold
from notebook_kit.adapters._adapter import as_stored
from notebook_kit.diagnostics.weights import effective_rank, product_svd, stable_rank
from notebook_kit.hyperparameters import Range
from notebook_kit.weights import at_least_float32


def delta_spectra(model: nn.Module) -> dict[str, Float[Tensor, " k"]]:
    """Give the singular values of what each adapter adds to its host's weight, in falling order.

    Args:
        model: a model whose adapters have a weight-space form.

    Returns:
        dict: module name to singular values, as many as the adapter's rank.

    Raises:
        CannotFold: an adapter has no weight-space form.
        ValueError: there is no adapter.
    """
    return {name: _svd(name, adapter)[1] for name, adapter in _adapters(model).items()}


def delta_table(model: nn.Module):
    """Measure what each adapter adds to its host's weight.

    Args:
        model: a model whose adapters have a weight-space form.

    Returns:
        DataFrame: module, adapter, rank (number of singular values), norm (Frobenius), relative_norm (to the host's
        weight), spectral_norm (largest singular value), stable_rank, effective_rank (NaN for a change of zero).

    Raises:
        CannotFold, ValueError: as `delta_spectra`.
    """
    import pandas as pd

    rows = []
    for name, adapter in _adapters(model).items():
        s = _svd(name, adapter)[1]
        rows.append(
            {
                "module": name,
                "adapter": type(adapter).__name__,
                "rank": len(s),
                "norm": float(s.norm()),
                "relative_norm": float(s.norm() / at_least_float32(adapter.host.weight.detach()).norm()),
                "spectral_norm": float(s[0]),
                "stable_rank": float(stable_rank(s)),
                "effective_rank": float(effective_rank(s)),
            }
        )
    return pd.DataFrame(rows)


def folded_weights(
    model: nn.Module,
    *,
    rank: Annotated[int, Range(1, 1024, log=True)] = 8,
    strength: Annotated[float, Range(0, 4)] = 1.0,
) -> dict[str, Tensor]:
    """Give the weights that folding would give, with each adapter cut to a lower rank and turned up or down.

    Args:
        model: a model whose adapters have a weight-space form; not changed.
        rank: how many singular directions of each ΔW stay; the largest ones (Eckart and Young: the best cut).
        strength: what multiplies ΔW; alpha times 2 is a strength of 2. 0 is the base model, 1 the trained one.

    Returns:
        dict: a state dict with the keys of the model without adapters.

    Raises:
        CannotFold, ValueError: as `delta_spectra`.
    """
    twin = copy.deepcopy(model)
    for name, adapter in _adapters(twin).items():
        u, s, vh = _svd(name, adapter)
        change = adapter.delta() | {"weight": as_stored((u[:, :rank] * s[:rank]) @ vh[:rank], adapter.host)}
        for key, add in change.items():
            parameter = getattr(adapter.host, key)
            parameter.data = (at_least_float32(parameter.data) + strength * add).to(parameter.dtype)
    return detach(twin).state_dict()


def fold_error(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16", "float16"),
):
    """Measure what folding changes in the outputs, for each number format; the model is not changed.

    Args:
        model: a model with adapters that fold.
        inputs: a batch: keyword arguments, or one tensor.
        dtypes: formats to hold the model in.

    Returns:
        DataFrame: dtype, max_error and mean_error (|folded − unfolded| of the outputs, both computed in that format),
        format_error (mean |unfolded in that format − unfolded in float32|, to compare with), lost (share of ΔW's norm
        that rounding W + ΔW to the format loses).

    Raises:
        CannotFold, ValueError: as `fold`.
    """
    import pandas as pd

    reference = _output(copy.deepcopy(model).float(), inputs)
    rows = []
    for dtype in dtypes:
        unfolded = copy.deepcopy(model).to(getattr(torch, dtype)).eval()
        before, lost = _output(unfolded, inputs), _lost(unfolded)
        difference = (_output(fold(unfolded), inputs) - before).abs()
        format_error = (before - reference).abs().mean()
        rows.append((dtype, float(difference.max()), float(difference.mean()), float(format_error), lost))
    return pd.DataFrame(rows, columns=["dtype", "max_error", "mean_error", "format_error", "lost"])


def _adapters(model: nn.Module) -> dict[str, Adapter]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    if not found:
        raise ValueError(f"{type(model).__name__} carries no adapter")
    return found


def _svd(name: str, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    """U, singular values, Vh of ΔW [d_out, d_in]; by factors where the adapter has them."""
    try:
        if type(adapter).factors is not Adapter.factors:
            return product_svd(*adapter.factors())
        change = as_stored(adapter.delta()["weight"], adapter.host)  # its own inverse
        return torch.linalg.svd(change, full_matrices=False)
    except CannotFold as error:
        raise CannotFold(f"{name}: {error}") from error


@torch.no_grad()
def _output(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> Float[Tensor, "..."]:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    fit = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in _named(inputs).items()}
    out = model(**fit) if isinstance(inputs, Mapping) else model(fit[""])
    return (out if isinstance(out, Tensor) else out[0]).float()


def _named(inputs: Mapping[str, Any] | Tensor) -> Mapping[str, Any]:
    return inputs if isinstance(inputs, Mapping) else {"": inputs}


def _lost(model: nn.Module) -> float:
    """‖rounded(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖ over all adapters."""
    lost, whole = 0.0, 0.0
    for adapter in _adapters(model).values():
        for key, change in adapter.delta().items():
            old = getattr(adapter.host, key).detach()
            exact = old.double() + change.double()
            rounded = (old.to(change.dtype) + change).to(old.dtype)
            lost += float((rounded.double() - exact).square().sum())
            whole += float(change.double().square().sum())
    return (lost / whole) ** 0.5 if whole else float("nan")
