"""One way to read and write the experts of a mixture, whichever way a model stores them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

# What an expert consists of; the last three only where it has biases.
PARTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
# Names of gate, up and down in a list of experts.
LISTED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


class UnknownExperts(ValueError):
    """A module that looks like experts but is stored in a way that is not known: the text says what was found."""


@dataclass(frozen=True)
class ExpertLayer:
    """The gated experts of one layer: E stored experts of width f over d dimensions, and a router of N rows.

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
        """Whether they are slices of one tensor, not modules of a list."""
        return not isinstance(self.experts, nn.ModuleList)

    @property
    def width(self) -> int:
        """Hidden units of an expert, f."""
        if self.fused:
            return fused_parts(self.experts)[0].shape[1]
        return getattr(self.experts[0], self.names[0]).weight.shape[0]

    @property
    def biased(self) -> bool:
        """Whether experts have biases."""
        return self.fused and bool(self.experts.has_bias)

    @property
    def signed(self) -> bool:
        """Whether a unit's sign is free: the output is `down (act(gate) * up)`, odd in up.

        A class with a gate of its own, such as gpt-oss' clamped `(up + 1) * glu`, has no free sign.
        """
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
        weight = getattr(gate, "weight", None)
        if weight is None or weight.dim() != 2:
            raise UnknownExperts(f"the router of {self.name!r}, a {type(gate).__name__}, has no 2-D `weight`")
        return weight.detach()

    @property
    def gate(self) -> Float[Tensor, "experts f d"]:
        """Gate rows of every stored expert: a view where they are fused, a copy where they are a list."""
        return self._read(0)

    @property
    def up(self) -> Float[Tensor, "experts f d"]:
        """Up rows of every stored expert, as `gate`."""
        return self._read(1)

    @property
    def down(self) -> Float[Tensor, "experts d f"]:
        """Down columns of every stored expert, as `gate`."""
        return self._read(2)

    def expert(self, e: int) -> tuple[Float[Tensor, "..."], ...]:
        """Gate [f, d], up [f, d] and down [d, f] of one stored expert, and their biases if it has any: views."""
        if self.fused:
            return tuple(part[e] for part in fused_parts(self.experts))
        return tuple(getattr(self._unique()[e], name).weight.detach() for name in self.names)

    def part(self, e: int, place: int) -> Float[Tensor, "..."]:
        """One tensor of one stored expert, in the order of `PARTS`."""
        return self.expert(e)[place]

    @property
    def gate_bias(self) -> Float[Tensor, "experts f"]:
        """Biases of the gate rows, where there are biases: a view."""
        return self._read(3)

    @property
    def up_bias(self) -> Float[Tensor, "experts f"]:
        """Biases of the up rows, as `gate_bias`."""
        return self._read(4)

    @property
    def down_bias(self) -> Float[Tensor, "experts d"]:
        """Biases of the outputs, as `gate_bias`."""
        return self._read(5)

    @property
    def expert_map(self) -> tuple[int, ...]:
        """Router row to stored expert; 0, 1, 2, ... until experts are merged."""
        known = getattr(self.experts, "expert_map", None)
        if known is not None:
            return tuple(known)
        unique = list(dict.fromkeys(map(id, self.experts))) if not self.fused else None
        if unique is None:
            return tuple(range(len(self)))
        return tuple(unique.index(id(expert)) for expert in self.experts)

    @property
    def names(self) -> Sequence[str]:
        """What a list's experts call gate, up and down."""
        return _names(self.experts, self.name)

    def __len__(self) -> int:
        return len(self.gate) if self.fused else len(dict.fromkeys(map(id, self.experts)))

    @torch.no_grad()
    def write(
        self,
        gate: Float[Tensor, "experts f d"],
        up: Float[Tensor, "experts f d"],
        down: Float[Tensor, "experts d f"],
        **biases: Float[Tensor, "experts _"],
    ) -> None:
        """Write every stored expert back, in place; biases as gate_bias, up_bias, down_bias.

        Raises:
            ValueError: a shape is not what is stored, biases are missing or too many, or experts are factored.
        """
        if set(biases) != (set(PARTS[3:]) if self.biased else set()):
            raise ValueError(f"experts of {self.name!r} have {'' if self.biased else 'no '}biases, got {[*biases]}")
        if hasattr(self.experts, "factors"):
            raise ValueError(f"experts of {self.name!r} are stored as factors, which cannot be written as a whole")
        parts = (gate, up, down, *(biases[name] for name in PARTS[3:] if name in biases))
        for place, new in enumerate(parts):
            if new.shape != self._read(place).shape:
                expected = tuple(self._read(place).shape)
                raise ValueError(f"experts of {self.name!r} must have shape {expected}, got {tuple(new.shape)}")
        for place, new in enumerate(parts):
            if self.fused:
                self._read(place).copy_(new)
            else:
                for expert, weight in zip(self._unique(), new, strict=True):
                    getattr(expert, self.names[place]).weight.copy_(weight)

    def _read(self, place: int) -> Tensor:
        if not self.fused:
            name = self.names[place]
            return torch.stack([getattr(expert, name).weight.detach() for expert in self._unique()])
        return fused_parts(self.experts)[place]

    def _unique(self) -> list[nn.Module]:
        return list({id(expert): expert for expert in self.experts}.values())


