"""Put adapters into a model, fold them into its weights, take them out again."""

import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from notebook_kit.adapters._adapter import Adapter, CannotFold
from notebook_kit.adapters._place import adapters_below, place, refuse_nesting, restore
from notebook_kit.adapters._targets import Target, find_hosts
from notebook_kit.hyperparameters import hyperparameters, validate


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
    built = build_all(model, adapter, targets=targets, seed=seed, values=values)
    place(model, built)
    return list(built)


def build_all(
    model: nn.Module, adapter: type[Adapter], *, targets: Target | Sequence[Target], seed: int, values: dict[str, Any]
) -> dict[str, Adapter]:
    """Make the adapters that `attach` would place, by the names of their hosts; the model is not changed."""
    if not (inspect.isclass(adapter) and issubclass(adapter, Adapter)):
        raise TypeError(f"adapter must be a class of notebook_kit.adapters such as LoRA, got {adapter!r}")
    schema, known = hyperparameters(adapter), inspect.signature(adapter).parameters
    validate(schema, {name: value for name, value in values.items() if name in schema or name not in known})
    refuse_nesting(model)
    hosts = find_hosts(model, adapter, targets)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return {name: _build(adapter, name, module, values) for name, module in hosts.items()}


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
    found = adapters_below(model, "fold")
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
    restore(model, modes_and_buffers=False)
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
    adapters_below(model, "detach")
    restore(model, modes_and_buffers=True)
    return model


def _build(adapter: type[Adapter], name: str, host: nn.Module, values: dict[str, Any]) -> Adapter:
    try:
        built = adapter(host, **values)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from error
    for child in built.children():
        if child is not host:
            child.train(host.training)
    return built


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
