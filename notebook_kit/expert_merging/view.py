"""One way to read and write the experts of a mixture, whichever way a model stores them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersExperts

from notebook_kit.expert_merging.layout import PARTS, PLAIN, UnknownExperts, check_layout, fused_parts, names_of


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one layer: E stored experts of width f over d dimensions, and a router of N rows.

    E is N until experts are merged; `expert_map` says which stored expert each router row leads to.

    Args:
        name: of the block in the model, as in a RoutingTrace.
        block: the module with `experts` and `gate`.
    """

    name: str
    block: nn.Module

    @property
    def experts(self) -> nn.Module:
        """The module that stores the experts."""
        return self.block.experts

    @property
    def fused(self) -> bool:
        """Whether they are slices of one tensor, not modules of a list or a dictionary."""
        return not isinstance(self.experts, nn.ModuleList | nn.ModuleDict)

    @property
    def gated(self) -> bool:
        """Whether an expert is down (act(gate x) * up x), and not down act(up x) as in Switch Transformers."""
        return bool(self.experts.has_gate) if self.fused else len(self.names) == 3

    @property
    def parts(self) -> tuple[str, ...]:
        """What the tensors of an expert are called, in their order."""
        return PLAIN if not self.gated else PARTS if self.biased else PARTS[:3]

    @property
    def width(self) -> int:
        """Hidden units of an expert, f."""
        if self.fused:
            return fused_parts(self.experts)[0].shape[1]
        return getattr(self._unique()[0], self.names[0]).weight.shape[0]

    @property
    def biased(self) -> bool:
        """Whether experts have biases."""
        return self.fused and bool(self.experts.has_bias)

    @property
    def signed(self) -> bool:
        """Whether a unit's sign is free: the output is `down (act(gate) * up)`, odd in up.

        A class with a gate of its own, such as gpt-oss' clamped `(up + 1) * glu`, has no free sign; nor has a plain
        expert, since ReLU of -z is not -ReLU of z.
        """
        if not self.gated:
            return False
        own = getattr(type(self.experts), "_apply_gate", None)
        return own is None or own is _default_apply_gate

    @property
    def router_module(self) -> nn.Module:
        """The router of the block, called `gate` or `router`."""
        return getattr(self.block, "gate", None) or self.block.router

    @property
    def router(self) -> Float[Tensor, "n_experts d"]:
        """The router's rows: a view."""
        gate = self.router_module
        weight = getattr(getattr(gate, "classifier", gate), "weight", None)
        if weight is None or weight.dim() != 2:
            raise UnknownExperts(f"the router of {self.name!r}, a {type(gate).__name__}, has no 2-D `weight`")
        return weight.detach()

    @property
    def gate(self) -> Float[Tensor, "experts f d"]:
        """Gate rows of every stored expert: a view where they are fused, a copy where they are modules."""
        return self._named("gate")

    @property
    def up(self) -> Float[Tensor, "experts f d"]:
        """Up rows of every stored expert, as `gate`."""
        return self._named("up")

    @property
    def down(self) -> Float[Tensor, "experts d f"]:
        """Down columns of every stored expert, as `gate`."""
        return self._named("down")

    def expert(self, e: int) -> tuple[Float[Tensor, "..."], ...]:
        """The `parts` of one stored expert: gate and up [f, d], down [d, f], and their biases if it has any: views."""
        if self.fused:
            return tuple(part[e] for part in fused_parts(self.experts))
        return tuple(getattr(self._unique()[e], name).weight.detach() for name in self.names)

    def part(self, e: int, place: int) -> Float[Tensor, "..."]:
        """One tensor of one stored expert, by its place in `parts`."""
        return self.expert(e)[place]

    @property
    def gate_bias(self) -> Float[Tensor, "experts f"]:
        """Biases of the gate rows, where there are biases: a view."""
        return self._named("gate_bias")

    @property
    def up_bias(self) -> Float[Tensor, "experts f"]:
        """Biases of the up rows, as `gate_bias`."""
        return self._named("up_bias")

    @property
    def down_bias(self) -> Float[Tensor, "experts d"]:
        """Biases of the outputs, as `gate_bias`."""
        return self._named("down_bias")

    @property
    def expert_map(self) -> tuple[int, ...]:
        """Router row to stored expert; 0, 1, 2, ... until experts are merged."""
        known = getattr(self.experts, "expert_map", None)
        if known is not None:
            return tuple(known)
        if self.fused:
            return tuple(range(len(self)))
        unique = list(map(id, self._unique()))
        return tuple(unique.index(id(expert)) for expert in self._each())

    @property
    def names(self) -> Sequence[str]:
        """What experts that are modules call their `parts`."""
        return names_of(self.experts, self.name)

    def __len__(self) -> int:
        return len(self.down) if self.fused else len(self._unique())

    @torch.no_grad()
    def write(self, *tensors: Float[Tensor, "experts ..."], **named: Float[Tensor, "experts ..."]) -> None:
        """Write every stored expert back, in place.

        Args:
            tensors: in the order of `parts`: gate, up [E, f, d], down [E, d, f].
            named: the others, by their names in `parts`.

        Raises:
            ValueError: a part is missing or unknown, a shape is not what is stored, or experts are factored.
        """
        given = dict(zip(self.parts, tensors, strict=False)) | named
        if set(given) != set(self.parts) or len(tensors) + len(named) != len(given):
            raise ValueError(f"experts of {self.name!r} have {', '.join(self.parts)}, got {', '.join(given)}")
        if hasattr(self.experts, "factors"):
            raise ValueError(f"experts of {self.name!r} are stored as factors, which cannot be written as a whole")
        for name, new in given.items():
            if new.shape != (expected := self._named(name).shape):
                raise ValueError(f"experts of {self.name!r} must have shape {tuple(expected)}, got {tuple(new.shape)}")
        for place, new in enumerate(given[name] for name in self.parts):
            if self.fused:
                self._read(place).copy_(new)
            else:
                for expert, weight in zip(self._unique(), new, strict=True):
                    getattr(expert, self.names[place]).weight.copy_(weight)

    def _named(self, name: str) -> Tensor:
        if name not in self.parts:
            raise ValueError(f"experts of {self.name!r} have no {name}, only {', '.join(self.parts)}")
        return self._read(self.parts.index(name))

    def _read(self, place: int) -> Tensor:
        if not self.fused:
            name = self.names[place]
            return torch.stack([getattr(expert, name).weight.detach() for expert in self._unique()])
        return fused_parts(self.experts)[place]

    def _each(self) -> list[nn.Module]:
        """The expert of each place, one of them several times where a list is merged."""
        return list(self.experts.values() if isinstance(self.experts, nn.ModuleDict) else self.experts)

    def _unique(self) -> list[nn.Module]:
        return list({id(expert): expert for expert in self._each()}.values())


