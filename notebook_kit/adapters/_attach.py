"""Put adapters into a model, fold them into its weights, take them out again."""

import difflib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from notebook_kit.adapters._adapter import Adapter, CannotFold, adapters
from notebook_kit.hyperparameters import hyperparameters, validate

Target = str | re.Pattern | Callable[[str, nn.Module], bool]

# What the model was like before; kept in its __dict__, so that deepcopy carries it and state_dict does not.
_BEFORE = "_before_attach"
SHOWN = 5


def attach(
    model: nn.Module,
    adapter: type[Adapter],
    *,
    targets: Target | Sequence[Target],
    seed: int = 0,
    **values: Any,
) -> list[str]:
    """Put an adapter around every module that matches, and freeze everything that is not an adapter.

    Args:
        model: any nn.Module, changed in place; modules of transformers' models are matched like any other.
        adapter: the adapter's class, such as `LoRA`.
        targets: a regular expression that `re.search` looks for in the full module name (r"(q|v)_proj$"), or a
            predicate (name, module) -> bool, or a list of them of which each must match something. Containers and
            modules without parameters may match too, and are passed over.
        seed: of the adapters' random initial values, which differ from module to module; the caller's random state
            is left alone.
        values: hyperparameters of the adapter; give some modules others by a second call.

    Returns:
        The names of the modules that now carry an adapter. Inside the model's state dict a host's weights are now
        called "<name>.host.weight": save the adapters (`save_peft`, `adapter_weights`), or `fold` before
        `save_pretrained`.

    Raises:
        ValueError: nothing matches (with the nearest names), a hyperparameter is wrong, or a module already carries
            an adapter.
        TypeError: a matching module has parameters but cannot be a host. Whatever is raised, nothing was changed.
    """
    if not (inspect.isclass(adapter) and issubclass(adapter, Adapter)):
        raise TypeError(f"adapter must be a class of notebook_kit.adapters such as LoRA, got {adapter!r}")
    schema, known = hyperparameters(adapter), inspect.signature(adapter).parameters
    validate(schema, {name: value for name, value in values.items() if name in schema or name not in known})
    refuse_nesting(model)
    hosts = find_hosts(model, adapter, targets)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        built = {name: _build(adapter, name, module, values) for name, module in hosts.items()}
    place(model, built)
    return list(built)


