"""DeepSeekMoE: experts cut into thin slices of which more are used, and a few that every token uses.

    y_t = Σ_{shared} E_i(u_t) + Σ_{i in S_t} s_ti E_i(u_t)     s_t = softmax(u_t Wᵀ) over the routed experts only

From N experts of width D with K active, at equal parameters and equal compute:

| quantity                    | symbol       | width in all |
|-----------------------------|--------------|--------------|
| thin experts                | mN           | mN · D/m = ND |
| of these shared, always on  | K_s          | K_s D/m      |
| routed                      | N' = mN - K_s |             |
| picked by each token        | K' = mK - K_s | active: mK · D/m = KD |

Thin experts can be combined in many more ways: C(16, 2) = 120, C(64, 8) = 4,426,165,368. Shared experts take what all
tokens need, so that routed ones need not each learn it. The weights s are not divided by their sum (V1, V2); V3 scores
by a sigmoid, divides, and multiplies by 2.5. No capacity: no token is dropped. The shared ones are one FFN of width
K_s D/m, which is their sum.

The router is `LossFreeBias`, whose bias stays 0 unless bias_rate says otherwise: then it balances as V3 does.

Limits. The router has N' rows instead of N, a few parameters more. The paper's models train from scratch and keep the
lowest layer dense, which this layer cannot say. Hugging Face's DeepSeek blocks compute no balance loss.

Source: Dai et al. 2024, sections 3.1 to 3.3; the shared expert's gate σ(u · w): Qwen2-MoE.
"""

from dataclasses import replace
from typing import Annotated

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures.deepseek_copies import cut_mixture, wrap_block
from notebook_kit.mixtures.fine_grained_losses import device_balance_loss
from notebook_kit.mixtures.moe import MoE
from notebook_kit.mixtures.slices import SwiGLU
from notebook_kit.mixtures.swiglu import SwiGLUExperts
from notebook_kit.routers import LossFreeBias


@method(family="mixtures", paper="deepseekmoe")
class DeepSeekMoE(MoE):
    """A layer of thin gated experts, some shared by all tokens; `.routing` keeps the last decision of the routed ones.

    Args:
        d_model: d.
        d_ff: D, width of a coarse expert; granularity must divide it.
        n_experts: N, coarse experts.
        k: K, coarse experts a token.
        granularity: m, slices per coarse expert; 1 cuts nothing.
        n_shared: K_s, thin experts that are always on; at most mK - 1.
        scores: "softmax" (V1, V2) or "sigmoid" (V3).
        normalize: divide the picked scores by their sum.
        routed_scaling_factor: times the routed part; 2.5 in V3.
        shared_gate: weigh the shared part by σ(u · w), as Qwen2-MoE does.
        balance_coef: α₁, times the expert-level loss; 0.01 in the 2B model, 0.001 in the 16B.
        device_groups: D of the device-level loss; must divide the number of routed experts.
        device_coef: α₂, times the device-level loss; 0.05 in the 145B model.
        bias_rate: of loss-free balancing; 0 has none.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_experts: int,
        *,
        k: Annotated[int, Range(1, 512)] = 2,
        granularity: Annotated[int, Range(1, 1024)] = 4,
        n_shared: Annotated[int, Range(0, 512)] = 1,
        scores: Annotated[str, Choice("softmax", "sigmoid")] = "softmax",
        normalize: bool = False,
        routed_scaling_factor: Annotated[float, Range(0, 100)] = 1.0,
        shared_gate: bool = False,
        balance_coef: Annotated[float, Range(0, 1)] = 0.01,
        device_groups: Annotated[int, Range(1, 4096)] = 1,
        device_coef: Annotated[float, Range(0, 1)] = 0.0,
        bias_rate: Annotated[float, Range(0, 1)] = 0.0,
    ):
        if d_ff % granularity:
            raise ValueError(f"granularity must divide d_ff={d_ff}, got {granularity} (DeepSeekMoE)")
        picks, routed = granularity * k - n_shared, granularity * n_experts - n_shared
        if not 1 <= picks <= routed:
            raise ValueError(
                f"k·granularity - n_shared must leave 1 to {routed} picks a token, got {k}·{granularity} - {n_shared} "
                f"= {picks} (DeepSeekMoE)"
            )
        if routed % device_groups:
            raise ValueError(
                f"device_groups must divide the {routed} routed experts, got {device_groups} (DeepSeekMoE)"
            )
        thin = d_ff // granularity
        router = LossFreeBias(
            d_model,
            routed,
            k=picks,
            scores=scores,
            normalize=normalize,
            routed_scaling_factor=routed_scaling_factor,
            bias_rate=bias_rate,
            balance_coef=balance_coef,
        )
        super().__init__(SwiGLUExperts(routed, d_model, thin), router)
        self.n_shared, self.device_groups, self.device_coef = n_shared, device_groups, device_coef
        self.shared = SwiGLU(d_model, n_shared * thin) if n_shared else None
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if n_shared and shared_gate else None

    def forward(
        self,
        x: Float[Tensor, "*batch d_model"],
        *,
        mask: Bool[Tensor, "*batch"] | None = None,
        tokens: Int[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch d_model"]:
        """Add what the shared and the picked experts answer; the residual is the caller's.

        Args:
            x: tokens.
            mask: True for real tokens; padding is not routed, counts in no loss, and gets 0.
            tokens: not looked at.
        """
        y = super().forward(x, mask=mask, tokens=tokens)
        if self.device_coef:
            probs = self.routing.probs / self.routing.probs.sum(1, keepdim=True).clamp_min(1e-20)
            rows = None if mask is None else mask.reshape(-1)
            loss = device_balance_loss(probs, self.routing.experts, device_groups=self.device_groups, mask=rows)
            self.routing = replace(self.routing, aux_loss=self.routing.aux_loss + self.device_coef * loss)
        if self.shared is None:
            return y
        common = self.shared(x)
        if self.shared_gate is not None:
            common = self.shared_gate(x).sigmoid() * common
        return y + (common if mask is None else common * mask.unsqueeze(-1))

    @classmethod
    def from_transformers(cls, block: nn.Module) -> "DeepSeekMoE":
        """Wrap a transformers block with shared experts (DeepSeek-V2, DeepSeek-V3, Qwen2-MoE), sharing its weights.

        Args:
            block: such as `model.model.layers[1].mlp`. Its width is not cut further: granularity 1.

        Raises:
            ValueError: it lacks a gate, fused experts or shared experts.
        """
        return wrap_block(cls, block)

    @classmethod
    def from_moe(cls, moe: MoE, granularity: int = 4) -> "DeepSeekMoE":
        """Cut the experts of a trained top-k mixture; the new layer computes the same, and can be trained on.

        Every slice gets its expert's row of the gate, so the m slices of an expert tie and are picked together; each
        has 1/m of the probability, which routed_scaling_factor = m makes up for. No expert is shared.

        Args:
            moe: of `SwiGLUExperts` and a `TopK` router without capacity; left as it is.
            granularity: m, must divide the experts' width.

        Raises:
            ValueError: other experts or another router.
        """
        return cut_mixture(cls, moe, granularity)

    def extra_repr(self) -> str:
        return f"n_shared={self.n_shared}, device_groups={self.device_groups}, device_coef={self.device_coef:g}"
