"""Put a router of the kit into a transformers mixture of experts, and take it out again."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from notebook_kit.hyperparameters import hyperparameters, validate
from notebook_kit.routers.loss_free_bias import LossFreeBias
from notebook_kit.routers.router import Router
from notebook_kit.routing import transformers_gates


def install(
    model: nn.Module,
    router: type[Router],
    layers: Sequence[int] | None = None,
    *,
    allow_noncausal: bool = False,
    **hyperparameter_values,
) -> list[str]:
    """Route a transformers model by a router of the kit, with the gate weights that the model was trained with.

    The gate module stays where it is, with its weight under its old name: it only decides differently. What the
    architecture does with the gate's answer stays too (DeepSeek's scaling factor, shared experts). Padding is not
    known to a gate, so padding tokens take part in capacities and losses. `LossFreeBias` in a DeepSeek-V3 gate reads,
    and in training moves, the gate's own bias (`e_score_correction_bias`).

    Args:
        model: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek, or alike; changed in place.
        router: a class such as `TopK`.
        layers: which routed layers, counted from 0; None is all.
        allow_noncausal: let a router look at later tokens inside a causal model.
        hyperparameter_values: of the router. `k`, `normalize` and the groups of `LossFreeBias` come from the model
            where they are not given (normalize only if no convention is given either). A `seed` counts up with
            the layers, so that routers that draw do not all draw alike.

    Returns:
        Names of the blocks that now route by it.

    Raises:
        ValueError: no routed layers, an unknown layer, Llama 4's gates, a router that needs token ids, a non-causal
            router in a causal model, hyperparameters out of range; the model is unchanged then.
    """
    gates = _gates(model)
    names = list(gates)
    chosen = range(len(names)) if layers is None else layers
    for layer in chosen:
        if not 0 <= layer < len(names):
            raise ValueError(f"layers must be in [0, {len(names) - 1}], got {layer} (install)")
    if router.needs_tokens:
        raise ValueError(
            f"{router.__name__} routes by token ids, and a gate inside {type(model).__name__} never sees them; build "
            "the layer with `MoE`, or route a recorded trace by `reroute`"
        )
    validate(hyperparameters(router), hyperparameter_values)
    made = {names[layer]: _make(router, gates[names[layer]], hyperparameter_values, layer) for layer in chosen}
    if not all(new.causal for new in made.values()) and not allow_noncausal and _is_causal(model):
        raise ValueError(
            f"{router.__name__} lets a token's routing depend on later tokens, and {type(model).__name__} is causal: "
            "training would leak the future, and generation differ from it; allow_noncausal=True installs it anyway"
        )
    for name, new in made.items():
        _take_out(gates[name])
        _put_in(gates[name], new)
    return list(made)


def uninstall(model: nn.Module) -> list[str]:
    """Give every gate its own decision back; weights were never copied, so the model is what it was.

    Args:
        model: after `install`.

    Returns:
        Names of the blocks that were changed back.

    Raises:
        ValueError: nothing is installed.
    """
    names = [name for name, gate in _gates(model).items() if _take_out(gate)]
    if not names:
        raise ValueError(f"no router is installed in {type(model).__name__}")
    return names


def _gates(model: nn.Module) -> dict[str, nn.Module]:
    gates = transformers_gates(model)
    if not gates:
        raise ValueError(
            f"no routed layer in {type(model).__name__}: looked for transformers blocks with `experts` and a router "
            "named `gate` or `router` that has `top_k` (Mixtral, Qwen-MoE, OLMoE, DeepSeek)"
        )
    return gates


def _is_causal(model: nn.Module) -> bool:
    return any(getattr(module, "is_causal", False) for module in model.modules())


def _make(router: type[Router], gate: nn.Module, values: dict, layer: int) -> Router:
    if type(gate).__name__.startswith("Llama4"):
        raise ValueError(
            "Llama 4 multiplies the experts' inputs by its gate's dense scores; a router of the kit weighs outputs, so "
            "it cannot be installed there"
        )
    known = hyperparameters(router)
    own = {"k": gate.top_k} if "k" in known else {}
    if "normalize" in known and "convention" not in values:
        own["normalize"] = bool(getattr(gate, "norm_topk_prob", "DeepseekV2" not in type(gate).__name__))
    if "seed" in known:
        own["seed"] = values.get("seed", known["seed"].default or 0) + layer
        values = {name: value for name, value in values.items() if name != "seed"}
    if {"n_group", "topk_group"} <= set(known) and not {"n_group", "topk_group"} & set(values):
        own["n_group"] = getattr(gate, "num_group", None) or getattr(gate, "n_group", None) or 1
        own["topk_group"] = getattr(gate, "topk_group", None) or 1
    n_experts, d_model = gate.weight.shape
    with torch.random.fork_rng(devices=[]):
        made = router(d_model, n_experts, **(own | values))
    made.adopt(gate.weight)
    # The gate keeps the only registered weight, and bias; the router is handed them before each call.
    del made._parameters["weight"]
    if isinstance(made, LossFreeBias) and hasattr(gate, "e_score_correction_bias"):
        del made._buffers["bias"]
    return made.to(gate.weight.device, gate.weight.dtype).train(gate.training)


def _put_in(gate: nn.Module, router: Router) -> None:
    if "forward" in vars(gate):
        raise ValueError(f"another library replaced the forward of {type(gate).__name__}; take that out first")
    gate.add_module("installed", router)
    # Bound to the module by partial, not by closure, so that a deep copy of the model routes by its own copy.
    gate.forward = functools.partial(_routed_forward, gate)


def _take_out(gate: nn.Module) -> bool:
    if "installed" not in gate._modules:
        return False
    del gate._modules["installed"], gate.forward
    gate.__dict__.pop("routing", None)
    return True


def _routed_forward(gate: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What transformers 5 expects of a gate: logits, weights, experts."""
    router = gate.installed
    # Whatever the weight is now: after load_state_dict, .to, or inside torch.func.functional_call.
    object.__setattr__(router, "weight", gate.weight)
    if isinstance(router, LossFreeBias) and "bias" not in router._buffers:
        object.__setattr__(router, "bias", gate.e_score_correction_bias)
    x = hidden_states.reshape(-1, gate.weight.shape[1])
    # DeepSeek's gates alone compute their logits in float32.
    if type(gate).__name__.startswith("Deepseek") and x.dtype != torch.float32:
        x = x.float()
        object.__setattr__(router, "weight", gate.weight.float())
    gate.routing = routing = router(x)
    scale = getattr(gate, "routed_scaling_factor", 1.0)
    # Experts' code indexes with what it gets: an unused slot becomes expert 0 with weight 0.
    return routing.logits, routing.weights * scale, routing.experts.clamp_min(0)
