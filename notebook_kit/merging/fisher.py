"""Fisher merging: each expert speaks loudest on the parameters that its predictions hang on.

    θ = Σ_i λ_i F̃_i ⊙ θ_i / Σ_i λ_i F̃_i        (entry by entry)

θ_i: experts; F_i ≥ 0: diagonal Fishers, of the same shapes; F̃_i = max(F_i, floor). It is the θ of highest joint
likelihood if expert i's posterior is a Gaussian around θ_i with precision F_i; plain averaging is F_i = 1.
Matena and Raffel, 2021, equation 2.

Two options of mmatena/model_merging, both on by default: λ_i is divided by ‖F_i‖ over the whole model, so that a large
Fisher does not dominate; only the first expert, the target, gets the floor, so that its value wins where nobody cares.
Where differently: where all weights are 0 theirs gives NaN, here the λ-average stands. fusion_bench adds the floor.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.merging.contract import tensor_by_tensor
from notebook_kit.merging.per_parameter import Pieces, check_overlap, find, place
from notebook_kit.weights import Weights, check, expert_weights, float_keys

MADE_BY = "diagonal_fisher(model, batches)"


def statistics(
    base: Weights, experts: Sequence[Weights], *, fishers: Sequence[Weights], power: float = 1.0, **_
) -> dict[str, object]:
    """What must be known of the whole model: the norm of each Fisher, a tied weight counted once."""
    check_overlap(base, fishers, "fishers", source=MADE_BY)
    squares, seen = [0.0] * len(experts), set()
    for name in float_keys(base):
        tensors = find(name, base, fishers, len(experts), "fishers", source=MADE_BY)
        here = place(base[name]) if isinstance(base, dict) and base[name].numel() else (name,)
        if tensors is None or here in seen:
            continue
        seen.add(here)
        squares = [s + float(F.pow(power).double().square().sum()) for s, F in zip(squares, tensors, strict=True)]
    return {"norms": [square**0.5 for square in squares]}


@method(family="merging", paper="fisher-merging", statistics=statistics)
def fisher(
    base: Weights,
    experts: Sequence[Weights],
    *,
    fishers: Sequence[Weights],
    weights: Sequence[float] | None = None,
    normalize_fishers: bool = True,
    favor_target: bool = True,
    fisher_floor: Annotated[float, Range(1e-12, 1e-2, log=True)] = 1e-6,
    power: Annotated[float, Range(0, 1)] = 1.0,
    norms: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Average the experts, each parameter weighted by how much each expert's predictions hang on it.

    Args:
        base: state dict that sets keys, shapes and dtypes.
        experts: state dicts of the same architecture; the first is the target.
        fishers: one diagonal Fisher an expert, each from `diagonal_fisher` on the expert's own inputs. A tensor that
            is in none of them (a buffer, a frozen head) gets the plain λ-average.
        weights: λ, one factor an expert, at least 0; None means equal ones. `search_weights` finds them.
        normalize_fishers: divide each λ by the Fisher's norm over the whole model.
        favor_target: the floor is the first expert's only, so that it wins where every Fisher is tiny.
        fisher_floor: smallest Fisher.
        power: exponent of the Fishers; 1 is the paper, 0 plain averaging.
        norms: from `statistics`, when the model is merged in parts; None computes them.

    Returns:
        dict: the merged state dict.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ, of experts or Fishers.
        ValueError: NaN or Inf in a tensor, a negative Fisher, weights that are negative or all 0.

    Source:
        Matena and Raffel, 2021, arXiv 2111.09832, equation 2; mmatena/model_merging, merging.py.
    """
    check(base, experts)
    factors = expert_weights(weights, len(experts))
    if min(factors) < 0 or sum(factors) == 0:
        raise ValueError(f"weights must be at least 0 and not all 0, got {factors} (fisher)")
    if norms is None:
        norms = statistics(base, experts, fishers=fishers, power=power)["norms"]
    shares = [factor / sum(factors) for factor in factors]
    scaled = [
        share / norm if normalize_fishers and norm > 0 else share for share, norm in zip(shares, norms, strict=True)
    ]

    def flat(name: str) -> list[Tensor] | None:
        found = find(name, base, fishers, len(experts), "fishers", source=MADE_BY)
        return found and [F.reshape(-1) for F in found]

    pieces = Pieces(flat)

    def merge(name: str, theta_0: Tensor, thetas: list[Tensor]) -> Tensor:
        F, here = pieces.next(name, len(theta_0))
        if F is None:
            return _weighted_mean(thetas, [torch.full_like(theta_0, share) for share in shares])
        F = [f[here].to(theta_0).pow(power) for f in F]
        F = [f.clamp(min=fisher_floor) if i == 0 or not favor_target else f for i, f in enumerate(F)]
        loud = [factor * f for factor, f in zip(scaled, F, strict=True)]
        nobody = sum(loud) == 0
        return _weighted_mean(thetas, [torch.where(nobody, share, f) for share, f in zip(shares, loud, strict=True)])

    return tensor_by_tensor(base, experts, merge, elementwise=True)


def _weighted_mean(thetas: list[Tensor], loud: list[Tensor]) -> Tensor:
    total = sum(loud)
    return sum(theta * (f / total) for theta, f in zip(thetas, loud, strict=True))
