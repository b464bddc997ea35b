"""Numbers about diffusion mixtures: what an expert's choice follows, what each part is worth, what a token costs."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from notebook_kit.diagnostics.routing import entropy, shared_information
from notebook_kit.mixtures import DiTMoE, SwiGLUExperts
from notebook_kit.models import DiffusionTransformer, noised
from notebook_kit.routing import RoutingTrace, record_routing
from notebook_kit.zoo import digit_twins

BY = ("position", "time", "class")


@dataclass(frozen=True, eq=False)
class Denoising:
    """What the routers of a diffusion transformer said about noised images.

    Args:
        trace: every token in every layer: expert ids, place in the image (`positions`), class (`labels`).
        levels: the noise levels t that were used.
        level: index into `levels` of each sequence (image) of the trace.
    """

    trace: RoutingTrace
    levels: tuple[float, ...]
    level: Int[Tensor, " images"]

    def groups(self, by: str) -> tuple[Int[Tensor, " tokens"], list[str]]:
        """Return the group of each token, and the groups' names.

        Args:
            by: "position", "time" or "class".

        Raises:
            ValueError: something else.
        """
        if by not in BY:
            raise ValueError(f"by must be one of {', '.join(BY)}, got {by!r} (Denoising)")
        if by == "position":
            return self.trace.positions, [str(i) for i in range(int(self.trace.positions.max()) + 1)]
        if by == "time":
            return self.level[self.trace.sequences], [f"{t:g}" for t in self.levels]
        return self.trace.labels, self.trace.label_names


def record_denoising(
    model: DiffusionTransformer,
    x: Float[Tensor, "n channels height width"],
    y: Int[Tensor, " n"],
    *,
    levels: Sequence[float] = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95),
    seed: int = 0,
) -> Denoising:
    """Noise images to every level, show them to the model with their classes, and record the routing.

    Args:
        model: with routed layers as FFNs.
        x: images, all used at every level.
        y: classes.
        levels: t in [0, 1], 1 is noise alone.
        seed: of the noise.

    Raises:
        ValueError: no routed layer in the model.
    """
    generator = torch.Generator().manual_seed(seed)
    names = [str(int(c)) for c in y]
    with torch.no_grad(), record_routing(model.blocks) as trace, trace.labelled(names):
        for t in levels:
            times, noise = x.new_full((len(x),), float(t)), torch.randn(x.shape, generator=generator).to(x)
            model(noised(x, noise, times), times, y)
    return Denoising(trace, tuple(levels), torch.arange(len(levels)).repeat_interleave(len(x)))


def expert_shares(record: Denoising, *, by: str, layer: int) -> pd.DataFrame:
    """Say which expert is the first choice where.

    Args:
        record: from `record_denoising`.
        by: "position", "time" or "class".
        layer: from 0.

    Returns:
        DataFrame: groups x experts, share of the group's tokens; rows sum to 1.
    """
    groups, names = record.groups(by)
    routing = record.trace.layer(layer)
    n_experts = routing.logits.shape[1]
    flat = torch.bincount(groups * n_experts + routing.experts[:, 0], minlength=len(names) * n_experts)
    counts = flat.reshape(len(names), n_experts).float()
    table = pd.DataFrame((counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy(), index=names)
    return table.sort_index() if by == "class" else table


def dependence(record: Denoising, *, n_shuffles: int = 10, seed: int = 0) -> pd.DataFrame:
    """Measure how much the first expert of a token tells about its position, its time and its class.

    A finite sample never gives 0. So each is set beside chance: classes and times are shuffled between whole images,
    positions within each image.

    Args:
        record: from `record_denoising`.
        n_shuffles: at least 1; the mean over them is reported.
        seed: of the shuffles.

    Returns:
        DataFrame: a row a layer; bits about position, time and class, and the same with " (chance)".
    """
    trace, generator = record.trace, torch.Generator().manual_seed(seed)
    n_images = len(record.level)
    rows = []
    for index in range(len(trace.layers)):
        first = trace.layer(index).experts[:, 0]
        row = {by: shared_information(record.groups(by)[0], first) for by in BY}
        chance = dict.fromkeys(BY, 0.0)
        for _ in range(n_shuffles):
            order = torch.randperm(n_images, generator=generator)
            for by in BY:
                groups = record.groups(by)[0].reshape(n_images, -1)
                # All images have the same positions: to shuffle them, each image gets an order of its own.
                own = torch.rand(groups.shape, generator=generator).argsort(1)
                moved = groups.gather(1, own) if by == "position" else groups[order]
                chance[by] += shared_information(moved.reshape(-1), first) / n_shuffles
        rows.append(row | {f"{by} (chance)": bits for by, bits in chance.items()})
    return pd.DataFrame(rows)


def evenness(record: Denoising) -> pd.DataFrame:
    """Measure how evenly experts are used at each noise level: the entropy of their load, over its largest value.

    Args:
        record: from `record_denoising`.

    Returns:
        DataFrame: noise levels x layers; 1 if all experts get the same, 0 if one gets everything. All slots count.
    """
    table = {}
    for index in range(len(record.trace.layers)):
        experts = record.trace.layer(index).experts
        n_experts = record.trace.layer_logits(index).shape[1]
        groups = record.groups("time")[0].repeat_interleave(experts.shape[1])
        flat = torch.bincount(groups * n_experts + experts.reshape(-1), minlength=len(record.levels) * n_experts)
        load = flat.reshape(len(record.levels), n_experts).float()
        table[index] = (entropy(load) / torch.tensor(float(n_experts)).log2()).tolist()
    return pd.DataFrame(table, index=list(record.levels))


@contextmanager
def silenced(model: nn.Module, part: str) -> Iterator[nn.Module]:
    """Let one part of every `DiTMoE` answer 0 inside the block; the routers still decide.

    Args:
        model: with `DiTMoE` layers.
        part: "shared" or "routed".

    Raises:
        ValueError: another part, or no such layer in the model.
    """
    if part not in ("shared", "routed"):
        raise ValueError(f"part must be 'shared' or 'routed', got {part!r} (silenced)")
    layers = [m for m in model.modules() if isinstance(m, DiTMoE)]
    parts = [m for layer in layers if (m := layer.shared if part == "shared" else layer.experts) is not None]
    if not parts:
        raise ValueError(f"no DiTMoE with a {part} part in {type(model).__name__} (silenced)")
    with ExitStack() as stack:
        for module in parts:
            stack.callback(module.register_forward_hook(lambda module, args, output: output * 0).remove)
        yield model


def token_cost(model: nn.Module) -> dict[str, int]:
    """Count the weights of the FFNs: all of them, and those a token is multiplied with.

    Args:
        model: a diffusion transformer.

    Returns:
        stored, active: weights in the products of all FFNs, routers included, biases left out; active is also the
        multiply-adds of a token.
    """
    stored = active = 0
    for block in model.blocks:
        ffn = block.feed_forward
        sizes = {name: p.numel() for name, p in ffn.named_parameters() if p.ndim > 1}
        picked = 1.0
        if isinstance(ffn, DiTMoE) and isinstance(ffn.experts, SwiGLUExperts):
            picked = ffn.router.k / ffn.router.n_experts
        stored += sum(sizes.values())
        active += sum(round(n * picked) if name.startswith("experts.") else n for name, n in sizes.items())
    return {"stored": stored, "active": active}


@lru_cache(maxsize=1)
def _reader() -> nn.Module:
    return digit_twins(128).model


@torch.no_grad()
def read_as(images: Float[Tensor, "n 1 8 8"]) -> Int[Tensor, " n"]:
    """Let a small classifier of the zoo (97 % on real digits) read images.

    Args:
        images: pixels from -1 to 1; what lies outside is cut off.

    Returns:
        Digits.
    """
    return _reader()((images.clamp(-1, 1).flatten(1) + 1) / 2).argmax(1)


def variety(images: Float[Tensor, "n 1 8 8"], y: Int[Tensor, " n"]) -> float:
    """Return the standard deviation of pixels over images of one class, root mean square over pixels and classes.

    Args:
        images: pixels.
        y: classes, at least two images of each.
    """
    return float(torch.stack([images[y == c].var(0).mean() for c in y.unique()]).mean().sqrt())
