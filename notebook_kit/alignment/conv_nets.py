"""Permutation specs of chains of layers (MLPs, VGG) and of residual convolutional networks.

A convolution's kernel [out, in, h, w] is permuted like a linear layer's weight; batch norm's four vectors move with the
channels. Where maps are flattened before a linear layer, a channel is a block of h·w neighbouring columns. All
convolutions that write to one residual stream share its permutation; a 1 x 1 shortcut begins a new stream.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from notebook_kit.alignment.spec import Part, PermutationSpec

# Modules that act on each unit, or on each channel, alone.
UNITWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Dropout, nn.Identity)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout2d)
STATISTICS = ("running_mean", "running_var")


def chain_spec(model: nn.Module, chain: Sequence[tuple[str, nn.Module]]) -> PermutationSpec:
    """Linear layers and convolutions one after another; between them only what acts on each unit alone, and norms.

    Args:
        model: whose layers they are, for error texts.
        chain: (name, layer), first to last.

    Raises:
        ValueError: a layer that may mix units, or fewer than two that have weights.
    """
    makers = [name for name, layer in chain if isinstance(layer, nn.Linear | nn.Conv2d)]
    if len(makers) < 2:
        raise ValueError(f"{type(model).__name__} has {len(makers)} linear layers: hidden units need two")
    axes: dict[str, tuple] = {}
    sizes: dict[str, int] = {}
    last: str | None = None
    maps = False  # whether units are channels of maps here

    def carried(length: int) -> Part | None:
        # After flattening, a channel is a block of h·w neighbours.
        return None if last is None else Part(last, block=length // sizes[last])

    for name, layer in chain:
        conv = isinstance(layer, nn.Conv2d)
        fits = conv or isinstance(layer, (*UNITWISE, *POOLS, nn.BatchNorm2d, nn.Flatten)) or not maps
        if conv and layer.groups != 1:
            raise ValueError(
                f"layer {name!r} has {layer.groups} groups of channels: write its PermutationSpec yourself"
            )
        if conv or (isinstance(layer, nn.Linear) and fits):
            new = None if name == makers[-1] else name
            into = carried(layer.weight.shape[1])
            axes[f"{name}.weight"] = (new, into, None, None) if conv else (new, into)
            if layer.bias is not None:
                axes[f"{name}.bias"] = (new,)
            if new is not None:
                sizes[new] = len(layer.weight)
            last, maps = new, conv
        elif isinstance(layer, NORMS) and fits:
            vectors = {key: value for key, value in layer.state_dict().items() if value.dim() == 1}
            axes |= {f"{name}.{key}": (carried(len(value)),) for key, value in vectors.items()}
        elif isinstance(layer, nn.Flatten):
            maps = False
        elif not (isinstance(layer, (*UNITWISE, *POOLS)) or (isinstance(layer, nn.Unflatten) and last is None)):
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, which may mix units; in an nn.Sequential only Linear, "
                f"Conv2d, Flatten, {', '.join(kind.__name__ for kind in (*UNITWISE, *NORMS, *POOLS))} are understood, "
                "and after a Conv2d no Linear or LayerNorm before a Flatten"
            )
    return PermutationSpec(axes, sizes, passive=statistics_of(axes), description=type(model).__name__)


def children_of(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The layers of an nn.Sequential, those of sequences inside it included, in order."""
    chain = []
    for name, layer in model.named_children():
        inside = children_of(layer, f"{prefix}{name}.") if isinstance(layer, nn.Sequential) else None
        chain += [(f"{prefix}{name}", layer)] if inside is None else inside
    return chain


def resnet_spec(weights: Mapping[str, Tensor], residual: bool, description: str) -> PermutationSpec:
    """The kit's `ResNet` and transformers' ResNetModel and ResNetForImageClassification, told by their names.

    Args:
        weights: state dict (of any device; only names and shapes are read).
        residual: permute the residual streams, one permutation for each stretch between shortcuts.
        description: of the spec.
    """
    keys = [key.removesuffix(".weight") for key in weights if key.endswith(".weight") and weights[key].dim() == 4]
    norm_of = {key: key.removesuffix("conv") + "norm" for key in keys}
    if any(key.endswith("convolution") for key in keys):
        norm_of = {key: key.removesuffix("convolution") + "normalization" for key in keys}
    axes: dict[str, tuple] = {}
    sizes: dict[str, int] = {}

    def write(conv: str, new: str, old: str | None) -> str:
        sizes[new] = len(weights[f"{conv}.weight"])
        axes[f"{conv}.weight"] = (new, old, None, None)
        for key in ("weight", "bias", *STATISTICS):
            axes[f"{norm_of[conv]}.{key}"] = (new,)
        return new

    stem, *rest = keys
    stream = write(stem, "stream.0", None)
    for block in dict.fromkeys(_block_of(conv) for conv in rest):
        shortcut = [conv for conv in rest if conv.startswith(f"{block}.shortcut.")]
        *inner, outer = [conv for conv in rest if _block_of(conv) == block and conv not in shortcut]
        before, last = stream, stream
        for conv in inner:
            last = write(conv, conv.rpartition(".")[0], last)
        if shortcut:
            stream = f"stream.{int(stream.partition('.')[2]) + 1}"
            write(shortcut[0], stream, before)
        write(outer, stream, last)
    axes |= {key: (None, stream) for key in weights if key.endswith("weight") and weights[key].dim() == 2}
    if not residual:
        fixed = {perm for perm in sizes if perm.startswith("stream.")}
        axes = {name: tuple(None if perm in fixed else perm for perm in row) for name, row in axes.items()}
        sizes = {perm: n for perm, n in sizes.items() if perm not in fixed}
    return PermutationSpec(axes, sizes, passive=statistics_of(axes), description=description)


def _block_of(conv: str) -> str:
    # stages.0.1.first.conv, or encoder.stages.0.layers.1.layer.0.convolution and ...layers.1.shortcut.convolution
    block = conv.rpartition(".")[0].rpartition(".")[0]
    return block.removesuffix(".layer")


def statistics_of(names: Iterable[str]) -> list[str]:
    """Running statistics of batch norm: they move with their channels, but say nothing about the weights."""
    return [name for name in names if name.endswith(STATISTICS)]
