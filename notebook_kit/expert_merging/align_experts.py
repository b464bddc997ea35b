"""Experts brought into one order before they are averaged: Git Re-Basin on three matrices."""

from torch import Tensor

from notebook_kit.alignment import Part, Permutations, PermutationSpec, match_features, permute, weight_matching
from notebook_kit.expert_merging.outputs import hidden_units
from notebook_kit.expert_merging.plan import Combine, Expert
from notebook_kit.expert_merging.view import PARTS, ExpertLayer
from notebook_kit.weights import at_least_float32


def expert_spec(f: int, *, biased: bool = False, signed: bool = True) -> PermutationSpec:
    """One gated expert: gate rows, up rows and down columns move together, and their biases with them.

    Args:
        f: hidden units.
        biased: there are biases.
        signed: up and down share a free sign.
    """
    units = Part("units", signs=(signed,))
    axes = {"gate": ("units", None), "up": (units, None), "down": (None, units)}
    if biased:
        axes |= {"gate_bias": ("units",), "up_bias": (units,), "down_bias": (None,)}
    return PermutationSpec(axes, {"units": f}, description="gated expert")


def expert_of(layer: ExpertLayer, e: int) -> dict[str, Tensor]:
    """Gate, up and down of one expert, and its biases, as a state dict, in float32 at least."""
    return {name: at_least_float32(tensor) for name, tensor in zip(PARTS, layer.expert(e), strict=False)}


def spec_of(layer: ExpertLayer) -> PermutationSpec:
    """What may move in one expert of a layer."""
    return expert_spec(layer.width, biased=layer.biased, signed=layer.signed)


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
        spec, key, signs = spec_of(layer), (layer.name, e, leader), self.signs and layer.signed
        if key not in self._known:
            a = expert_of(layer, leader)
            if self.how == "weight":
                self._known[key] = weight_matching(spec, a, b, signs=signs)
            else:
                x, chosen = self.inputs[layer.name]
                x = at_least_float32(x[((chosen == e) | (chosen == leader)).any(-1)])
                z_a, z_b = (hidden_units(layer, w, x) for w in (a, b))
                self._known[key] = match_features(z_a, z_b, "units", signs=signs)
        return permute(spec, self._known[key], b)


def average_group(aligner: Aligner) -> Combine:
    """Combine a group by W = Σ_i w_i · π_i(W_i), every member first brought into the order of the group's first.

    Args:
        aligner: how members are brought into that order.
    """

    def combine(layer: ExpertLayer, group: tuple[int, ...], weights: tuple[float, ...]) -> Expert:
        # One member at a time beside the sum.
        total = {name: weights[0] * tensor for name, tensor in expert_of(layer, group[0]).items()}
        for e, weight in zip(group[1:], weights[1:], strict=True):
            if weight == 0:
                continue
            for name, tensor in aligner(layer, e, group[0]).items():
                total[name].add_(tensor, alpha=weight)
        return tuple(total.values())

    return combine
