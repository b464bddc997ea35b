"""Union of experts: a feed-forward layer cut into experts that, all together, are the layer.

    dense(x) = Σ_i E_i(x)       E_i(x) = act(x W1_i + b1_i) W2_i + b2_i       Σ b2_i = b2

Expert i owns h/n hidden units, as in tensor parallelism. Patches of the sequence choose which experts compute them, and
samples which experts run; what nobody takes keeps only its residual. A patch taken by A and B gets A(x) + B(x). With
k = n and no limit the layer is the dense one, exactly. Attention is cut likewise in `SelectiveAttention`.

The rows of all experts are gathered, computed in one batched product, and added back at their places.

Limits. A slice of a trained layer is no expert for anything: fewer slices lose quality until it is trained on.

Source: Yang et al. 2025 (UoME). See `patches` for where their code differs.
"""

from typing import Annotated

from jaxtyping import Bool, Float
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures.patches import PatchRouter, gather_slots
from notebook_kit.mixtures.slices import MLPSlices


@method(family="mixtures", paper="uoe")
class UnionOfExperts(nn.Module):
    """A dense layer as n experts; `.gate.taken` says who took which patch of the last call, `.rows` what was computed.

    Args:
        dense: the kit's MLP([d, h, d]), or a gated layer (gate_proj, up_proj, down_proj); left as it is.
        n_experts: n, must divide h.
        k: experts a patch.
        selection: who chooses: "data" (each patch), "expert" (each sample), "both" (a sample, then its patches).
        k_sample: experts a sample, with "expert" and "both"; None is k with "expert", all with "both".
        patch_size: tokens routed together.
        capacity_factor: an expert's patches of a sample relative to an even share k m / n; None is no limit.
        gate_mode: what the gate does: "weight" (multiplies, learns), "select" (only chooses), "sum" (as good as that).
        causal: set True in a causal model: nothing depends on later tokens, or it is refused.

    Raises:
        ValueError: another kind of layer, or sizes that do not fit.
    """

    def __init__(
        self,
        dense: nn.Module,
        *,
        n_experts: Annotated[int, Range(1, 512)] = 4,
        k: Annotated[int, Range(1, 512)] = 2,
        selection: Annotated[str, Choice("data", "expert", "both")] = "data",
        k_sample: Annotated[int | None, Range(1, 512)] = None,
        patch_size: Annotated[int, Range(1, 4096)] = 1,
        capacity_factor: Annotated[float | None, Range(0.05, 16, log=True)] = None,
        gate_mode: Annotated[str, Choice("weight", "select", "sum")] = "weight",
        causal: bool = False,
    ):
        super().__init__()
        self.slices = MLPSlices.from_dense(dense, n_experts)
        if k_sample is None and selection == "expert":
            k_sample = k
        self.gate = PatchRouter(
            self.slices.w_in.shape[-1],
            n_experts,
            k=k,
            k_sample=k_sample,
            selection=selection,
            patch_size=patch_size,
            capacity_factor=capacity_factor,
            gate_mode=gate_mode,
            causal=causal,
        ).to(self.slices.w_in.device, self.slices.w_in.dtype)
        self.rows = 0  # computed in the last call, all experts together, fillers included

    def forward(
        self, x: Float[Tensor, "batch length d"], *, mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length d"]:
        """Sum what the experts answer; the residual is the caller's.

        Args:
            x: sequences of tokens.
            mask: True for real tokens; padding gets 0.
        """
        choice = self.gate(x, mask)
        n_samples, m, size, d = choice.patches.shape
        # The layer looks at one token at a time: patches of all samples are one list.
        ids, real = gather_slots(choice.taken.flatten(0, 1)[None])
        ids, real = ids[:, 0], real[:, 0]  # [n, c]
        rows = choice.patches.reshape(n_samples * m, size, d)[ids]
        answers = self.slices(rows.flatten(1, 2)).unflatten(1, (-1, size))
        weights = choice.weights.flatten(0, 1).T.gather(1, ids) * real
        answers = answers * weights[:, :, None, None].to(answers.dtype)
        self.rows = rows.shape[0] * rows.shape[1] * size
        y = answers.new_zeros(n_samples * m, size, d).index_add(0, ids.flatten(), answers.flatten(0, 1))
        y = (y * choice.real.reshape(n_samples * m, size, 1)).reshape(n_samples, m * size, d)
        return y[:, : x.shape[1]]

    def to_dense(self) -> nn.Module:
        """Sew the experts into one layer, their plain sum: an MLP, or a `SwiGLU`; the gate is left out."""
        return self.slices.to_dense()