def fold(model: nn.Module) -> nn.Module:
    """Let the adapters disappear into the weights of their hosts: same outputs, and the original classes again.

    Args:
        model: the model that `attach` was called on; changed in place. Its training mode stays, and what was
            trainable before `attach` is trainable again. Sums are taken in float32 at least and rounded once to the
            host's dtype: in bfloat16 that rounding can be seen in the outputs (`diagnostics.adapters.fold_error`).

    Returns:
        The same model.

    Raises:
        CannotFold: an adapter has no weight-space form, or its host's weight is shared with another module.
        ValueError: there is no adapter, or a folded weight would hold NaN or Inf. Nothing is changed then.
    """
    found = _adapters_below(model, "fold")
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, adapter in found:
        for key in _folded(name, adapter):
            if holders[id(getattr(adapter.host, key))] > uses[id(adapter)]:
                raise CannotFold(
                    f"{name}: its {key} is shared with another module, which folding would change too; give the host a "
                    "copy of its own before `attach`"
                )
    for name, adapter in found:
        for key, tensor in _folded(name, adapter).items():
            # A new parameter: whoever holds the old tensor, a state dict for example, keeps it unchanged.
            setattr(adapter.host, key, nn.Parameter(tensor, requires_grad=False))
    _restore(model, modes_and_buffers=False)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take all adapters out and give the original model back, bit for bit.

    Args:
        model: the model that `attach` was called on; changed in place. Hosts, requires_grad flags, training modes
            and buffers (running statistics move while adapters train) are again what they were. Parameters that you
            unfroze and trained yourself stay trained.

    Returns:
        The same model.

    Raises:
        ValueError: there is no adapter.
    """
    _adapters_below(model, "detach")
    _restore(model, modes_and_buffers=True)
    return model


def find_hosts(model: nn.Module, adapter: type[Adapter], targets: Target | Sequence[Target]) -> dict[str, nn.Module]:
    """Resolve targets to hosts by name, each once; raises as `attach` does."""
    single = isinstance(targets, (str, re.Pattern)) or callable(targets)
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if not _inside_adapter(model, name)}
    modules.pop("", None)
    chosen: set[int] = set()
    for target in [targets] if single else list(targets):
        matched = {name: module for name, module in modules.items() if _matches(target, name, module)}
        if not matched:
            raise ValueError(_no_match(model, adapter, target, modules))
        hosts = {name: module for name, module in matched.items() if adapter.supports(module)}
        _check_matched(model, adapter, target, matched, hosts)
        chosen |= {id(module) for module in hosts.values()}
    if not chosen:
        raise ValueError("targets must hold at least one pattern, got an empty list")
    return {name: module for name, module in model.named_modules() if id(module) in chosen}


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


def _nothing(module: nn.Module, arguments: tuple) -> None:
    return None


def _build(adapter: type[Adapter], name: str, host: nn.Module, values: dict[str, Any]) -> Adapter:
    try:
        built = adapter(host, **values)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from error
    for child in built.children():
        if child is not host:
            child.train(host.training)
    return built


def _matches(target: Target, name: str, module: nn.Module) -> bool:
    if isinstance(target, (str, re.Pattern)):
        try:
            return re.search(target, name) is not None
        except re.error as error:
            raise ValueError(f"targets must be a regular expression, got {target!r}: {error}") from None
    if not callable(target):
        raise TypeError(f"a target must be a regular expression or a predicate, got {target!r}")
    return bool(target(name, module))


def _inside_adapter(model: nn.Module, name: str) -> bool:
    parents = name.split(".")[:-1]
    return any(isinstance(model.get_submodule(".".join(parents[:i])), Adapter) for i in range(1, len(parents) + 1))


def _check_matched(model: nn.Module, adapter: type[Adapter], target: Target, matched: dict, hosts: dict) -> None:
    for name, module in matched.items():
        if isinstance(module, Adapter):
            raise ValueError(f"{name} already carries {type(module).__name__}: `fold` or `detach` it first")
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise TypeError(
                f"{name}: nn.MultiheadAttention reads its weight and never calls it, so an adapter has no effect there"
            )
        if name not in hosts and next(module.parameters(recurse=False), None) is not None:
            hint = "narrow the pattern, or use a predicate (name, module) -> bool"
            raise TypeError(_unsupported(adapter, target, name, module, hint))
    if not hosts:
        first, module = next(iter(matched.items()))
        inner = [f"{first}.{name}" for name, child in module.named_modules() if name and adapter.supports(child)]
        hint = f"inside it: {', '.join(inner[:SHOWN])}" if inner else "nothing inside it is one"
        raise TypeError(_unsupported(adapter, target, first, module, hint))


def _unsupported(adapter: type[Adapter], target: Target, name: str, module: nn.Module, hint: str) -> str:
    kind = type(module).__name__
    return f"{_show(target)} matches {name}, of type {kind}; {adapter.__name__} sits on {adapter.hosts}; {hint}"


def _no_match(model: nn.Module, adapter: type[Adapter], target: Target, modules: dict[str, nn.Module]) -> str:
    leaves: dict[str, str] = {}
    for name, module in modules.items():
        if adapter.supports(module):
            leaves.setdefault(name.rpartition(".")[2], name)
    text = f"no module of {type(model).__name__} matches {_show(target)}"
    if not leaves:
        return f"{text}, and none can carry {adapter.__name__}, which sits on {adapter.hosts}"
    near = []
    if isinstance(target, (str, re.Pattern)):
        pattern = target if isinstance(target, str) else target.pattern
        for word in re.findall(r"\w+", re.sub(r"\\[a-zA-Z]|[()]", "", pattern)):
            near += difflib.get_close_matches(word, leaves, n=2, cutoff=0.5)
    found = [leaves[leaf] for leaf in dict.fromkeys(near or leaves)][:SHOWN]
    return f"{text}; {'near it' if near else 'it has'}: {', '.join(found)}"


def _show(target: Target) -> str:
    if isinstance(target, (str, re.Pattern)):
        return repr(target if isinstance(target, str) else target.pattern)
    return f"the predicate {getattr(target, '__name__', target)}"


def refuse_nesting(model: nn.Module) -> None:
    """Refuse a model whose adapters were attached through another root; raises ValueError."""
    inner = [name for name, module in model.named_modules() if name and _BEFORE in module.__dict__]
    if inner:
        raise ValueError(f"{inner[0]} was given to `attach` by itself: `fold` or `detach` it before the whole model")
    if _BEFORE not in model.__dict__ and next(adapters(model), None) is not None:
        raise ValueError("adapters were attached through an outer model: attach, fold and detach through that one")


def _adapters_below(model: nn.Module, action: str) -> list[tuple[str, Adapter]]:
    found = list(adapters(model))
    if not found:
        raise ValueError(f"{type(model).__name__} carries no adapter: nothing to {action}")
    roots = [module for module in model.modules() if _BEFORE in module.__dict__]
    covered = {id(adapter) for root in roots for _, adapter in adapters(root)}
    if any(id(adapter) not in covered for _, adapter in found):
        raise ValueError(f"{found[0][0]} was attached through an outer model: {action} that one")
    return found


def _folded(name: str, adapter: Adapter) -> dict[str, Tensor]:
    """The host's parameters with the adapter in them, in the host's dtypes."""
    try:
        change = adapter.delta()
    except CannotFold as error:
        raise CannotFold(f"{name}: {error}") from error
    result = {}
    for key, delta in change.items():
        old = getattr(adapter.host, key).detach()
        result[key] = (old.to(delta.dtype) + delta).to(old.dtype)
        if not torch.isfinite(result[key]).all():
            raise ValueError(f"{name}: the folded {key} would hold NaN or Inf in {old.dtype}")
    return result


def _places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(parent, c) for parent in model.modules() for c, m in parent._modules.items() if isinstance(m, Adapter)]


def _restore(model: nn.Module, *, modes_and_buffers: bool) -> None:
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
