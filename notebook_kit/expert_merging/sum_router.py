"""Routers that choose groups of merged experts, by the sum of their members' probabilities."""

from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.expert_merging.mapped_experts import MappedExperts, class_of, lookup
from notebook_kit.expert_merging.view import expert_view
from notebook_kit.routing.switch import is_switch_router


class SumRouter:
    """Before a class of softmax routers: tokens choose groups, and a group's probability is the sum of its members'.

    P_g = Σ_{i ∈ g} p_i, which sum to 1 as p does; top-k and its renormalisation then run over P. A chosen group is
    named by its first row, so that experts and traces see router rows as ever.
    """

    family = "sum"
    expert_map: tuple[int, ...]

    def group_probs(self, logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens groups"]:
        """P, float32."""
        p = logits.float().softmax(-1)
        return p.new_zeros(len(p), max(self.expert_map) + 1).index_add(1, lookup(self.expert_map, p.device), p)

    def forward(self, hidden_states: Float[Tensor, "*batch d"]) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of all rows, the weights of the chosen groups, and their first rows.

        Args:
            hidden_states: inputs.
        """
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = nn.functional.linear(x, self.weight, getattr(self, "bias", None))
        probs = self.group_probs(logits)
        top, group = probs.topk(min(self.top_k, probs.shape[1]), dim=-1)
        if getattr(self, "norm_topk_prob", True):  # Mixtral and gpt-oss always do
            top = top / top.sum(-1, keepdim=True)
        first = tuple(map(self.expert_map.index, range(probs.shape[1])))
        return logits, top.to(logits.dtype), lookup(first, group.device)[group]


class SumSwitchRouter(SumRouter):
    """Before Switch Transformers' router: the capacity is that of a group, counted along each sequence."""

    def forward(self, hidden_states: Float[Tensor, "n length d"]) -> tuple[Tensor, Tensor, Tensor]:
        """The dispatch mask with a 1 at each chosen group's first row, the group's probability, all rows' logits.

        Args:
            hidden_states: inputs.
        """
        _, _, logits = super(SumRouter, self).forward(hidden_states)
        weights, group = self.group_probs(logits.flatten(0, 1)).max(-1)
        first = tuple(map(self.expert_map.index, range(max(self.expert_map) + 1)))
        chosen = lookup(first, group.device)[group].view(logits.shape[:2])
        mask = nn.functional.one_hot(chosen, logits.shape[-1])
        mask = mask * (mask.cumsum(1) <= self.expert_capacity)
        return mask, weights.view(*chosen.shape, 1).to(hidden_states.dtype), logits


def sum_rows(model: nn.Module) -> nn.Module:
    """Let the routers of a merged model add up the probabilities of a group, in place.

    Raises:
        ValueError: experts in a list, or a router without a softmax.
    """
    for layer in expert_view(model):
        router = layer.router_module
        if not isinstance(layer.experts, MappedExperts) or hasattr(router, "e_score_correction_bias"):
            raise ValueError(
                f'router="sum" adds up softmax probabilities of a transformers model; {layer.name!r} has a '
                f'{type(router).__name__} and {type(layer.experts).__name__}: use router="map"'
            )
        if not isinstance(router, SumRouter):
            mixin = SumSwitchRouter if is_switch_router(router) else SumRouter
            router.__class__ = class_of(mixin, type(router))
        router.expert_map = layer.expert_map
    model.config.router_rows = "sum"
    return model
