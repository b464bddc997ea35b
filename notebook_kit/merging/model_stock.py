"""Model Stock: runs of one task lie on a sphere around a centre; the angle between two of them says where it is.

    cos θ = mean over pairs i < j of cos(τ_i, τ_j)
    t     = K cos θ / (1 + (K − 1) cos θ)
    θ     = t · mean_i θ_i + (1 − t) · θ₀

τ_i = θ_i − θ₀, K experts. The centre is the point of the line from the base θ₀ to the mean that is nearest to the
experts' true mean. Parallel experts give t = 1, the plain average; at right angles t = 0, the base. So it is meant for
runs of ONE task: experts of unrelated tasks are nearly at right angles, and all they learnt is thrown away.

Jang et al., 2024, for two experts and extended to K. Where peers differ: mergekit averages cosines and
leaves t as it is (`clamp=False`), fusion_bench averages angles (`mean_of="angles"`). Both add a constant to the product
of two lengths (1e-6, 1e-8), which pulls t towards 0 for task vectors shorter than 1e-3; here nothing is added. With
`scope="row"` each output unit has an angle of its own (a vector is one row); mergekit's `filter_wise` takes the last
axis, which is the same for matrices.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice
from notebook_kit.merging import selection
from notebook_kit.merging.combination import combine
from notebook_kit.merging.contract import Rule, tensor_by_tensor
from notebook_kit.merging.geometry import inner_products, mean_cosine
from notebook_kit.merging.selection import chunks
from notebook_kit.weights import Weights, at_least_float32, check, float_keys

SINGULAR = 1e-6


def interpolation(cos_theta: Float[Tensor, "..."] | float, n_experts: int, clamp: bool = True) -> Float[Tensor, "..."]:
    """The share t of the mean, from the mean cosine: K cos θ / (1 + (K − 1) cos θ).

    Args:
        cos_theta: in [-1, 1].
        n_experts: K.
        clamp: keep t in [0, 1]; without, negative cosines push away from the mean, and t is 0 only where it has no
            finite value.
    """
    cos_theta = torch.as_tensor(cos_theta, dtype=torch.float64)
    below = 1 + (n_experts - 1) * cos_theta
    finite = below.abs() > SINGULAR
    t = torch.where(finite, n_experts * cos_theta / torch.where(finite, below, 1.0), 0.0)
    return torch.where(cos_theta > 0, t, 0.0).clamp(0, 1) if clamp else t


def model_gram(base: Weights, experts: Sequence[Weights], *, scope: str = "tensor", **_) -> dict[str, object]:
    """The statistic of `scope="model"`: inner products of the whole task vectors, read one tensor at a time."""
    if scope != "model":
        return {}
    zero = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    return {"gram": sum((_gram(name, base, experts) for name in float_keys(base)), zero)}


@method(family="merging", paper="model-stock", statistics=model_gram)
def model_stock(
    base: Weights,
    experts: Sequence[Weights],
    *,
    scope: Annotated[str, Choice("tensor", "row", "model")] = "tensor",
    mean_of: Annotated[str, Choice("cosines", "angles")] = "cosines",
    clamp: bool = True,
    gram: Float[Tensor, "experts experts"] | None = None,
) -> dict[str, Tensor]:
    """Go from the base towards the experts' mean, as far as the angle between them allows.

    Args:
        base: state dict θ₀.
        experts: two state dicts θ_i or more, fine-tuned from it for one task.
        scope: one angle for each tensor (paper), each output row, or the whole model.
        mean_of: with three experts or more, the mean of the pairs' cosines (mergekit) or angles (fusion_bench).
        clamp: keep t in [0, 1]; mergekit does not.
        gram: from `model_gram`, when the model is merged in parts; None computes it where `scope` needs it.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: fewer than two experts, between which there is no angle; NaN or Inf in a tensor.

    Source:
        Jang et al., 2024, arXiv 2403.19522.
    """
    k = len(experts)
    if k == 1 and not isinstance(experts, Mapping):  # `combine` says what is wrong with a mapping
        raise ValueError("model_stock needs at least two experts, between which there is an angle, got 1")
    if scope == "row":
        return tensor_by_tensor(base, experts, _row_by_row(base, experts, mean_of, clamp))
    if scope == "model" and gram is None:
        check(base, experts)
        gram = model_gram(base, experts, scope=scope)["gram"]

    def towards_the_mean(name: str) -> tuple[float, list[float]]:
        of = gram if scope == "model" else _gram(name, base, experts)
        t = float(interpolation(mean_cosine(of, mean_of), k, clamp))
        return 1 - t, [t / k] * k

    return combine(base, experts, towards_the_mean)


def _row_by_row(base: Weights, experts: Sequence[Weights], mean_of: str, clamp: bool) -> Rule:
    def rule(name: str, theta_0: Tensor, thetas: list[Tensor]) -> Tensor:
        gram = _gram(name, base, experts, by_row=True)
        t = interpolation(mean_cosine(gram, mean_of), len(experts), clamp).to(theta_0)
        if t.ndim:  # one t a row
            t = t.reshape(-1, *[1] * (theta_0.ndim - 1))
        result = (1 - t) * theta_0
        for theta in thetas:
            result.addcmul_(theta, t, value=1 / len(experts))
        return result

    return rule


def _gram(name: str, base: Weights, experts: Sequence[Weights], by_row: bool = False) -> Tensor:
    """Inner products of the task vectors of one tensor, [K, K], or of each of its rows, [rows, K, K]."""
    theta_0 = base[name]
    if not by_row or theta_0.ndim < 2:
        return inner_products((tau for _, _, tau in chunks(name, base, experts)), len(experts))
    rows, products = at_least_float32(theta_0).flatten(1), []
    step = max(1, selection.CHUNK // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        where = slice(start, start + step)
        tau = torch.stack([at_least_float32(expert[name][where]).flatten(1) - rows[where] for expert in experts], dim=1)
        products.append((tau @ tau.mT).double())
    return torch.cat(products) if products else rows.new_zeros(0, len(experts), len(experts)).double()
