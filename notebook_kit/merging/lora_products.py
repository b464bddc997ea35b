"""Average LoRA adapters by what they do, the products B A, and not by their factors.

    ΔW̄ = s Σ_c w_c B_c A_c        against        s B̄ Ā,   Ā = Σ w_c A_c,  B̄ = Σ w_c B_c
    ΔW̄ − s B̄ Ā = s Σ_c w_c (B_c − B̄)(A_c − Ā)

A_c [rank, d_in], B_c [d_out, rank], w_c weights that sum to 1, s: the adapters' common scale alpha / rank. The two
differ by a covariance over the adapters: little within one run, much between runs, where (B M, M⁻¹ A) is the same
adapter for any invertible M and the average of factors means nothing.

The average of K products has rank K · rank. `product_of_pairs` gives it whole; `average_products` gives the nearest
one that fits into the adapters' own rank (a truncated SVD, computed on the thin factors). Both name schemes are read:
this kit's "layers.0.A", "layers.0.B" and peft's "...layers.0.lora_A.weight", "...lora_B.weight".
"""

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.merging.average import average
from notebook_kit.weights import Weights, at_least_float32, check, expert_weights

# This kit: "<module>.A". peft: "<module>.lora_A[.<adapter>].weight", "<module>.lora_embedding_A[.<adapter>]".
_FACTOR = re.compile(
    r"(?:(?P<module>.+)\.)?(?:(?P<letter>[AB])|(?P<word>lora_(?:embedding_)?)(?P<peft>[AB])(?P<end>(?:\.\w+)*))"
)


def lora_pairs(weights: Weights) -> dict[str, tuple[str, str]]:
    """Find which tensors of a state dict are the two factors of one LoRA adapter.

    Args:
        weights: adapter weights of this kit or of peft (`get_peft_model_state_dict`); other tensors may be among them.

    Returns:
        dict: module name to (key of A, key of B).

    Raises:
        ValueError: a factor has no partner, they do not fit together, or a DoRA magnitude is there, with which B A is
            not what the adapter does.
    """
    halves: dict[tuple[str, str | None, str | None], dict[str, str]] = {}
    for key in weights:
        if key.endswith("lora_magnitude_vector") or ".lora_magnitude_vector." in key:
            raise ValueError(f"{key!r} is DoRA's magnitude: B A is not what this adapter does; use space='factors'")
        found = _FACTOR.fullmatch(key)
        if found and weights[key].is_floating_point():
            owner = (found["module"] or "", found["word"], found["end"])
            halves.setdefault(owner, {})[found["letter"] or found["peft"]] = key
    pairs = {}
    for (module, *_), half in halves.items():
        if len(half) == 1:
            raise ValueError(f"LoRA factor {next(iter(half.values()))!r} has no partner: both A and B are needed")
        a, b = weights[half["A"]], weights[half["B"]]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"LoRA factors of {module!r} must be A [rank, d_in] and B [d_out, rank], got {list(a.shape)} and "
                f"{list(b.shape)}"
            )
        pairs[module] = half["A"], half["B"]
    return pairs


def product_of_pairs(
    experts: Sequence[Weights], *, weights: Sequence[float] | None = None, scale: float = 1.0
) -> dict[str, Float[Tensor, "d_out d_in"]]:
    """Average the products of LoRA adapters, whole: what to add to the base's weights.

    Args:
        experts: adapter weights with the same keys and shapes.
        weights: one factor an adapter, as they are; None means 1/K for each.
        scale: s, the adapters' alpha / rank.

    Returns:
        dict: module name to ΔW̄ = s Σ w_c B_c A_c, in float32 at least.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: there is no pair of factors, or as `lora_pairs`.
    """
    if experts:
        check(experts[0], experts)
    factors = expert_weights(weights, len(experts), default=1 / max(1, len(experts)))
    return {module: scale * (b @ a) for module, (_, b, a) in _stacked(experts, factors).items()}


def average_products(
    base: Weights, experts: Sequence[Weights], *, weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Average LoRA adapters in the space of their products, and give factors of the same rank back.

    Args:
        base: adapter weights that set keys, shapes and dtypes.
        experts: adapter weights.
        weights: one factor an adapter, as they are; None means 1/K for each.

    Returns:
        dict: adapter weights; B A is the nearest matrix of that rank to Σ w_c B_c A_c. Tensors that are no LoRA factors
        are averaged.

    Raises:
        IncompatibleWeights: keys, shapes or dtypes differ.
        ValueError: there is no pair of factors, or as `lora_pairs`.
    """
    check(base, experts)
    factors = expert_weights(weights, len(experts), default=1 / len(experts))
    merged = average(base, experts, weights=factors, normalize=False)
    for (key_a, key_b), b, a in _stacked(experts, factors).values():
        for key, factor in ((key_b, 0), (key_a, 1)):
            half = refactor(b, a, base[key_a].shape[0])[factor]
            merged[key] = half.to(base[key].dtype)
    return merged


def refactor(
    b: Float[Tensor, "d_out wide"], a: Float[Tensor, "wide d_in"], rank: int
) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
    """Find B [d_out, rank] and A [rank, d_in] whose product is nearest to b @ a, by an SVD on the thin factors.

    Args:
        b: left factor of any width.
        a: right factor.
        rank: of the result; singular values beyond it are dropped, missing ones are 0.

    Returns:
        B and A, which share the singular values evenly.
    """
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    left, right = b.new_zeros(b.shape[0], rank), a.new_zeros(rank, a.shape[1])
    left[:, :kept] = q_b @ u[:, :kept] * root
    right[:kept] = root[:, None] * (v[:kept] @ q_a.T)
    return left, right


def _stacked(experts: Sequence[Weights], weights: Sequence[float]) -> dict[str, tuple[tuple[str, str], Tensor, Tensor]]:
    """For each module its keys, and all adapters side by side: [w_1 B_1, ..., w_K B_K] and [A_1; ...; A_K]."""
    pairs = lora_pairs(experts[0]) if experts else {}
    if not pairs:
        known = ", ".join(list(experts[0])[:5]) if experts else "no adapter"
        raise ValueError(f"there are no LoRA factors to multiply among {known}; use space='factors' for other weights")
    found = {}
    for module, (key_a, key_b) in pairs.items():
        b = torch.cat([w * at_least_float32(e[key_b]) for w, e in zip(weights, experts, strict=True)], dim=1)
        a = torch.cat([at_least_float32(e[key_a]) for e in experts])
        found[module] = (key_a, key_b), b, a
    return found
