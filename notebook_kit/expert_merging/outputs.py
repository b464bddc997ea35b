"""What experts receive and what they compute: the evidence that grouping by outputs needs."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from notebook_kit.alignment.taps import each, listening, run
from notebook_kit.expert_merging.plan import check_trace
from notebook_kit.expert_merging.view import ExpertLayer, expert_view
from notebook_kit.routing import RoutingTrace
from notebook_kit.routing.switch import heard_by, is_switch_router, stack_of, switch_decision
from notebook_kit.weights import at_least_float32

CHUNK = 1024  # tokens that run through the experts at a time
Inputs = dict[str, tuple[Float[Tensor, "tokens d"], Int[Tensor, "tokens k"]]]


def hidden_units(
    layer: ExpertLayer, weights: Mapping[str, Tensor], x: Float[Tensor, "tokens d"]
) -> Float[Tensor, "tokens f"]:
    """What an expert's `down` reads: act(gate x) * up x, the gating of the architecture's own, or act(up x).

    Args:
        layer: whose gating is used.
        weights: gate, up and their biases if there are any.
        x: inputs.
    """
    if not layer.gated:
        return _activation(layer)(x @ weights["up"].T)
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
        return expert_output(layer, dict(zip(layer.parts, map(at_least_float32, layer.expert(e)), strict=True)), x)

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

    Raises:
        ValueError: an output is NaN or infinite.
    """
    cosine, mean = 0, 0
    for piece in x.split(max(chunk, CHUNK)):
        outputs = expert_outputs(layer, piece)
        unit = nn.functional.normalize(outputs, dim=-1).flatten(1)
        cosine, mean = cosine + unit @ unit.T, mean + outputs.sum(1)
    if not (torch.isfinite(cosine).all() and torch.isfinite(mean).all()):
        raise ValueError(f"outputs of the experts of {layer.name!r} hold NaN or Inf: is the model broken?")
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
    inputs = expert_inputs(model, trace_batches(trace, next(model.parameters()).device) if batches is None else batches)
    if most is None:
        return inputs
    thinned = {}
    for name, (x, chosen) in inputs.items():  # an encoder and a decoder may have different numbers
        kept = torch.linspace(0, len(x) - 1, min(most, len(x))).round().long()
        thinned[name] = (x[kept], chosen[kept])
    return thinned


def trace_batches(trace: RoutingTrace, device: torch.device | str = "cpu") -> list[dict[str, Int[Tensor, "n length"]]]:
    """The text of a trace as batches of sequences of one length; of an encoder and a decoder, as batches of pairs.

    Args:
        trace: holds the token ids.
        device: where the batches shall be.

    Raises:
        ValueError: the trace is empty or has no token ids, or its encoder and decoder read different numbers of texts.
    """
    check_trace(trace)
    if (trace.tokens < 0).any():
        raise ValueError("the trace has no token ids, so its inputs cannot be run again: give batches=...")
    order = torch.argsort(trace.sequences * (int(trace.positions.max()) + 1) + trace.positions)
    lengths = torch.unique_consecutive(trace.sequences[order], return_counts=True)[1].tolist()
    texts = {"input_ids": trace.tokens[order].split(lengths)}
    if stack_of(trace.layers[0]):
        texts = _pairs(trace, order, lengths)
    by_length: dict[tuple[int, ...], list[tuple[Tensor, ...]]] = {}
    for row in zip(*texts.values(), strict=True):
        by_length.setdefault(tuple(map(len, row)), []).append(row)
    batches = []
    for rows in by_length.values():
        columns = (torch.stack(column).to(device).split(64) for column in zip(*rows, strict=True))
        batches += [dict(zip(texts, parts, strict=True)) for parts in zip(*columns, strict=True)]
    return batches


def _pairs(trace: RoutingTrace, order: Int[Tensor, " tokens"], lengths: list[int]) -> dict[str, list[Tensor]]:
    """What the encoder read and what the decoder read, told apart by which layers heard them."""
    heard = [heard_by(trace, i) for i, name in enumerate(trace.layers) if stack_of(name).endswith("encoder")]
    by_encoder = heard[0] if heard else torch.zeros(len(trace), dtype=torch.bool)
    source, target = [], []
    for rows in order.split(lengths):
        (source if by_encoder[rows[0]] else target).append(trace.tokens[rows])
    if len(source) != len(target):
        raise ValueError(
            f"the trace has {len(source)} texts of the encoder and {len(target)} of the decoder, which make no pairs: "
            "give batches=..."
        )
    return {"input_ids": source, "decoder_input_ids": target}


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
            if is_switch_router(module):
                output = switch_decision(output)
            chosen = output[2] if isinstance(output, tuple) else output.experts
            seen[name].append((args[0].detach().reshape(-1, args[0].shape[-1]), chosen.detach()))

        handles.append(layer.router_module.register_forward_hook(heard))
    with listening(model, handles):
        for batch in each(batches, "expert_inputs"):
            run(model, batch)
    return {name: tuple(map(torch.cat, zip(*calls, strict=True))) for name, calls in seen.items()}


def _activation(layer: ExpertLayer):
    one = layer.experts if layer.fused else next(layer.experts.children())
    act = getattr(one, "act_fn", getattr(one, "act", None))
    if act is None:
        raise ValueError(
            f"{type(one).__name__} of {layer.name!r} has no act_fn or act: activation alignment cannot run it"
        )
    return act
