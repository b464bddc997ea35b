"""DOGE: keep the task vectors whole, and learn without data one correction that brings the merge closer to every task.

    λ_i = η / ‖τ_i‖                                  per matrix: loud tasks are turned down          (norm_aware)
    L(Δ) = Σ_j Σ_o ( ⟨τ_j[o], τ_j[o]⟩ − ⟨τ_j[o], Σ_i λ_i (τ_i[o] + Δ[o])⟩ )²    o: a row             (steps > 0)
    Δ ← Δ − Adam( (I − QQᵀ) ∂L/∂Δ )                  Q: what the tasks share, and Δ must not touch    (project)
    θ = θ₀ + Σ_i λ_i m_i ⊙ (τ_i + Δ)                 m_i: the `density` largest |τ_i| of the model

τ_i = θ_i − θ₀ [m, n], one matrix; Δ [m, n]; Q [m, k] with k = ⌊min(m, n) / s⌋. The gradient of task j at θ₀ is about
−τ_j; the sum over o of what is squared is the first-order gap that the merge leaves to task j. L is a convex quadratic,
so its gradient is written down: −2 Σ_j r_j τ_j. Only matrices take part; ALL OTHER PARAMETERS STAY AT θ₀.
Wei et al., 2025.

`subspace` is s, the divisor of the rank: the reference code uses it so, although its text calls it a number of vectors.
Adam scales each entry of the projected gradient by itself, so that QᵀΔ is only about 0; with project="step" it is 0.
lr is absolute: Δ's entries move by at most about steps · lr. Choose eta by the size of the updates, so that eta / ‖τ‖
is 0.1 to 0.3. Exactly ⌊density · d⌋ entries are kept; the reference keeps one more.

Rows are outputs, as in nn.Linear. GPT-2's Conv1D stores [in, out]: name such tensors by `transposed`.
With AdaMerging: `doge_experts(..., shared_delta=False, subspace=K)` gives the adjusted experts θ₀ + m_i ⊙ (τ_i + Δ_i),
whose coefficients are then learned.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging.doge_parts import Trims, adjusted_taus, each_treated, statistics
from notebook_kit.merging.matrices import matrix_names
from notebook_kit.weights import Weights, at_least_float32, check


@method(family="merging", paper="doge", statistics=statistics)
@torch.no_grad()
def doge(
    base: Weights,
    experts: Sequence[Weights],
    *,
    eta: Annotated[float, Range(0.01, 1, log=True)] = 0.07,
    subspace: Annotated[int, Range(1, 32)] = 6,
    density: Annotated[float, Range(0, 1)] = 0.3,
    steps: Annotated[int, Range(0, 1000)] = 400,
    lr: Annotated[float, Range(1e-5, 1e-2, log=True)] = 1e-4,
    project: Annotated[str, Choice("grad", "step", "none")] = "grad",
    norm_aware: bool = True,
    shared_delta: bool = True,
    optimizer: Annotated[str, Choice("adam", "sgd")] = "adam",
    matrices: Annotated[str, Choice("linear", "all")] = "linear",
    transposed: str | None = None,
    trim: Trims | None = None,
) -> dict[str, Tensor]:
    """Merge whole task vectors plus one learned correction that leaves their shared subspace alone.

    Args:
        base: state dict θ₀.
        experts: state dicts θ_i, fine-tuned from it.
        eta: η, the norm that each task vector gets in each matrix.
        subspace: s; of min(m, n) directions, 1 / s are protected. 1 protects all, so that Δ stays 0.
        density: share of each expert's entries that is kept, the largest of the whole model.
        steps: of the descent; 0 switches Δ off.
        lr: learning rate.
        project: "grad" projects the gradient (paper), "step" also what Adam makes of it, "none" protects nothing.
        norm_aware: λ_i = η / ‖τ_i‖; off, λ_i = η.
        shared_delta: one Δ for all tasks (paper), or one each.
        optimizer: "adam" (paper) or "sgd".
        matrices: "linear" leaves embeddings at θ₀, as the paper does; "all" treats them too.
        transposed: regular expression; tensors whose name it finds are stored [in, out].
        trim: from `statistics`, when the model is merged in parts; None computes it.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: NaN or Inf in a tensor.

    Source:
        Wei et al., 2025, arXiv 2501.01230; tanganke/fusion_bench: method/doge_ta.
    """
    check(base, experts)
    if trim is None and density < 1:
        trim = statistics(base, experts, density=density, matrices=matrices)["trim"]
    merged = {name: tensor.clone() for name, tensor in base.items()}
    options = {"eta": eta, "norm_aware": norm_aware, "transposed": transposed, "subspace": subspace, "steps": steps}
    options |= {"lr": lr, "project": project, "shared_delta": shared_delta, "optimizer": optimizer}
    for name, taus, found, delta in each_treated(base, experts, matrix_names(base, matrices), **options):
        # λ [K, matrices] spread over the axes of the tensor
        lambdas = torch.stack([one.lambdas for one in found], dim=1)
        lambdas = lambdas.reshape(len(taus), *([1] * (taus.dim() - 1) if len(found) == 1 else [len(found), 1, 1]))
        star = (lambdas * adjusted_taus(name, taus, delta, trim if density < 1 else None)).sum(dim=0)
        merged[name] = (at_least_float32(merged[name]) + star).to(merged[name].dtype)
    return merged
