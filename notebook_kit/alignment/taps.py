"""Where the units of a permutation can be watched in a network, and a run that keeps what passes there."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.alignment.spec import Part, PermutationSpec

LAYERS = (nn.Linear, nn.Conv2d)
Key = tuple[str, ...]
Place = tuple[Key, Part, list[Part]]


def places_of(spec: PermutationSpec, model: nn.Module) -> dict[str, list[Place]]:
    """For each permutation where its entries are watched: (what is watched, part, parts that come before it there).

    The input of the layer that reads the units where there is one (for fused experts their hidden activations), else
    the output of the layer that makes them.
    """
    modules, found, blind = dict(model.named_modules()), {}, []
    for perm in spec.sizes:
        sides: dict[str, list[Place]] = {"input": [], "output": []}
        outer = spec.inside.get(perm, (None,))[0]
        for name, axis, part in spec.uses[perm]:
            parts = spec.axes[name][axis]
            # Entries that others reorder inside have no order of their own to be compared in.
            if any(spec.inside.get(other.perm, ("",))[0] == perm for other in parts):
                continue
            before = [other for other in parts if other.perm == outer]
            module, leaf = name.rsplit(".", 1) if "." in name else ("", name)
            if part.slice is not None and leaf == "down_proj" and hasattr(modules[module], "act_fn"):
                sides["input"].append((("expert", module, str(part.slice[1])), replace(part, slice=None), before))
            # An expert in a list sees other tokens in each model: its rows cannot be paired.
            elif leaf == "weight" and isinstance(modules.get(module), LAYERS) and ".experts." not in module:
                side = "input" if axis == 1 else "output"
                sides[side].append(((side, module), part, before))
        found[perm] = sides["input"] or sides["output"]
        if not found[perm]:
            blind.append(perm)
    if blind:
        raise ValueError(
            f"activation_matching cannot capture the activations of {', '.join(blind[:5])} in {type(model).__name__}: "
            "it watches nn.Linear and nn.Conv2d layers and fused experts; use weight_matching, or a spec without them"
        )
    return found


def features_at(key: Key, models: tuple[nn.Module, nn.Module], seen: tuple[dict, dict]) -> list[Tensor]:
    """What was seen at one place in both models, [N, features]."""
    if key[0] != "expert":
        return [one[key] for one in seen]
    _, name, e = key
    # Hidden activations on the tokens that either model routes to this expert.
    routed = torch.stack([(one["chosen", name] == int(e)).any(-1) for one in seen]).any(0)
    return [
        hidden_activations(model.get_submodule(name), int(e), one["experts", name][routed])
        for model, one in zip(models, seen, strict=True)
    ]


def watch(model: nn.Module, batch, taps: Iterable[Key]) -> dict[Key, Tensor]:
    """Run a model on one batch and keep what passes the taps."""
    seen: dict[Key, Tensor] = {}

    def keep_input(key):
        def hook(module, args, kwargs):
            inputs = (*args, *kwargs.values())
            seen[key] = rows_of(module, inputs[0])
            if key[0] == "experts":
                seen["chosen", key[1]] = inputs[1]

        return hook

    def keep_output(key):
        return lambda module, args, output: seen.__setitem__(key, rows_of(module, output))

    keys = {key if key[0] != "expert" else ("experts", key[1]) for key in taps}
    modules = dict(model.named_modules())
    handles = [
        modules[key[1]].register_forward_hook(keep_output(key))
        if key[0] == "output"
        else modules[key[1]].register_forward_pre_hook(keep_input(key), with_kwargs=True)
        for key in keys
    ]
    with listening(model, handles):
        run(model, batch)
    return seen


@contextmanager
def listening(model: nn.Module, handles: Iterable) -> Iterator[None]:
    """Run a model in evaluation mode with hooks; afterwards its modes are what they were, and the hooks are gone.

    Args:
        model: to be run.
        handles: of its hooks.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()


def each(batches: Iterable, owner: str) -> Iterator:
    """Give batches one by one, and refuse what is none.

    Args:
        batches: tensors, or mappings of keyword arguments.
        owner: the function that was called, for error texts.

    Raises:
        TypeError: one batch in place of several.
        ValueError: no batches, or one without rows.
    """
    if isinstance(batches, Tensor) or hasattr(batches, "keys"):
        raise TypeError(f"batches must be a list of batches, got one {type(batches).__name__}: pass [batch] ({owner})")
    n = 0
    for batch in batches:
        tensors = batch.values() if hasattr(batch, "keys") else (batch,)
        if any(isinstance(tensor, Tensor) and tensor.numel() == 0 for tensor in tensors):
            raise ValueError(f"batch {n} is empty ({owner})")
        yield batch
        n += 1
    if n == 0:
        raise ValueError(f"{owner} needs at least one batch, got none (was a generator already used up?)")


def run(model: nn.Module, batch) -> None:
    """Call a model on a batch: a tensor, or a mapping of keyword arguments."""
    model(**batch) if hasattr(batch, "keys") else model(batch)


def rows_of(module: nn.Module, z: Tensor) -> Float[Tensor, "n features"]:
    """Features as columns; each place of a convolution's maps [n, c, h, w] is a row of its own."""
    z = z.detach()
    z = z.movedim(1, -1) if isinstance(module, nn.Conv2d) else z
    return z.reshape(-1, z.shape[-1])


def hidden_activations(experts: nn.Module, e: int, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens f"]:
    """act(gate·x) * (up·x) of one expert of a fused module."""
    gate, up = nn.functional.linear(x, experts.gate_up_proj[e]).chunk(2, dim=-1)
    return experts.act_fn(gate) * up