def check_finite(model: nn.Module) -> None:
    """Refuse experts that are broken, since a merge would spread it.

    Raises:
        ValueError: NaN or Inf in a tensor of theirs.
    """
    for layer in expert_view(model):
        for name, tensor in layer.experts.named_parameters():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"tensor {name!r} of the experts of {layer.name!r} holds NaN or Inf")


def expert_view(model: nn.Module) -> list[ExpertLayer]:
    """Read the experts of every routed layer, fused tensors and module lists alike.

    Args:
        model: Mixtral, Qwen2/3-MoE, OLMoE, DeepSeek-V3, gpt-oss or Switch Transformers of transformers, or modules
            with an `nn.ModuleList` named `experts` (of gate_proj/up_proj/down_proj, w1/w3/w2, or wi/wo without a gate)
            and a router named `gate` or `router`.

    Returns:
        One `ExpertLayer` a routed layer, first to last.

    Raises:
        UnknownExperts: no routed layer, or experts stored in a way that is not known.
    """
    layers = []
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module) or not (hasattr(block, "gate") or hasattr(block, "router")):
            continue
        if isinstance(experts, nn.ModuleList | nn.ModuleDict):
            names_of(experts, name)
            if isinstance(experts, nn.ModuleDict) and not isinstance(experts, SwitchTransformersExperts):
                kind = type(experts).__name__
                raise UnknownExperts(f"{name!r} has a dictionary of experts, {kind}: only that of Switch is known")
        else:
            check_layout(experts, name)
        layers.append(ExpertLayer(name, block))
    if not layers:
        raise UnknownExperts(
            f"no routed experts in {type(model).__name__}: looked for blocks with `experts` and a router named `gate` "
            "or `router` (Mixtral, Qwen-MoE, OLMoE, DeepSeek-V3, gpt-oss, Switch, or an nn.ModuleList of experts)"
        )
    return layers
