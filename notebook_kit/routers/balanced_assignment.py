"""BASE: in training a balanced assignment gives every expert the same number of tokens; there is no loss to tune.

    a = x Wᵀ  [T, N]        training: max Σ_t a_{t,e(t)} with at most ⌈T/N⌉ tokens an expert        w_t = σ(a_{t,e(t)})
                            evaluation: e(t) = argmax_i a_ti, no limit
    y_t = σ(a) E(x_t) + (1 - σ(a)) x_t                        (`MoE(experts, router, residual=True)`)

The assignment has no gradient; W learns through σ(a) alone. A constant added to a token's row of affinities
changes nothing in who goes where. Where T is no multiple of N, some experts get fewer than ⌈T/N⌉ (as if the batch were
padded).

The paper's experts are residual themselves, E(x) = x + F(x). Then y = x + σ(a) F(x): the second term is what
`MoE(F, router)` gives, inside the residual connection that a transformer has anyway.

The assignment is exact at any size (see `assignment`). The paper and fairseq use an auction, exact up to its step;
fairseq also shuffles tokens over workers first, which one machine does not need, and demands T = C N.

Limit. In training a token's expert depends on all tokens of the call, later ones too.

Source: Lewis et al. 2021, sections 3.1 to 3.4; fairseq `modules/base_layer.py` (orthogonal start, gain 0.1).
"""

from typing import Annotated

from jaxtyping import Bool, Float
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice
from notebook_kit.routers._claims import capacity, top_k
from notebook_kit.routers.assignment import balanced_assignment
from notebook_kit.routers.router import Router
from notebook_kit.routing import Routing
from notebook_kit.routing.decision import refuse_nan


@method(family="routers", paper="base-layers")
class BalancedAssignment(Router):
    """Each token goes to one expert; in training all experts get the same number, at the largest sum of affinities.

    Args:
        d_model: width of the tokens.
        n_experts: N.
        evaluation: "greedy", each token's best expert, as in the paper; "balanced" assigns as in training, for a look
            at a recorded trace (a causal model refuses it).
    """

    def __init__(
        self, d_model: int, n_experts: int, *, evaluation: Annotated[str, Choice("greedy", "balanced")] = "greedy"
    ):
        super().__init__(d_model, n_experts)
        nn.init.orthogonal_(self.weight, gain=0.1)
        self.evaluation = evaluation
        self.causal = evaluation == "greedy"

    def route(self, logits: Float[Tensor, "tokens experts"], *, mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Decide from the logits.

        Args:
            logits: affinities a.
            mask: True for real tokens.
        """
        self.check_logits(logits, mask)
        refuse_nan(logits, "the router's logits")
        a = logits.float()
        if self.training or self.evaluation == "balanced":
            real = a if mask is None else a[mask]
            chosen = balanced_assignment(real, capacity(len(real), self.n_experts, 1, 1.0))
            experts = chosen if mask is None else chosen.new_full((len(a),), -1).masked_scatter(mask, chosen)
            experts = experts[:, None]
        else:
            experts = top_k(a.detach(), 1)
            experts = experts if mask is None else experts.where(mask[:, None], -1)
        scores = a.sigmoid()
        weights = scores.gather(1, experts.clamp_min(0)) * (experts >= 0)
        return Routing(logits, scores, weights, experts, a.new_zeros(()))
