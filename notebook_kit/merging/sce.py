"""SCE: select where experts differ, calculate how much each tensor of each expert says, erase the minority's signs.

    select     keep the ⌊density · d⌋ positions with the largest variance over the experts' τ_ip   (p: a position)
    calculate  w_i ∝ mean_p τ_ip²                                one weight for each expert and tensor, Σ_i w_i = 1
    erase      τ_ip = 0 where its sign is not sgn(Σ_i τ_ip), which counts as plus where the sum is 0
    merge      τ*_p = Σ_i w_i τ_ip / Σ_i w_i [τ_ip kept],        θ = θ₀ + λ τ*

τ_i = θ_i − θ₀, taken tensor by tensor; d: positions of the tensor with a variance above 0; λ: `scale`. Variance is
change: where all experts moved alike, or not at all, nothing is selected; density 1 selects all and skips the step.
A tensor that changed a lot in one expert and little in another is taken mostly from the first.

Wan et al., 2024, in the form that mergekit has. Two differences: mergekit gives equal weights wherever the mean
squares sum to less than 1e-6, which many fine-tuned models stay below (`floor=1e-6` does that); and of positions with
equal variance at the edge it keeps any, here the last ones stay, as in TIES.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.merging import selection
from notebook_kit.merging.ranks import kth_largest
from notebook_kit.merging.selection import chunks
from notebook_kit.weights import Weights, at_least_float32, check


def select(name: str, base: Weights, experts: Sequence[Weights], density: float) -> Tensor | None:
    """Mark the positions of one tensor where the experts differ most; None where all are selected.

    Args:
        name: of the tensor.
        base: state dict θ₀.
        experts: state dicts θ_i.
        density: share of the positions with a variance above 0 that is kept.

    Returns:
        Bool[d], or None.
    """
    if density >= 1:
        return None
    variance = at_least_float32(base[name].reshape(-1)[:0]).new_empty(base[name].numel())
    for where, _, tau in chunks(name, base, experts):
        # The buffer is ours until the next piece; torch.var over so few rows is many times slower.
        torch.mean(tau.sub_(tau.mean(dim=0)).square_(), dim=0, out=variance[where])
    k = int(density * int(torch.count_nonzero(variance)))
    if k == 0:
        return torch.zeros_like(variance, dtype=torch.bool)
    threshold = kth_largest(lambda: variance.split(selection.CHUNK), len(variance), [k])[0]
    selected = variance >= threshold
    surplus = int(selected.sum()) - k
    if surplus:
        selected[(variance == threshold).nonzero().squeeze(-1)[:surplus]] = False
    return selected


@method(family="merging", paper="fusechat")
def sce(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: Annotated[float, Range(0, 1)] = 1.0,
    scale: Annotated[float, Range(0, 3)] = 1.0,
    erase: bool = True,
    floor: Annotated[float, Range(0, 1e-3)] = 0.0,
) -> dict[str, Tensor]:
    """Merge where experts differ, weighted by how much each changed a tensor, without the signs of the minority.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i, fine-tuned from it.
        density: share of each tensor's positions that is selected, by variance over the experts; 1 selects all.
        scale: λ, what multiplies the merged task vector.
        erase: drop entries against the sign with more mass.
        floor: mean squares that sum to less than this count as equal; mergekit has 1e-6.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor.

    Source:
        Wan et al., 2024, arXiv 2408.07990; arcee-ai/mergekit.
    """
    check(base, experts)
    result = {}
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            result[name] = tensor.clone()
            continue
        selected = select(name, base, experts, density)
        w = calculate(_selected(name, base, experts, selected), len(experts), tensor.numel(), floor)
        out = tensor.new_empty(tensor.numel())
        for where, theta_0, tau in _selected(name, base, experts, selected):
            out[where] = _merge(tau, w.to(tau)[:, None], erase).mul_(scale).add_(theta_0)
        result[name] = out.reshape(tensor.shape)
    return result


def calculate(walk: Iterator[tuple], n_experts: int, n: int, floor: float = 0.0) -> Tensor:
    """One weight for each expert: its mean square over the tensor, by the sum of all."""
    squares = torch.zeros(n_experts, dtype=torch.float64)
    for _, _, tau in walk:
        squares += torch.linalg.vecdot(tau, tau).cpu()
    squares /= max(1, n)
    total = float(squares.sum())
    return squares / total if total > floor else torch.full_like(squares, 1 / n_experts)


def _merge(tau: Tensor, w: Tensor, erase: bool) -> Tensor:
    if not erase:
        return (tau * w).sum(dim=0)
    gamma = (tau.sum(dim=0) >= 0).to(tau.dtype).mul_(2).sub_(1)  # an even vote counts as plus
    agreeing = (tau * gamma).relu_()  # magnitudes of those that agree, 0 for the others
    voters = agreeing.sign().mul_(w).sum(dim=0)
    return agreeing.mul_(w).sum(dim=0).mul_(gamma).div_(voters.masked_fill_(voters == 0, 1))


def _selected(name: str, base: Weights, experts: Sequence[Weights], selected: Tensor | None) -> Iterator[tuple]:
    for where, theta_0, tau in chunks(name, base, experts):
        if selected is not None:
            tau.mul_(selected[where])
        yield where, theta_0, tau
