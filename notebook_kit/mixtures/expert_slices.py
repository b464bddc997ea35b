"""Cut gated experts into thin ones that add up to them, and sew them together again: the segmentation of DeepSeekMoE.

    E(x) = W_down (act(W_gate x) ⊙ W_up x) = Σ_j E_j(x)      slice j: D/m hidden units

Source: Dai et al. 2024, section 3.1, which trains thin experts from scratch; cutting trained ones is ours.
"""

from typing import Annotated

import torch
from torch import nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.mixtures.swiglu import SwiGLUExperts


@method(family="mixtures", paper="deepseekmoe")
@torch.no_grad()
def slice_experts(experts: SwiGLUExperts, *, granularity: Annotated[int, Range(1, 1024)] = 4) -> SwiGLUExperts:
    """Cut every expert into equal slices: expert i becomes the experts i·m to i·m + m - 1, which add up to it.

    Args:
        experts: N of width D; left as they are.
        granularity: m, slices per expert; must divide D.

    Returns:
        mN experts of width D/m, with as many parameters in all.

    Raises:
        ValueError: granularity does not divide the width.
    """
    n_experts, d_model, width = experts.down.shape
    if width % granularity:
        raise ValueError(f"granularity must divide the width {width} of an expert, got {granularity} (slice_experts)")
    m, thin = granularity, width // granularity
    made = SwiGLUExperts(n_experts * m, d_model, thin, activation=experts.activation, empty=True)
    # gate rows and up rows are cut apart: [N, 2, m, D/m, d] -> [N m, 2 D/m, d]
    gate_up = experts.gate_up.reshape(n_experts, 2, m, thin, d_model).transpose(1, 2)
    down = experts.down.reshape(n_experts, d_model, m, thin).transpose(1, 2)
    made.gate_up = nn.Parameter(gate_up.reshape(n_experts * m, 2 * thin, d_model).clone())
    made.down = nn.Parameter(down.reshape(n_experts * m, d_model, thin).clone())
    return made


@torch.no_grad()
def join_experts(experts: SwiGLUExperts, granularity: int) -> SwiGLUExperts:
    """Sew each `granularity` neighbouring experts into one wide expert, their sum: the way back from `slice_experts`.

    Args:
        experts: mN of width D/m; left as they are.
        granularity: m, must divide their number.

    Raises:
        ValueError: granularity does not divide the number of experts.
    """
    n, d_model, thin = experts.down.shape
    if granularity < 1 or n % granularity:
        raise ValueError(f"granularity must divide the {n} experts, got {granularity} (join_experts)")
    wide = thin * granularity
    made = SwiGLUExperts(n // granularity, d_model, wide, activation=experts.activation, empty=True)
    gate_up = experts.gate_up.reshape(-1, granularity, 2, thin, d_model).transpose(1, 2)
    made.gate_up = nn.Parameter(gate_up.reshape(-1, 2 * wide, d_model).clone())
    down = experts.down.reshape(-1, granularity, d_model, thin).transpose(1, 2)
    made.down = nn.Parameter(down.reshape(-1, d_model, wide).clone())
    return made
