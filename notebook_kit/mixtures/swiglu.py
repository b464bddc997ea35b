"""Gated experts in two tensors, the layout of transformers 5: E_i(x) = W_down,i (silu(W_gate,i x) ⊙ W_up,i x)."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLUExperts(nn.Module):
    """N gated feed-forward experts as `gate_up` [N, 2f, d] (gate rows first) and `down` [N, d, f].

    Args:
        n_experts: N.
        d_model: d.
        d_ff: f, hidden units of one expert.
        activation: of the gate.
        empty: leave the tensors on the meta device, to be replaced by weights that exist already.

    Source: Shazeer 2020, GLU Variants Improve Transformer, equation 6.
    """

    def __init__(
        self,
        n_experts: int,
        d_model: int,
        d_ff: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.silu,
        empty: bool = False,
    ):
        super().__init__()
        device = "meta" if empty else None
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * d_ff, d_model, device=device))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_ff, device=device))
        self.activation = activation
        nn.init.normal_(self.gate_up, std=d_model**-0.5)
        nn.init.normal_(self.down, std=d_ff**-0.5)

    def __len__(self) -> int:
        return len(self.gate_up)

    def forward(self, x: Float[Tensor, "rows d_model"], counts: Sequence[int]) -> Float[Tensor, "rows d_model"]:
        """Compute rows that are sorted by expert.

        Args:
            x: rows of expert 0, then of expert 1, ...
            counts: rows of each expert; they add up to all rows.
        """
        answers = []
        for first, last in _groups(counts, 256 if x.is_cpu else len(x)):
            rows, x = x.split([sum(counts[first:last]), len(x) - sum(counts[first:last])])
            gate, up = _each(rows, self.gate_up[first:last], counts[first:last]).chunk(2, dim=-1)
            answers.append(_each(self.activation(gate) * up, self.down[first:last], counts[first:last]))
        return _join(answers)

    def extra_repr(self) -> str:
        n_experts, d_model, d_ff = self.down.shape
        return f"n_experts={n_experts}, d_model={d_model}, d_ff={d_ff}"


def _each(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """One product an expert, of its rows with its matrix."""
    if len(counts) > 1 and _groupable(x, weight):
        ends = torch.tensor(counts).cumsum(0, dtype=torch.int32).to(x.device)
        return F.grouped_mm(x, weight.mT, offs=ends)
    pieces = zip(counts, x.split(counts), weight.mT.unbind(0), strict=True)
    return _join([piece.mm(matrix) for count, piece, matrix in pieces if count])


def _groupable(x: Tensor, weight: Tensor) -> bool:
    """Whether torch (2.10 on) can do all products in one call: rows aligned to 16 bytes, and an Ampere GPU or later."""
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(-2) * t.element_size() % 16 == 0 for t in (x, weight))
    width = weight.shape[1] * weight.element_size()
    return (
        hasattr(F, "grouped_mm")
        and (x.is_cpu or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)))
        and x.dtype == weight.dtype != torch.float64
        and aligned
        and width % 16 == 0
    )


def _join(parts: list[Tensor]) -> Tensor:
    """`torch.cat`, which would copy even a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _groups(counts: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """Consecutive experts with about `rows` rows together: enough for one activation call, few enough for a cache."""
    groups, first, total = [], 0, 0
    for last, count in enumerate(counts, 1):
        total += count
        if total >= rows or (last == len(counts) and total):
            groups.append((first, last))
            first, total = last, 0
    return groups
