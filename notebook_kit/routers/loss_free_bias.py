"""Loss-free balancing: a bias on the scores decides who is picked, but not how much the answer counts.

    s = σ(x Wᵀ) or softmax(x Wᵀ)   [T, N]        S_t = the k largest of s_t + b        w_ti = s_ti / Σ_S s  * scale
    after each training batch:  b_i <- b_i + bias_rate sign(mean(c) - c_i)             c_i tokens sent to expert i

b is a buffer: no gradient reaches it, no loss disturbs the task's. An expert that got too much becomes a little less
likely. bias_rate 0.001 is the papers', for hundreds of thousands of steps; for some hundred steps 0.01 does better.
Sigmoid scores (DeepSeek-V3) do not compete through a normaliser: raising one leaves the others as they were. With
bias_rate=0 this is a plain sigmoid gate; with k=1 and normalize=False that of Llama 4 (which multiplies the expert's
input by it, not its output).

Group limit (DeepSeek-V3: 8 groups of 32 experts, 4 kept): a group counts by the sum of its two best s + b; experts
outside the topk_group best groups cannot be picked.

transformers' DeepSeek-V3 gate keeps b (`e_score_correction_bias`) and never updates it. V3 also has a small balance
loss for each sequence; `balance_coef` is that loss over the whole call. Wang et al. train with softmax-free sigmoid
gates; with softmax the bias is on the scale of probabilities.

Sources: Wang et al. 2024, algorithm 1; DeepSeek-AI 2024, section 2.1.2, equations 12 to 20.
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routers._claims import top_k
from notebook_kit.routers.losses import load_balancing_loss
from notebook_kit.routers.router import Router
from notebook_kit.routing import Routing


@method(family="routers", paper=("loss-free-balancing", "deepseek-v3"))
class LossFreeBias(Router):
    """Each token takes the k experts of largest score plus bias; the bias is moved against the load.

    Args:
        d_model: width of the tokens.
        n_experts: N.
        k: experts a token.
        scores: "sigmoid" scores each expert apart, "softmax" against the others.
        normalize: divide the picked scores by their sum.
        routed_scaling_factor: times the weights; 2.5 in DeepSeek-V3.
        bias_rate: step of the bias; 0 keeps it.
        automatic: move the bias at the end of every training call. False: collect counts until `update_bias()` is
            called, for accumulated gradients.
        n_group: groups of equally many experts.
        topk_group: groups a token may use.
        balance_coef: times the balance loss N/k Σ f P, P the mean of s / Σ s.

    Raises:
        ValueError: k or the groups do not fit n_experts, or weights would be the constant 1.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        k: Annotated[int, Range(1, 512)] = 2,
        scores: Annotated[str, Choice("sigmoid", "softmax")] = "sigmoid",
        normalize: bool = True,
        routed_scaling_factor: Annotated[float, Range(0, 100)] = 1.0,
        bias_rate: Annotated[float, Range(0, 1)] = 1e-3,
        automatic: bool = True,
        n_group: Annotated[int, Range(1, 512)] = 1,
        topk_group: Annotated[int, Range(1, 512)] = 1,
        balance_coef: Annotated[float, Range(0, 1)] = 0.0,
    ):
        super().__init__(d_model, n_experts)
        self.check_k(k)
        if n_experts % n_group or topk_group > n_group or k > topk_group * (n_experts // n_group):
            raise ValueError(
                f"n_group={n_group} must divide n_experts={n_experts}, and topk_group={topk_group} of the groups must "
                f"hold k={k} experts (LossFreeBias)"
            )
        if normalize and k == 1 and n_experts > 1:
            raise ValueError(
                "normalize with k=1 makes every weight the constant 1, so the router gets no gradient from the task; "
                "use normalize=False, or k of at least 2 (LossFreeBias)"
            )
        self.k, self.scores, self.normalize, self.routed_scaling_factor = k, scores, normalize, routed_scaling_factor
        self.bias_rate, self.automatic, self.balance_coef = bias_rate, automatic, balance_coef
        self.n_group, self.topk_group = n_group, topk_group
        self.register_buffer("bias", torch.zeros(n_experts))  # b
        self.register_buffer("counts", torch.zeros(n_experts), persistent=False)  # c, since the last update

    def forward(self, x: Float[Tensor, "tokens d_model"], *, mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Route tokens; in training it counts them, and moves the bias for the next call.

        Args:
            x: tokens.
            mask: True for real tokens.
        """
        routing = self.route(self.logits(x), mask=mask)
        if self.training:
            self.counts.add_(torch.bincount(routing.experts.reshape(-1) + 1, minlength=self.n_experts + 1)[1:])
            if self.automatic:
                self.update_bias()
        return routing

    @torch.no_grad()
    def update_bias(self) -> None:
        """b_i <- b_i + bias_rate sign(mean(c) - c_i), then count anew. On several devices: add up `counts` first."""
        self.bias.add_(self.bias_rate * (self.counts.mean() - self.counts).sign())
        self.counts.zero_()

    def route(self, logits: Float[Tensor, "tokens experts"], *, mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Decide from the logits and the bias.

        Args:
            logits: z.
            mask: True for real tokens.
        """
        self.check_logits(logits, mask)
        z = logits.float()
        s = z.sigmoid() if self.scores == "sigmoid" else z.softmax(1)
        experts = self._pick(s.detach() + self.bias)
        weights = s.gather(1, experts)
        if self.normalize:
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        if self.routed_scaling_factor != 1:
            weights = weights * self.routed_scaling_factor
        if mask is not None:
            weights, experts = weights * mask[:, None], experts.where(mask[:, None], -1)
        loss = z.new_zeros(())
        if self.balance_coef:
            p = s / (s.sum(1, keepdim=True) + 1e-20)
            loss = self.balance_coef / self.k * load_balancing_loss(p, experts, mask=mask)
        return Routing(logits, s, weights, experts, loss)

    def _pick(self, biased: Float[Tensor, "tokens experts"]) -> Int[Tensor, "tokens k"]:
        if self.topk_group < self.n_group:
            groups = biased.unflatten(1, (self.n_group, -1))
            worth = groups.topk(min(2, groups.shape[2]), dim=2).values.sum(2)
            kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, top_k(worth, self.topk_group), True)
            biased = groups.masked_fill(~kept[:, :, None], -torch.inf).flatten(1)
        return top_k(biased, self.k)

    def _apply(self, fn, recurse=True):
        # Half precision would swallow steps of 0.001: the bias stays float32, on the device of the rest.
        before = {name: self._buffers[name] for name in ("bias", "counts") if name in self._buffers}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype != torch.float32:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def extra_repr(self) -> str:
        groups = f", {self.topk_group} of {self.n_group} groups" if self.n_group > 1 else ""
        return f"{super().extra_repr()}, k={self.k}, scores={self.scores!r}, bias_rate={self.bias_rate:g}{groups}"
