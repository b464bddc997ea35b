"""OPCM: experts arrive one after another; each adds only what lies outside the directions the merge already uses.

    M = W^(t-1) − W₀ = U diag(σ) Vᵀ,   D = W_t − W₀,   P = UᵀDV
    r = how many leading σ it takes until their share of Σσ exceeds α
    D̂ = U P̂ Vᵀ,   P̂: P without its diagonal and without its leading r x r block          (`block="corner"`, the code)
                      or without its diagonal, its first r rows and its first r columns    (`block="cross"`, the paper)
    S_t = S_(t-1) + D̂,   θ^(t) = θ₀ + S_t / λ_t,   λ_t = ‖S_t‖ / n̄_t,   n̄_t = mean_(i ≤ t) ‖θ_i − θ₀‖

W [m, n]: one weight matrix; tensors that are no matrices are added whole, D̂ = D. Norms run over the whole model, so
that ‖θ^(t) − θ₀‖ = n̄_t. ⟨D̂, M⟩ = 0 for every α: M is diagonal in that basis, and the diagonal is gone. If the updates
were orthogonal to each other and equally long, λ_t would be √t. Tang et al., 2025.

The paper writes λ_(t-1) M^(t-1) + D̂, scaled again by 1 / λ_t at each step. λ_(t-1) M^(t-1) is S_(t-1), and scaling
turns no singular vector: so S alone is kept, with the base, a sum of norms and a count. How many experts came before
costs nothing.

Only directions that M has count. The official code completes U and V to square matrices, and where M lacks a direction
(low-rank updates, a layer the first experts left alone) it removes D's part on an arbitrary pair of them.
Never forming these also makes it fast: D̂ is D minus a product of thin factors.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.opcm_stream import Opcm
from notebook_kit.weights import Weights, check, float_keys


def order_of(n_experts: int, shuffle_order: bool, seed: int) -> list[int]:
    """The order of arrival: as given, or shuffled by the seed."""
    if not shuffle_order:
        return list(range(n_experts))
    return torch.randperm(n_experts, generator=torch.Generator().manual_seed(seed)).tolist()


def statistics(
    base: Weights, experts: Sequence[Weights], *, shuffle_order: bool = False, seed: int = 0, **settings
) -> dict[str, float]:
    """λ_T of the whole model, read tensor by tensor: S needs no other tensor, only its final scale does."""
    settings.pop("lambda_t", None)
    squares, total = torch.zeros(len(experts), dtype=torch.float64), 0.0
    for name in float_keys(base):
        one = Opcm({name: base[name]}, **settings)
        for t, i in enumerate(order_of(len(experts), shuffle_order, seed)):
            squares[t] += one.add({name: experts[i][name]}).norm ** 2
        total += float(one.total[name].double().square().sum())
    scaled = settings.get("rescale", True) and total > 0
    return {"lambda_t": total**0.5 / float(squares.sqrt().mean()) if scaled else 1.0}


@method(family="merging", paper="opcm", statistics=statistics)
def opcm(
    base: Weights,
    experts: Sequence[Weights],
    *,
    alpha: Annotated[float, Range(0, 1)] = 0.5,
    block: Annotated[str, Choice("corner", "cross")] = "corner",
    rescale: bool = True,
    project: bool = True,
    shuffle_order: bool = False,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
    matrices: Annotated[str, Choice("linear", "all")] = "linear",
    lambda_t: float | None = None,
) -> dict[str, Tensor]:
    """Merge experts one after another, each projected away from what the merge already uses.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i, fine-tuned from it, in the order of their arrival.
        alpha: share of the merge's spectrum whose block is protected; at 0 only the diagonal is removed.
        block: what is protected, the leading "corner" of P (official code) or its "cross" of rows and columns (paper).
        rescale: keep the merge as far from the base as the average expert is; off adds up.
        project: off is a running sum of task vectors.
        shuffle_order: let the seed choose the order, as the official code does by default.
        seed: of the order.
        matrices: "linear" leaves embeddings unprojected, as the paper does; "all" projects them too.
        lambda_t: from `statistics`, when the model is merged in parts; None computes it.

    Returns:
        dict: the merged state dict. `Opcm` gives it step by step.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor.

    Source:
        Tang et al., 2025, arXiv 2501.09522; tanganke/opcm.
    """
    check(base, experts)
    merge = Opcm(base, alpha=alpha, block=block, rescale=rescale, project=project, matrices=matrices)
    for i in order_of(len(experts), shuffle_order, seed):
        merge.add(experts[i])
    return merge.merged if lambda_t is None else merge.at(lambda_t)
