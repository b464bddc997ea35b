"""Which modules `attach` means: targets resolved to hosts, and an answer that helps where there are none."""

import difflib
import re
from collections.abc import Callable, Sequence

from torch import nn

from notebook_kit.adapters._adapter import Adapter

Target = str | re.Pattern | Callable[[str, nn.Module], bool]
SHOWN = 5


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
        chosen |= {id(module) for name, module in hosts.items() if not _any_inside(name, hosts)}
    if not chosen:
        raise ValueError("targets must hold at least one pattern, got an empty list")
    return {name: module for name, module in model.named_modules() if id(module) in chosen}


def _any_inside(name: str, hosts: dict[str, nn.Module]) -> bool:
    # A sub-layer and layers inside it: the pattern means the layers.
    return any(other.startswith(f"{name}.") for other in hosts)


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
