"""What experts receive and what they compute: the evidence that grouping by outputs needs."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from notebook_kit.expert_merging.view import PARTS, ExpertLayer, expert_view
from notebook_kit.routing import RoutingTrace
from notebook_kit.weights import at_least_float32

CHUNK = 1024  # tokens that run through the experts at a time
Inputs = dict[str, tuple[Float[Tensor, "tokens d"], Int[Tensor, "tokens k"]]]


def hidden_units(
    layer: ExpertLayer, weights: Mapping[str, Tensor], x: Float[Tensor, "tokens d"]
) -> Float[Tensor, "tokens f"]:
    """What an expert's `down` reads: act(gate x) * up x, or the gating of the architecture's own.

    Args:
        layer: whose gating is used.
        weights: gate, up and their biases if there are any.
        x: inputs.
    """
    gate, up = x @ weights["gate"].T, x @ weights["up"].T
    if "gate_bias" in weights:
        gate, up = gate + weights["gate_bias"], up + weights["up_bias"]
    if layer.signed:
        return _activation(layer)(gate) * up
    laid = (gate, up) if layer.experts.is_concatenated else (torch.stack((gate, up), -1).flatten(-2),)
    return layer.experts._apply_gate(torch.cat(laid, -1))


def expert_output(
    layer: ExpertLayer, weights: Mapping[str, Tensor], x: Float[Tensor, "tokens d"]
) -> Float[Tensor, "tokens d"]:
    """Run one expert: down · hidden units (+ bias)."""
    y = hidden_units(layer, weights, x) @ weights["down"].T
    return y + weights["down_bias"] if "down_bias" in weights else y


def expert_outputs(layer: ExpertLayer, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "experts tokens d"]:
    """Run every stored expert on every token, routed to it or not."""
    x = at_least_float32(x)

    def run(e: int) -> Tensor:  # one expert in float32 at a time
        return expert_output(layer, dict(zip(PARTS, map(at_least_float32, layer.expert(e)), strict=False)), x)

    return torch.stack([run(e) for e in range(len(layer))])


@torch.no_grad()
def output_statistics(
    layer: ExpertLayer, x: Float[Tensor, "tokens d"], *, chunk: int = CHUNK
) -> tuple[Float[Tensor, "experts experts"], Float[Tensor, "experts d"]]:
    """How alike experts' outputs are, every expert run on every token.

    Args:
        layer: from `expert_view`.
        x: what its experts receive, [T, d].
        chunk: tokens that run at a time; every expert is read once for each chunk.

    Returns:
        Sim_ij = 1/T Σ_t cos(E_i(x_t), E_j(x_t)) in [−1, 1], and the mean outputs o_i = 1/T Σ_t E_i(x_t).
    """
    cosine, mean = 0, 0
    for piece in x.split(max(chunk, CHUNK)):
        outputs = expert_outputs(layer, piece)
        unit = nn.functional.normalize(outputs, dim=-1).flatten(1)
        cosine, mean = cosine + unit @ unit.T, mean + outputs.sum(1)
    return (cosine / len(x)).clamp(-1, 1), mean / len(x)


def calibration_inputs(
    model: nn.Module, trace: RoutingTrace, batches: Iterable | None, *, most: int | None = None
) -> Inputs:
    """What every layer's experts receive: on given batches, or on the very text of the trace.

    Args:
        model: that the trace was recorded on.
        trace: holds the token ids that are run again when there are no batches.
        batches: as `expert_inputs`; None for the trace's text.
        most: keep this many tokens, evenly spaced.

    Raises:
        ValueError: no batches, and no token ids in the trace either.
    """
    inputs = expert_inputs(model, trace_batches(trace) if batches is None else batches)
    if most is None:
        return inputs
    total = len(next(iter(inputs.values()))[0])
    kept = torch.linspace(0, total - 1, min(most, total)).round().long()
    return {name: (x[kept], chosen[kept]) for name, (x, chosen) in inputs.items()}


def trace_batches(trace: RoutingTrace) -> list[dict[str, Int[Tensor, "n length"]]]:
    """The text of a trace as batches of sequences of one length.

    Raises:
        ValueError: the trace is empty or has no token ids.
    """
    if (trace.tokens < 0).any():
        raise ValueError("the trace has no token ids, so its inputs cannot be run again: give batches=...")
    order = torch.argsort(trace.sequences * (int(trace.positions.max()) + 1) + trace.positions)
    lengths = torch.unique_consecutive(trace.sequences[order], return_counts=True)[1].tolist()
    by_length: dict[int, list[Tensor]] = {}
    for sequence in trace.tokens[order].split(lengths):
        by_length.setdefault(len(sequence), []).append(sequence)
    stacks = [torch.stack(rows) for rows in by_length.values()]
    return [{"input_ids": part} for stack in stacks for part in stack.split(64)]


@torch.no_grad()
def expert_inputs(model: nn.Module, batches: Iterable) -> Inputs:
    """What every routed layer's experts receive.

    Args:
        model: a transformers mixture of experts, or a module whose router returns (logits, weights, experts).
        batches: tensors or mappings of keyword arguments.

    Returns:
        Block name to (hidden states, chosen experts), all batches together.

    Raises:
        ValueError: no batches.
    """
    seen: dict[str, list] = {layer.name: [] for layer in expert_view(model)}
    handles = []
    for layer in expert_view(model):

        def heard(module, args, output, name=layer.name):
            chosen = output[2] if isinstance(output, tuple) else output.experts
            seen[name].append((args[0].detach().reshape(-1, args[0].shape[-1]), chosen.detach()))

        handles.append(layer.router_module.register_forward_hook(heard))
    try:
        for batch in batches:
            model(**batch) if hasattr(batch, "keys") else model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not all(seen.values()):
        raise ValueError("experts need at least one batch to be run on, got none (was a generator already used up?)")
    return {name: tuple(map(torch.cat, zip(*calls, strict=True))) for name, calls in seen.items()}


def _activation(layer: ExpertLayer):
    one = layer.experts if layer.fused else layer.experts[0]
    act = getattr(one, "act_fn", None)
    if act is None:
        raise ValueError(f"{type(one).__name__} of {layer.name!r} has no act_fn: activation alignment cannot run it")
    return act
