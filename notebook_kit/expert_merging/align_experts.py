"""Experts brought into one order before they are averaged: Git Re-Basin on three matrices."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from notebook_kit.alignment import Part, Permutations, PermutationSpec, match_features, permute, weight_matching
from notebook_kit.expert_merging.plan import Combine, Expert
from notebook_kit.expert_merging.view import ExpertLayer, expert_view
from notebook_kit.weights import at_least_float32


def expert_spec(f: int) -> PermutationSpec:
    """One gated expert: gate rows, up rows and down columns move together; up and down share a sign.

    Args:
        f: hidden units.
    """
    signed = Part("units", signs=(True,))
    axes = {"gate": ("units", None), "up": (signed, None), "down": (None, signed)}
    return PermutationSpec(axes, {"units": f}, description="gated expert")


def expert_of(layer: ExpertLayer, e: int) -> dict[str, Tensor]:
    """Gate, up and down of one expert as a state dict, in float32 at least."""
    return dict(zip(("gate", "up", "down"), map(at_least_float32, layer.expert(e)), strict=True))


class Aligner:
    """Aligns experts of a layer to one another, and remembers the permutation of every pair it has matched.

    Args:
        how: "none", "weight" or "activation".
        signs: use the free sign of gated units.
        inputs: block name to (hidden states [T, d], chosen experts [T, k]), for "activation".
    """

    def __init__(self, how: str = "weight", *, signs: bool = True, inputs: dict | None = None):
        if how == "activation" and inputs is None:
            raise ValueError('align="activation" needs batches=...: inputs to run the model on')
        self.how, self.signs, self.inputs = how, signs, inputs
        self._known: dict[tuple[str, int, int], Permutations] = {}

    def __call__(self, layer: ExpertLayer, e: int, leader: int) -> dict[str, Tensor]:
        """Expert e in the order of expert `leader`; the same function."""
        b = expert_of(layer, e)
        if self.how == "none" or e == leader:
            return b
        spec, key = expert_spec(len(b["gate"])), (layer.name, e, leader)
        if key not in self._known:
            a = expert_of(layer, leader)
            if self.how == "weight":
                self._known[key] = weight_matching(spec, a, b, signs=self.signs)
            else:
                x, chosen = self.inputs[layer.name]
                x = at_least_float32(x[((chosen == e) | (chosen == leader)).any(-1)])
                act = _activation(layer)
                z_a, z_b = (act(x @ w["gate"].T) * (x @ w["up"].T) for w in (a, b))
                self._known[key] = match_features(z_a, z_b, "units", signs=self.signs)
        return permute(spec, self._known[key], b)


def average_group(aligner: Aligner) -> Combine:
    """Combine a group by W = Σ_i w_i · π_i(W_i), every member first brought into the order of the group's first.

    Args:
        aligner: how members are brought into that order.
    """

    def combine(layer: ExpertLayer, group: tuple[int, ...], weights: tuple[float, ...]) -> Expert:
        total = {name: torch.zeros_like(tensor) for name, tensor in expert_of(layer, group[0]).items()}
        for e, weight in zip(group, weights, strict=True):
            if weight == 0:
                continue
            for name, tensor in aligner(layer, e, group[0]).items():
                total[name] += weight * tensor
        return total["gate"], total["up"], total["down"]

    return combine


@torch.no_grad()
def expert_inputs(
    model: nn.Module, batches: Iterable
) -> dict[str, tuple[Float[Tensor, "tokens d"], Int[Tensor, "tokens k"]]]:
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
        gate = getattr(layer.block, "gate", None) or layer.block.router

        def heard(module, args, output, name=layer.name):
            chosen = output[2] if isinstance(output, tuple) else output.experts
            seen[name].append((args[0].detach().reshape(-1, args[0].shape[-1]), chosen.detach()))

        handles.append(gate.register_forward_hook(heard))
    try:
        for batch in batches:
            model(**batch) if hasattr(batch, "keys") else model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not all(seen.values()):
        raise ValueError("align='activation' needs at least one batch, got none (was a generator already used up?)")
    return {name: tuple(map(torch.cat, zip(*calls, strict=True))) for name, calls in seen.items()}


def _activation(layer: ExpertLayer):
    one = layer.experts if layer.fused else layer.experts[0]
    act = getattr(one, "act_fn", None)
    if act is None:
        raise ValueError(f"{type(one).__name__} of {layer.name!r} has no act_fn: activation alignment cannot run it")
    return act