def expert_view(model: nn.Module) -> list[ExpertLayer]:
    """Read the experts of every routed layer, fused tensors and module lists alike.

    Args:
        model: Mixtral, Qwen2/3-MoE, OLMoE, DeepSeek-V3, gpt-oss of transformers, or modules with an `nn.ModuleList`
            named `experts` (of gate_proj/up_proj/down_proj or w1/w3/w2) and a router named `gate` or `router`.

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
        if isinstance(experts, nn.ModuleList):
            _names(experts, name)
        else:
            _check_layout(experts, name)
        layers.append(ExpertLayer(name, block))
    if not layers:
        raise UnknownExperts(
            f"no routed experts in {type(model).__name__}: looked for blocks with `experts` and a router named `gate` "
            "or `router` (Mixtral, Qwen-MoE, OLMoE, DeepSeek-V3, gpt-oss, or an nn.ModuleList of gated experts)"
        )
    return layers


def fused_parts(experts: nn.Module, name: str = "experts") -> tuple[Tensor, ...]:
    """Views (gate [E, f, d], up [E, f, d], down [E, d, f]) of fused expert tensors.

    Where the class has biases, gate_bias [E, f], up_bias [E, f] and down_bias [E, d] follow.

    The class says how they lie: `is_transposed` ([E, d, 2f] instead of [E, 2f, d]), `is_concatenated` (gate rows
    before up rows, or alternating), `has_gate`, `has_bias`. Shapes are never asked: with 2f = d they would not tell.

    Raises:
        UnknownExperts: the class does not say, or says something that is not supported.
    """
    _check_layout(experts, name)
    both, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    if experts.is_transposed:
        both, down = both.transpose(1, 2), down.transpose(1, 2)
    parts = (*_halves(experts, both), down)
    if experts.has_bias:
        parts += (*_halves(experts, experts.gate_up_proj_bias.detach()), experts.down_proj_bias.detach())
    return parts


def _halves(experts: nn.Module, both: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up, which share axis 1."""
    return both.chunk(2, dim=1) if experts.is_concatenated else (both[:, 0::2], both[:, 1::2])


def _check_layout(experts: nn.Module, name: str) -> None:
    kind = f"{type(experts).__name__} of {name!r}"
    known = {*dict(experts.named_parameters()), *getattr(experts, "factors", ())}
    if not {"gate_up_proj", "down_proj"} <= known:
        raise UnknownExperts(f"{kind} has no gate_up_proj and down_proj; its parameters are {_parameters(experts)}")
    layout = {key: getattr(experts, key, None) for key in ("is_transposed", "is_concatenated", "has_gate", "has_bias")}
    missing = [key for key, value in layout.items() if value is None]
    if missing:
        raise UnknownExperts(f"{kind} does not say how its tensors lie: it has no {', '.join(missing)}")
    if not layout["has_gate"]:
        raise UnknownExperts(f"{kind} has no gate, which expert merging does not read")
    if layout["has_bias"] and not {"gate_up_proj_bias", "down_proj_bias"} <= known:
        raise UnknownExperts(f"{kind} says it has biases, but its parameters are {_parameters(experts)}")


def _names(experts: nn.ModuleList, name: str) -> Sequence[str]:
    for names in LISTED:
        if all(isinstance(getattr(expert, key, None), nn.Linear) for expert in experts for key in names):
            biased = any(getattr(expert, key).bias is not None for expert in experts for key in names)
            if biased:
                raise UnknownExperts(f"the experts of {name!r} have biases, which expert merging does not read")
            return names
    kinds = ", ".join(sorted({type(expert).__name__ for expert in experts})) or "nothing"
    raise UnknownExperts(
        f"the list {name!r} holds {kinds}; known are gated experts with {' or '.join(map(str, LISTED))}"
    )


def _parameters(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]
