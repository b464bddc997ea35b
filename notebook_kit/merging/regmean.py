"""RegMean: the one linear layer that comes closest to what every expert's layer does to its own inputs.

    W = argmin Σ_i λ_i ‖X_i W_iᵀ − X_i Wᵀ‖² = (Σ_i λ_i W_i Ĝ_i)(Σ_i λ_i Ĝ_i)⁻¹

    Ĝ_i = α G_i + (1 − α) diag(G_i),   G_i = X_iᵀ X_i / n_i

W_i: [out, in], a linear layer of expert i; X_i: [n_i, in], its inputs on expert i's own data; α shrinks what does not
stand on the diagonal. Everything else (biases, norms, embeddings, fused experts) is averaged. Jin et al., 2022,
section 3.

Official code inverts Σ Ĝ, which an input that is always 0 makes singular. Here it is solved with a small ridge that
pulls towards the plain mean: a dead input gets the mean, and equal Grams give the mean exactly.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.merging.contract import tensor_by_tensor
from notebook_kit.merging.grams import TRANSPOSED, check_grams
from notebook_kit.weights import Weights, check, expert_weights


def fit_layer(
    W: Sequence[Float[Tensor, "out in"]],
    G: Sequence[Float[Tensor, "in in"]],
    mean: Float[Tensor, "out in"],
    alpha: float,
    ridge: float,
) -> Float[Tensor, "out in"]:
    """Solve one layer: W Σ Ĝ_i = Σ W_i Ĝ_i, pulled a little towards the mean."""
    G = [alpha * g + (1 - alpha) * g.diagonal().diag() for g in G]
    total, target = sum(G), sum(w @ g for w, g in zip(W, G, strict=True))
    pull = ridge * total.diagonal().mean()
    if pull == 0:  # nobody's inputs were ever anything but 0
        return mean
    A = total + pull * torch.eye(len(total)).to(total)
    return torch.linalg.solve(A, (target + pull * mean).T).T  # A is symmetric


def statistics(base: Weights, experts: Sequence[Weights], *, grams: Sequence[Weights], **_) -> dict[str, object]:
    """Nothing is needed of the whole model; but that the Grams fit it can be seen only here."""
    check_grams(base, experts, grams)
    return {}


@method(family="merging", paper="regmean", statistics=statistics)
def regmean(
    base: Weights,
    experts: Sequence[Weights],
    *,
    grams: Sequence[Weights],
    alpha: Annotated[float, Range(0, 1)] = 0.9,
    ridge: Annotated[float, Range(1e-9, 1, log=True)] = 1e-6,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Merge linear layers by least squares on what each expert sees, and average the rest.

    Args:
        base: state dict that sets keys, shapes and dtypes.
        experts: state dicts of the same architecture.
        grams: one mapping an expert, from `gram_matrices` on the expert's own data.
        alpha: factor of what does not stand on a Gram's diagonal; 1: plain least squares; 0: each input alone.
        ridge: pull towards the plain mean, as a share of the mean diagonal of Σ Ĝ.
        weights: λ, one factor an expert, at least 0; None means equal ones.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ, or a Gram does not fit its weight.
        ValueError: NaN or Inf in a tensor, or weights that are negative or all 0.

    Source:
        Jin et al., 2022, arXiv 2212.09849, section 3; bloomberg/dataless-model-merging.
    """
    check(base, experts)
    check_grams(base, experts, grams, part=len(base) == 1)  # one tensor may be one of a model on disk
    factors = expert_weights(weights, len(experts))
    if min(factors) < 0 or sum(factors) == 0:
        raise ValueError(f"weights must be at least 0 and not all 0, got {factors} (regmean)")
    shares = [factor / sum(factors) for factor in factors]

    def merge(name: str, theta_0: Tensor, thetas: list[Tensor]) -> Tensor:
        mean = sum(share * theta for share, theta in zip(shares, thetas, strict=True))
        key = next((key for key in (name, name + TRANSPOSED) if key in grams[0]), None)
        if key is None:
            return mean
        flip = key != name
        W = [(theta.T if flip else theta).double() for theta in thetas]
        G = [share * table[key].double() for share, table in zip(shares, grams, strict=True)]
        merged = fit_layer(W, G, (mean.T if flip else mean).double(), alpha, ridge)
        return (merged.T if flip else merged).to(theta_0.dtype)

    return tensor_by_tensor(base, experts, merge)
