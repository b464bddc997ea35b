"""Adapters set in the place of their hosts, and the model given back as it was before."""

import torch
from torch import nn

from notebook_kit.adapters._adapter import Adapter, adapters

# What the model was like before; kept in its __dict__, so that deepcopy carries it and state_dict does not.
_BEFORE = "_before_attach"


def place(model: nn.Module, built: dict[str, Adapter]) -> None:
    """Put adapters where their hosts stand (at every place, if a module is used in several) and freeze the rest."""
    if _BEFORE not in model.__dict__:
        model.__dict__[_BEFORE] = {
            "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
            "training": {name: module.training for name, module in model.named_modules()},
            "buffers": {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        }
    own = {id(p) for _, a in [*adapters(model), *built.items()] for p in own_parameters(a).values()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    by_host = {id(adapter.host): adapter for adapter in built.values()}
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if id(module) in by_host and parent is not by_host[id(module)]:
                parent._modules[child] = by_host[id(module)]
                if isinstance(parent, nn.TransformerEncoderLayer):
                    # Its inference fast path reads weights instead of calling its layers; a hook switches that off.
                    by_host[id(module)].register_forward_pre_hook(_nothing)


def own_parameters(adapter: Adapter) -> dict[str, nn.Parameter]:
    """An adapter's parameters by name, without its host's."""
    return {name: p for name, p in adapter.named_parameters() if not name.startswith("host.")}


def refuse_nesting(model: nn.Module) -> None:
    """Refuse a model whose adapters were attached through another root; raises ValueError."""
    inner = [name for name, module in model.named_modules() if name and _BEFORE in module.__dict__]
    if inner:
        raise ValueError(f"{inner[0]} was given to `attach` by itself: `fold` or `detach` it before the whole model")
    if _BEFORE not in model.__dict__ and next(adapters(model), None) is not None:
        raise ValueError("adapters were attached through an outer model: attach, fold and detach through that one")


def adapters_below(model: nn.Module, action: str) -> list[tuple[str, Adapter]]:
    """The model's adapters, if all of them were attached through it or through a part of it; raises ValueError."""
    found = list(adapters(model))
    if not found:
        raise ValueError(f"{type(model).__name__} carries no adapter: nothing to {action}")
    roots = [module for module in model.modules() if _BEFORE in module.__dict__]
    covered = {id(adapter) for root in roots for _, adapter in adapters(root)}
    if any(id(adapter) not in covered for _, adapter in found):
        raise ValueError(f"{found[0][0]} was attached through an outer model: {action} that one")
    return found


def restore(model: nn.Module, *, modes_and_buffers: bool) -> None:
    """Put the hosts back where they stood, and make the model trainable as it was; modes and buffers if asked."""
    for parent, child in _places(model):
        parent._modules[child] = parent._modules[child].host
    # An inner root was attached when the outer one had already frozen it: the outer one has the last word.
    for root in reversed([module for module in model.modules() if _BEFORE in module.__dict__]):
        before = root.__dict__.pop(_BEFORE)
        parameters, modules, buffers = (
            dict(each()) for each in (root.named_parameters, root.named_modules, root.named_buffers)
        )
        for name, flag in before["requires_grad"].items():
            if name in parameters:
                parameters[name].requires_grad_(flag)
        if modes_and_buffers:
            for name, flag in before["training"].items():
                if name in modules:
                    modules[name].training = flag
            for name, value in before["buffers"].items():
                if name in buffers and not torch.equal(buffers[name].cpu(), value.cpu()):
                    buffers[name].data.copy_(value)


def _places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(parent, c) for parent in model.modules() for c, m in parent._modules.items() if isinstance(m, Adapter)]


def _nothing(module: nn.Module, arguments: tuple) -> None:
    return None
