"""Switch Transformers' router in transformers speaks of tokens in sequences; here it is read as every other router."""

import re

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from notebook_kit.routing.trace import RoutingTrace

ROUTER = "SwitchTransformersTop1Router"
Decision = tuple[Float[Tensor, "tokens experts"], Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]


def is_switch_router(module: object) -> bool:
    """Whether a module is Switch Transformers' top-1 router, or a subclass of it."""
    return any(cls.__name__ == ROUTER for cls in type(module).__mro__)


def switch_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the routers of a Switch Transformers model by the name of the block they belong to, encoder first."""
    blocks = ((name, getattr(block, "router", None)) for name, block in model.named_modules())
    return {name: router for name, router in blocks if is_switch_router(router)}


def stack_of(name: str) -> str:
    """The encoder or the decoder that a block named so is part of, such as "decoder"; "" if it is in neither."""
    found = re.match(r"(?:.*\.)?(?:encoder|decoder)(?=\.block\.)", name)
    return found[0] if found else ""


def switch_decision(output: tuple[Tensor, Tensor, Tensor]) -> Decision:
    """Read what a Switch router returned: logits, and the weight and the number of the one expert of each token.

    A token that its expert had no capacity for has expert -1 and weight 0: its block adds nothing.

    Args:
        output: dispatch mask [n, length, experts], one 1 in a row or none; the largest probability [n, length, 1];
            logits [n, length, experts].
    """
    mask, weights, logits = (part.flatten(0, -2) for part in output)
    served = mask.sum(-1, keepdim=True) > 0
    return logits, weights * served, torch.where(served, mask.argmax(-1, keepdim=True), -1)


def heard_by(trace: RoutingTrace, layer: int) -> Bool[Tensor, " tokens"]:
    """Which tokens of a trace passed a layer: in a trace of an encoder and a decoder, those with any logit but 0."""
    logits = trace.layer_logits(layer)
    return logits.any(1) if stack_of(trace.layers[layer]) else torch.ones(len(logits), dtype=torch.bool)
