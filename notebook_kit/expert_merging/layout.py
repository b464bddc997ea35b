"""How models store experts: slices of fused tensors, laid this way or that, or modules of a list or a dictionary."""

from collections.abc import Sequence

from torch import Tensor, nn

# What an expert consists of; the last three only where it has biases.
PARTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
PLAIN = ("up", "down")  # an expert without a gate: down act(up x)
# Names of gate, up and down, or of up and down, where each expert is a module.
LISTED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi", "wo"))


class UnknownExperts(ValueError):
    """A module that looks like experts but is stored in a way that is not known: the text says what was found."""


def fused_parts(experts: nn.Module, name: str = "experts") -> tuple[Tensor, ...]:
    """Views (gate [E, f, d], up [E, f, d], down [E, d, f]) of fused expert tensors; up and down if there is no gate.

    Where the class has biases, gate_bias [E, f], up_bias [E, f] and down_bias [E, d] follow.

    The class says how they lie: `is_transposed` ([E, d, 2f] instead of [E, 2f, d]), `is_concatenated` (gate rows
    before up rows, or alternating), `has_gate`, `has_bias`. Shapes are never asked: with 2f = d they would not tell.

    Raises:
        UnknownExperts: the class does not say, or says something that is not supported.
    """
    check_layout(experts, name)
    both, down = (experts.gate_up_proj if experts.has_gate else experts.up_proj).detach(), experts.down_proj.detach()
    if experts.is_transposed:
        both, down = both.transpose(1, 2), down.transpose(1, 2)
    if not experts.has_gate:
        return both, down
    parts = (*_halves(experts, both), down)
    if experts.has_bias:
        parts += (*_halves(experts, experts.gate_up_proj_bias.detach()), experts.down_proj_bias.detach())
    return parts


def _halves(experts: nn.Module, both: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up, which share axis 1."""
    return both.chunk(2, dim=1) if experts.is_concatenated else (both[:, 0::2], both[:, 1::2])


def check_layout(experts: nn.Module, name: str) -> None:
    kind = f"{type(experts).__name__} of {name!r}"
    known = {*dict(experts.named_parameters()), *getattr(experts, "factors", ())}
    both = "up_proj" if getattr(experts, "has_gate", None) is False else "gate_up_proj"
    if not {both, "down_proj"} <= known:
        raise UnknownExperts(f"{kind} has no {both} and down_proj; its parameters are {_parameters(experts)}")
    layout = {key: getattr(experts, key, None) for key in ("is_transposed", "is_concatenated", "has_gate", "has_bias")}
    missing = [key for key, value in layout.items() if value is None]
    if missing:
        raise UnknownExperts(f"{kind} does not say how its tensors lie: it has no {', '.join(missing)}")
    if layout["has_bias"] and not layout["has_gate"]:
        raise UnknownExperts(f"{kind} has biases and no gate, which expert merging does not read")
    if layout["has_bias"] and not {"gate_up_proj_bias", "down_proj_bias"} <= known:
        raise UnknownExperts(f"{kind} says it has biases, but its parameters are {_parameters(experts)}")


def names_of(experts: nn.ModuleList | nn.ModuleDict, name: str) -> Sequence[str]:
    modules = list(experts.children())
    for names in LISTED:
        if all(isinstance(getattr(expert, key, None), nn.Linear) for expert in modules for key in names):
            biased = any(getattr(expert, key).bias is not None for expert in modules for key in names)
            if biased:
                raise UnknownExperts(f"the experts of {name!r} have biases, which expert merging does not read")
            return names
    kinds = ", ".join(sorted({type(expert).__name__ for expert in modules})) or "nothing"
    raise UnknownExperts(f"the list {name!r} holds {kinds}; known are experts with {' or '.join(map(str, LISTED))}")


def _parameters(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]
