"""Two networks as PLeaS reads them: chains of layers, checked against each other, with what their layers see."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.alignment.architectures import permutation_spec
from notebook_kit.alignment.conv_nets import children_of
from notebook_kit.alignment.spec import PermutationSpec
from notebook_kit.alignment.taps import each, listening
from notebook_kit.models import MLP
from notebook_kit.weights import IncompatibleWeights

Layer = nn.Linear | nn.Conv2d


@dataclass
class Pair:
    """Two networks of one architecture as chains of layers, and what the layers see.

    Args:
        model_a: one network; sets the order of units.
        model_b: the other.
        spec: which axes move together.
        layers: names of the layers with weights, first to last.
        norms: name of a batch norm to the name of the layer whose units it stands on.
        spots: multiply-adds of each layer per weight (the number of places where a kernel is applied; 1 if linear).
        inputs: layer to (a's, b's) inputs, Float[rows, columns], convolutions as patches; empty without batches.
        outputs: layer to (a's, b's) outputs before the nonlinearity, Float[rows, units].
    """

    model_a: nn.Module
    model_b: nn.Module
    spec: PermutationSpec
    layers: list[str]
    norms: dict[str, str]
    spots: dict[str, int]
    inputs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    outputs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def sizes(self, name: str) -> tuple[int, int]:
        """(outputs, input columns) of a layer, a kernel's places left out."""
        return tuple(self.model_a.get_submodule(name).weight.shape[:2])

    def before(self, name: str) -> str | None:
        """The layer whose units this one reads."""
        place = self.layers.index(name)
        return self.layers[place - 1] if place else None


@torch.no_grad()
def read_pair(model_a: nn.Module, model_b: nn.Module, batches: Iterable | None, *, heads: str = "shared") -> Pair:
    """Check that two networks can be joined, and record what their layers see on the same inputs.

    Args:
        model_a: an MLP or nn.Sequential of linear and convolutional layers.
        model_b: of the same architecture.
        batches: inputs to both, or None.
        heads: "separate" lets the last layers differ in their number of outputs.

    Raises:
        IncompatibleWeights: different architectures.
        ValueError: an architecture without rules; NaN or Inf; no inputs where they are needed.
    """
    spec = permutation_spec(model_a)
    chain = chain_of(model_a)
    layers = [name for name, layer in chain if isinstance(layer, Layer)]
    _check_pair(model_a, model_b, layers, heads)
    norms, last = {}, ""
    for name, layer in chain:
        last = name if isinstance(layer, Layer) else last
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            norms[name] = last
        elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, whose mean over units changes with the width"
            )
    pair = Pair(model_a, model_b, spec, layers, norms, dict.fromkeys(layers, 1))
    if batches is not None:
        _record(pair, list(each(batches, "pleas")))
    elif any(isinstance(layer, nn.Conv2d) for _, layer in chain):
        raise ValueError("convolutions need batches: their multiply-adds depend on the size of the images (pleas)")
    return pair


def chain_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if isinstance(model, MLP):
        return [(f"layers.{i}", layer) for i, layer in enumerate(model.layers)]
    if isinstance(model, nn.Sequential):
        return children_of(model)
    raise ValueError(
        f"pleas knows MLP and nn.Sequential of linear and convolutional layers, got {type(model).__name__}"
    )


def _check_pair(model_a: nn.Module, model_b: nn.Module, layers: list[str], heads: str) -> None:
    if type(model_a) is not type(model_b):
        raise IncompatibleWeights(
            f"cannot join {type(model_a).__name__} and {type(model_b).__name__}: both must be of one architecture"
        )
    a, b = model_a.state_dict(), model_b.state_dict()
    odd = sorted(a.keys() ^ b.keys())
    if odd:
        raise IncompatibleWeights(f"{odd[0]!r} is only in {'model_a' if odd[0] in a else 'model_b'}")
    for key in a:
        heads_differ = (
            heads == "separate" and key.rpartition(".")[0] == layers[-1] and a[key].shape[1:] == b[key].shape[1:]
        )
        if a[key].shape != b[key].shape and not heads_differ:
            raise IncompatibleWeights(
                f"{key!r} has shape {list(a[key].shape)} in model_a and {list(b[key].shape)} in model_b: PLeaS pairs "
                "units one to one; networks of different width are for ot_fusion"
            )
        for owner, weights in (("model_a", a), ("model_b", b)):
            if weights[key].is_floating_point() and not torch.isfinite(weights[key]).all():
                raise ValueError(f"tensor {key!r} of {owner} holds NaN or Inf")


def _record(pair: Pair, batches: list) -> None:
    if not all(isinstance(batch, Tensor) for batch in batches):
        kinds = ", ".join(sorted({type(batch).__name__ for batch in batches}))
        raise TypeError(f"pleas takes batches of inputs as tensors, got {kinds}")
    seen: list[dict[str, list]] = []
    for model in (pair.model_a, pair.model_b):
        rows: dict[str, list] = {name: [] for name in pair.layers}
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda layer, args, out, name=name, rows=rows: rows[name].append(_rows(layer, args[0], out))
            )
            for name in pair.layers
        ]
        with listening(model, handles):
            for batch in batches:
                model(batch)
        seen.append({name: [torch.cat(parts) for parts in zip(*rows[name], strict=True)] for name in pair.layers})
    for name in pair.layers:
        (x_a, y_a), (x_b, y_b) = (one[name] for one in seen)
        for rows, owner in ((y_a, "model_a"), (y_b, "model_b")):
            if not torch.isfinite(rows).all():
                raise ValueError(f"the outputs of {name!r} of {owner} hold NaN or Inf on these batches")
        pair.inputs[name], pair.outputs[name] = (x_a, x_b), (y_a, y_b)
        pair.spots[name] = len(y_a) // sum(len(batch) for batch in batches)


def _rows(layer: Layer, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outputs as a linear layer would see them."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError(f"{layer} is not understood: only zero padding given as numbers, and one group")
    shape = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
    patches = F.unfold(x, layer.kernel_size, **shape)
    return patches.movedim(1, 2).flatten(0, 1), out.movedim(1, -1).reshape(-1, out.shape[1])
