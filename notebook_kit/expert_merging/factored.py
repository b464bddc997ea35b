"""Experts stored as factors: W = L R + S, with only those rows of S that are not zero.

Every matrix of every stored expert, [out, in], is a product of L [out, r] and R [r, in], plus rows added to some of
its outputs. That is what compression after merging leaves. Importing this module tells the Auto classes about the
`factored_*` model types, as `mapped` does for its own.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from notebook_kit.expert_merging.layout import PARTS, PLAIN
from notebook_kit.expert_merging.mapped import MappedModel, register, replaced
from notebook_kit.expert_merging.mapped_experts import MappedExperts, class_of, lookup, shell
from notebook_kit.expert_merging.view import check_finite, expert_view

KINDS = PARTS[:3]
# One matrix: (L, R, S), S dense or None; and biases as they are.
Factors = Mapping[str, tuple[Tensor, Tensor, Tensor | None] | Tensor]


class FactoredExperts(MappedExperts):
    """Before a class of fused experts: gate, up and down are L R + S, for each of E stored experts.

    Parameters, for each of gate, up and down: `_left` [E, out, r], `_right` [E, r, in], `_rows` [kept, in]; and the
    buffer `_place` [kept], rising: row p of S belongs to expert p // out, output p % out.
    """

    family = "factored"
    kinds = KINDS
    factors = ("gate_up_proj", "down_proj")  # what is computed from the factors when it is asked for

    def settings(self) -> dict[str, object]:
        """What a configuration must know before the weights are loaded."""
        kept = {kind: len(getattr(self, f"{kind}_place")) for kind in self.kinds}
        return super().settings() | {"expert_rank": self.down_left.shape[2], "expert_rows": kept}

    def matrix(self, kind: str) -> Float[Tensor, "experts out in"]:
        """The matrices of one kind, multiplied out: L R + S."""
        left, right, rows, place = (getattr(self, f"{kind}_{part}") for part in ("left", "right", "rows", "place"))
        w = left @ right
        return w.flatten(0, 1).index_add(0, place.long(), rows).view_as(w)

    @property
    def gate_up_proj(self) -> Tensor:
        """Gate and up, multiplied out, as the architecture lays them."""
        gate, up = self.matrix("gate"), self.matrix("up")
        both = torch.cat((gate, up), 1) if self.is_concatenated else torch.stack((gate, up), 2).flatten(1, 2)
        return both.transpose(1, 2) if self.is_transposed else both

    @property
    def down_proj(self) -> Tensor:
        """Down, multiplied out, as the architecture lays it."""
        return self.matrix("down").transpose(1, 2) if self.is_transposed else self.matrix("down")

    def project(self, kind: str, e: int, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens out"]:
        """(L R + S) x without ever forming the matrix."""
        left, right, rows, place = (getattr(self, f"{kind}_{part}") for part in ("left", "right", "rows", "place"))
        out = left.shape[1]
        y = (x @ right[e].T) @ left[e].T
        first, last = torch.searchsorted(place, place.new_tensor([e * out, (e + 1) * out])).tolist()
        if first == last:
            return y
        if last - first == out:  # all rows are there
            return y + x @ rows[first:last].T
        return y.index_add(1, place[first:last].long() - e * out, x @ rows[first:last].T)

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens d"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens d"]:
        """Run the stored experts; arguments as `MappedExperts.forward`."""
        return self.mixture(hidden_states, lookup(self.expert_map, top_k_index.device)[top_k_index], top_k_weights)

    def mixture(
        self, x: Float[Tensor, "tokens d"], stored: Int[Tensor, "tokens k"], weights: Float[Tensor, "tokens k"]
    ) -> Float[Tensor, "tokens d"]:
        """The weighted sum of what stored experts answer; -1 is none."""
        result = torch.zeros_like(x)
        for e in stored[stored >= 0].unique().tolist():
            token, slot = torch.where(stored == e)
            result.index_add_(0, token, (self.answer(e, x[token]) * weights[token, slot, None]).to(result.dtype))
        return result

    def answer(self, e: int, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        """Run one stored expert."""
        gate, up = self.project("gate", e, x), self.project("up", e, x)
        both = torch.cat((gate, up), -1) if self.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
        if self.has_bias:
            both = both + self.gate_up_proj_bias[e]
        y = self.project("down", e, self._apply_gate(both))
        return y + self.down_proj_bias[e] if self.has_bias else y

    @torch.no_grad()
    def keep_rows(self, kind: str, alive: Tensor) -> None:
        """Drop the rows of S that are not alive, for good: Bool[kept]."""
        rows, place = getattr(self, f"{kind}_rows"), getattr(self, f"{kind}_place")
        setattr(self, f"{kind}_rows", nn.Parameter(rows[alive].clone(), requires_grad=rows.requires_grad))
        setattr(self, f"{kind}_place", place[alive].clone())


class FactoredSwitchExperts(FactoredExperts, nn.Module):
    """In place of Switch Transformers' dictionary of experts: up and down are L R + S, and there is no gate."""

    factors, kinds = ("up_proj", "down_proj"), PLAIN
    is_transposed = is_concatenated = has_gate = has_bias = False

    @property
    def up_proj(self) -> Tensor:
        """Up, multiplied out."""
        return self.matrix("up")

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens d"],
        selected_experts: Int[Tensor, "tokens 1 experts"],
        routing_weights: Float[Tensor, "tokens 1"],
    ) -> Float[Tensor, "tokens d"]:
        """Run the stored experts; arguments as `MappedSwitchExperts.forward`."""
        stored = lookup(self.expert_map, selected_experts.device)[selected_experts.argmax(-1)]
        stored = stored.masked_fill(selected_experts.sum(-1) == 0, -1)
        return self.mixture(hidden_states, stored, routing_weights)

    def answer(self, e: int, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        """Run one stored expert."""
        return self.project("down", e, self.dropout(self.act(self.project("up", e, x))))


FactoredExperts.of_switch = FactoredSwitchExperts


class FactoredModel(MappedModel):
    """Before a class of models: `expert_rank` and `expert_rows` say how large each layer's factors are."""

    fields: ClassVar = MappedModel.fields | {"expert_rank": None, "expert_rows": None}

    def prepare(self, experts: nn.Module, number: str) -> None:
        """Give the experts of one layer the shapes that the configuration says."""
        config = self.config
        _reshape(experts, config.expert_map[number], config.expert_rank[number], config.expert_rows[number])


def factor_experts(
    model: nn.Module, experts: Mapping[str, Sequence[Factors]], expert_maps: Mapping[str, Sequence[int]]
) -> nn.Module:
    """Copy a model with factored experts in place of its own.

    Args:
        model: of transformers; its experts may be merged already. Not modified.
        experts: block name to the factors of each stored expert.
        expert_maps: block name to map, router row to stored expert.

    Returns:
        A model that `save_pretrained`, `from_pretrained` and `generate` work on.

    Raises:
        ValueError: NaN or Inf in an expert, experts in a list, or an architecture that is not known.
    """
    check_finite(model)
    new = {}
    for layer in expert_view(model):
        if isinstance(layer.experts, nn.ModuleList):
            raise ValueError(f"the experts of {layer.name!r} are a list of modules; factors are stored for fused ones")
        new[layer.name] = _build(shell(layer.experts), experts[layer.name], expert_maps[layer.name])
    return replaced(model, new)


@torch.no_grad()
def _build(module: nn.Module, experts: Sequence[Factors], expert_map: Sequence[int]) -> nn.Module:
    kinds = [kind for kind in KINDS if kind in experts[0]]
    kept = {kind: sum(0 if e[kind][2] is None else len(e[kind][2]) for e in experts) for kind in kinds}
    _reshape(module, expert_map, experts[0]["down"][1].shape[0], kept)
    for kind in kinds:
        out = experts[0][kind][0].shape[0]
        rows = [(e, parts[kind][2]) for e, parts in enumerate(experts) if parts[kind][2] is not None]
        if rows:
            getattr(module, f"{kind}_rows").copy_(torch.cat([s for _, s in rows]))
            getattr(module, f"{kind}_place").copy_(torch.cat([torch.arange(out) + e * out for e, _ in rows]))
        for place, part in enumerate(("left", "right")):
            getattr(module, f"{kind}_{part}").copy_(torch.stack([parts[kind][place] for parts in experts]))
    for name in ("gate_up_proj_bias", "down_proj_bias") if module.has_bias else ():
        kinds = ("gate_bias", "up_bias") if name.startswith("gate") else ("down_bias",)
        parts = [torch.stack([expert[kind] for expert in experts]) for kind in kinds]
        laid = torch.cat(parts, 1) if module.is_concatenated else torch.stack(parts, 2).flatten(1)
        getattr(module, name).copy_(laid)
    return module


def _reshape(module: nn.Module, expert_map: Sequence[int], rank: int, kept: Mapping[str, int]) -> None:
    """Replace fused tensors, or the modules of a dictionary, by empty factors, in place."""
    first = next(module.children()) if isinstance(module, nn.ModuleDict) else None
    old = module.down_proj if first is None else first.wo.weight
    d, f = old.shape[-2:]
    if first is None and module.is_transposed:
        d, f = f, d
    stored, like = max(expert_map) + 1, {"dtype": old.dtype, "device": old.device}
    for name, parameter in list(module._parameters.items()):
        del module._parameters[name]
        if name.endswith("_bias"):
            module.register_parameter(name, nn.Parameter(torch.empty(stored, *parameter.shape[1:], **like)))
    for name in list(module._buffers):
        del module._buffers[name]
    base = next(cls for cls in type(module).__mro__ if not issubclass(cls, MappedExperts))
    module.__class__ = class_of(FactoredExperts, base)
    if first is not None:
        module._modules = {"act": first.act, "dropout": first.dropout}
    for kind in module.kinds:
        out, into = (d, f) if kind == "down" else (f, d)
        shapes = {"left": (stored, out, rank), "right": (stored, rank, into), "rows": (kept[kind], into)}
        for part, shape in shapes.items():
            module.register_parameter(f"{kind}_{part}", nn.Parameter(torch.empty(shape, **like)))
        module.register_buffer(f"{kind}_place", torch.zeros(kept[kind], dtype=torch.int32, device=old.device))
    module.num_experts, module.expert_map = stored, tuple(int(place) for place in expert_map)


register(FactoredExperts, FactoredModel, same_files=False)
