"""Experts brought into one order before they are averaged: Git Re-Basin on three matrices, or on two."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from notebook_kit.alignment import Part, Permutations, PermutationSpec, match_features, permute_tensor, weight_matching
from notebook_kit.expert_merging.apply import Combine, Expert
from notebook_kit.expert_merging.layout import PARTS
from notebook_kit.expert_merging.outputs import hidden_units
from notebook_kit.expert_merging.view import ExpertLayer
from notebook_kit.weights import at_least_float32


def expert_spec(f: int, parts: tuple[str, ...] = PARTS[:3], *, signed: bool = True) -> PermutationSpec:
    """One expert: gate rows, up rows and down columns move together, and their biases with them.

    Args:
        f: hidden units.
        parts: what it consists of.
        signed: up and down share a free sign.
    """
    units = Part("units", signs=(signed,))
    axes = {"gate": ("units", None), "up": (units, None), "down": (None, units)}
    axes |= {"gate_bias": ("units",), "up_bias": (units,), "down_bias": (None,)}
    return PermutationSpec({name: axes[name] for name in parts}, {"units": f}, description="expert")


class ExpertWeights(Mapping[str, Tensor]):
    """The parts of one expert as a state dict, in float32 at least; read when asked for.

    Args:
        layer: from `expert_view`.
        e: which expert.
    """

    def __init__(self, layer: ExpertLayer, e: int):
        self.layer, self.e = layer, e

    def __getitem__(self, name: str) -> Tensor:
        return at_least_float32(self.layer.part(self.e, self.layer.parts.index(name)))

    def __contains__(self, name: object) -> bool:
        return name in self.layer.parts  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.layer.parts)

    def __len__(self) -> int:
        return len(self.layer.parts)


def expert_of(layer: ExpertLayer, e: int) -> dict[str, Tensor]:
    """All of `ExpertWeights` at once."""
    return dict(ExpertWeights(layer, e))


def spec_of(layer: ExpertLayer) -> PermutationSpec:
    """What may move in one expert of a layer."""
    return expert_spec(layer.width, layer.parts, signed=layer.signed)


class Aligner:
    """Aligns experts of a layer to one another, and remembers the permutation of every pair it has matched.

    Args:
        how: "none"; "weight" (weight matching); "sketch" (weight matching after a random projection of what each unit
            reads and writes, which keeps inner products up to noise of 1/√sketch and costs sketch/d of the products);
            "activation".
        signs: use the free sign of gated units.
        inputs: block name to (hidden states [T, d], chosen experts [T, k]), for "activation".
        sketch: dimensions of the projection; where d is not larger, there is none.
    """

    def __init__(self, how: str = "weight", *, signs: bool = True, inputs: dict | None = None, sketch: int = 256):
        if how not in ("none", "weight", "sketch", "activation"):
            raise ValueError(f'how must be "none", "weight", "sketch" or "activation", got {how!r}')
        if how == "activation" and inputs is None:
            raise ValueError('align="activation" needs batches=...: inputs to run the model on')
        self.how, self.signs, self.inputs, self.sketch = how, signs, inputs, sketch
        self._known: dict[tuple[str, int, int], Permutations] = {}
        self._sketches: dict[tuple[str, int], dict[str, Tensor]] = {}

    def __call__(self, layer: ExpertLayer, e: int, leader: int) -> dict[str, Tensor]:
        """Expert e in the order of expert `leader`; the same function."""
        order, spec = self.order(layer, e, leader), spec_of(layer)
        return {name: permute_tensor(spec, order, w, spec.parts(name)) for name, w in ExpertWeights(layer, e).items()}

    def order(self, layer: ExpertLayer, e: int, leader: int) -> Permutations:
        """The permutation (and signs) that brings expert e into the order of `leader`; empty for the identity."""
        if self.how == "none" or e == leader:
            return Permutations()
        key, signs = (layer.name, e, leader), self.signs and layer.signed
        if key not in self._known:
            if self.how == "activation":
                x, chosen = self.inputs[layer.name]
                x = at_least_float32(x[((chosen == e) | (chosen == leader)).any(-1)])
                z_a, z_b = (hidden_units(layer, ExpertWeights(layer, i), x) for i in (leader, e))
                self._known[key] = match_features(z_a, z_b, "units", signs=signs)
            else:
                a, b = (self._matched(layer, i) for i in (leader, e))
                self._known[key] = weight_matching(spec_of(layer), a, b, signs=signs)
        return self._known[key]

    def _matched(self, layer: ExpertLayer, e: int) -> Mapping[str, Tensor]:
        """What is compared: an expert's weights, or what a projection leaves of them."""
        weights, d = ExpertWeights(layer, e), layer.router.shape[1]
        if self.how != "sketch" or d <= self.sketch:
            return weights
        if (layer.name, e) not in self._sketches:
            generator, small = torch.Generator().manual_seed(0), {}  # the same projection for all
            for name, tensor in weights.items():
                if name.endswith("bias"):
                    small[name] = tensor[: self.sketch] if name == "down_bias" else tensor
                    continue
                projection = torch.randn(d, self.sketch, generator=generator).to(tensor) / self.sketch**0.5
                small[name] = projection.T @ tensor if name == "down" else tensor @ projection
            self._sketches[layer.name, e] = small
        return self._sketches[layer.name, e]


def average_group(aligner: Aligner) -> Combine:
    """Combine a group by W = Σ_i w_i · π_i(W_i), every member first brought into the order of the group's first.

    Args:
        aligner: how members are brought into that order.
    """

    def combine(layer: ExpertLayer, group: tuple[int, ...], weights: tuple[float, ...]) -> Expert:
        members = [(e, weight) for e, weight in zip(group[1:], weights[1:], strict=True) if weight]
        orders = [aligner.order(layer, e, group[0]) for e, _ in members]
        spec, total = spec_of(layer), []
        for name, tensor in ExpertWeights(layer, group[0]).items():  # one matrix of one member beside the sum
            total.append(weights[0] * tensor)
            for (e, weight), order in zip(members, orders, strict=True):
                moved = permute_tensor(spec, order, ExpertWeights(layer, e)[name], spec.parts(name))
                total[-1].add_(moved, alpha=weight)
                del moved
        return tuple(total)

    return combine
