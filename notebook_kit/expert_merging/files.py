"""Merge the experts of a checkpoint on disk, layer by layer: no more than one layer is ever in memory.

One pass does all. The calibration text runs through the model; each decoder layer is read from the shards when its
turn comes, hidden states go through it, its router is heard, and its experts are let go. Then they are read again, one
by one, aligned and added up, and a group is written before the next one begins.

Memory, beside embeddings and hidden states: one layer, or while merging four experts in float32 (the sum, the leader, a
member before and after) and 20 f² bytes that the assignment needs, whichever is more.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from notebook_kit.checkpoints import INDEX, Checkpoint, TensorWriter, atomic
from notebook_kit.expert_merging.align_experts import Aligner, average_group
from notebook_kit.expert_merging.clusters import agglomerate, k_means, led_by_usage
from notebook_kit.expert_merging.m_smoe import SIMILARITIES, expert_similarity
from notebook_kit.expert_merging.mapped import ARCHITECTURES, merged_classes
from notebook_kit.expert_merging.outputs import output_statistics
from notebook_kit.expert_merging.plan import (
    LayerPlan,
    check_n_experts,
    dominant_experts,
    group_by_similarity,
    merge_weights_of,
)
from notebook_kit.expert_merging.view import ExpertLayer, expert_view
from notebook_kit.hyperparameters import Choice, Range, hyperparameters, validate

# model type: how files call the block, and an expert's gate, up and down
FILES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
FILE_METHODS = ("m_smoe", "average_experts", "hc_smoe", "sub_moe")


@dataclass(frozen=True)
class MergedLayer:
    """What became of one layer: usage [N], similarity [N, N], the plan, and the bytes of its experts."""

    name: str
    usage: Float[Tensor, " experts"] = field(repr=False)
    similarity: Float[Tensor, "experts experts"] = field(repr=False)
    plan: LayerPlan
    bytes: tuple[int, int]


@torch.no_grad()
def merge_expert_files(
    folder: str | Path,
    out: str | Path,
    ids: Int[Tensor, "n length"],
    *,
    method: Annotated[str, Choice(*FILE_METHODS)] = "m_smoe",
    n_experts: Annotated[int, Range(1, 512)] = 4,
    align: bool = True,
    similarity: Annotated[str, Choice(*SIMILARITIES)] = "router-logits",
    chunk: Annotated[int, Range(1, 1024, log=True)] = 8,
    progress: bool = True,
    finish=None,
) -> list[MergedLayer]:
    """Merge a Mixtral, Qwen2/3-MoE or OLMoE folder into another, the same as the method does in memory.

    Args:
        folder: config.json and safetensors, sharded or not.
        out: a folder that does not exist yet; appears when complete, with a shard for each layer.
        ids: calibration text, token ids.
        method: which experts join: as `m_smoe`, `average_experts`, `hc_smoe` or `sub_moe` (whole matrices).
        n_experts: experts that each layer stores afterwards.
        align: bring members into the dominant expert's order first (not for average_experts).
        similarity: what groups experts, for m_smoe and average_experts.
        chunk: sequences that run through a layer at a time; hidden states of all are kept.
        progress: show a bar.
        finish: called with (hidden folder, layers) before the result takes its name: may add files.

    Returns:
        One entry a routed layer.

    Raises:
        ValueError: an architecture that is not known on disk, a quantised checkpoint, too few experts or no text.
        FileExistsError: `out` is there already.
        BadCheckpoint: as `Checkpoint`.
    """
    schema = hyperparameters(merge_expert_files)
    choices = {"method": method, "n_experts": n_experts, "similarity": similarity, "chunk": chunk}
    validate(schema, choices)
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; give a folder that does not")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {out.absolute().parent} to write {out.name} in")
    if ids.numel() == 0:
        raise ValueError("the calibration text is empty")
    config = _config(folder)
    checkpoint = Checkpoint(folder)
    model = _empty(config, checkpoint)
    check_n_experts(n_experts, {"": torch.empty(getattr(config, ARCHITECTURES[config.model_type][1]))}, method)
    from tqdm.auto import tqdm

    with atomic(out) as partial:
        partial.mkdir()
        bar = tqdm(total=len(model.layers), desc=f"merging with {method}", unit="layer", disable=not progress)
        job = _Job(checkpoint, config, partial, choices | {"align": align}, bar)
        for number, layer in enumerate(model.layers):
            layer.forward = job.streamed(layer, number)  # its attributes stay readable
        try:
            model(input_ids=ids, use_cache=False)
        finally:
            bar.close()
        job.write_rest(len(model.layers))
        _finish_folder(folder, partial, config, job)
        if finish is not None:
            finish(partial, job.layers)
    return job.layers


@dataclass(frozen=True)
class _OnDisk(ExpertLayer):
    """A layer whose experts are read when they are asked for, and not kept; the block has shapes alone."""

    read: Callable[[int], tuple[Tensor, ...]]

    def expert(self, e: int) -> tuple[Tensor, ...]:
        return self.read(e)


class _Job:
    """What one pass carries from layer to layer."""

    def __init__(self, checkpoint: Checkpoint, config, folder: Path, choices: Mapping, bar):
        self.checkpoint, self.config, self.folder, self.choices, self.bar = checkpoint, config, folder, choices, bar
        self.layers: list[MergedLayer] = []
        self.maps: dict[str, list[int]] = {}
        self.weight_map: dict[str, str] = {}
        self.total_bytes = 0

    def streamed(self, layer: nn.Module, number: int):
        original = layer.forward

        def forward(hidden_states: Tensor, *args, **kwargs):
            layer.load_state_dict(self.read(layer, number), assign=True)
            heard: list[tuple[Tensor, Tensor, Tensor]] = []
            views = expert_view(layer) if hasattr(layer.mlp, "experts") else []
            hooks = [view.router_module.register_forward_hook(_listen(heard, self.choices)) for view in views]
            whole, n = torch.empty_like(hidden_states), len(hidden_states)
            for start in range(0, n, self.choices["chunk"]):
                span = slice(start, start + self.choices["chunk"])
                cut = {k: v[span] if isinstance(v, Tensor) and n > 1 and len(v) == n else v for k, v in kwargs.items()}
                output = original(hidden_states[span], *args, **cut)
                whole[span] = output[0] if isinstance(output, tuple) else output
                del output
            for hook in hooks:
                hook.remove()
            if views:
                block = ExpertLayer(f"model.layers.{number}.mlp", views[0].block)
                joined = [torch.cat(pieces) for pieces in zip(*heard, strict=True)]
                heard.clear()
                self.merge(block, number, *joined)
            else:
                self.write(number, {})
            layer.to("meta")
            self.bar.update()
            return whole

        return forward

    def read(self, layer: nn.Module, number: int) -> dict[str, Tensor]:
        """The tensors of one decoder layer, experts fused as in memory; one file tensor at a time beside them."""
        block, (gate, up, down) = FILES[self.config.model_type]
        start, found = f"model.layers.{number}.", {}
        for key, slot in layer.state_dict().items():
            if not key.startswith("mlp.experts."):
                found[key] = self.checkpoint[start + key.replace("mlp.", f"{block}.", 1)]
                continue
            names = (gate, up) if key.endswith("gate_up_proj") else (down,)
            for e in range(len(slot)):
                for place, name in enumerate(names):
                    part = self.checkpoint[f"{start}{block}.experts.{e}.{name}.weight"]
                    if key not in found:
                        found[key] = torch.empty(slot.shape, dtype=part.dtype)
                    found[key][e].chunk(len(names))[place].copy_(part)
                    del part
        return found

    def merge(self, layer: ExpertLayer, number: int, logits: Tensor, chosen: Tensor, x: Tensor) -> None:
        """Plan one layer, let its experts go, and write the merged ones."""
        usage = torch.bincount(chosen.reshape(-1), minlength=logits.shape[1]).float()
        usage = usage / usage.sum()
        plan, s = _plan(layer, usage, logits.float(), x, self.choices)
        layer.experts.to("meta")
        align = self.choices["align"] and self.choices["method"] != "average_experts"
        combine = average_group(Aligner("weight" if align else "none"))
        block, names = FILES[self.config.model_type]
        shapes = [part.shape for part in layer.expert(0)]
        dtype, start = layer.gate.dtype, f"model.layers.{number}.{block}.experts."
        new = {
            f"{start}{g}.{name}.weight": (tuple(shape), dtype)
            for g in range(len(plan.groups))
            for name, shape in zip(names, shapes, strict=True)
        }

        def read(e: int) -> tuple[Tensor, ...]:
            return tuple(self.checkpoint[f"{start}{e}.{name}.weight"] for name in names)

        source = _OnDisk(layer.name, layer.block, read)

        def experts():
            for group, weights in zip(plan.groups, plan.weights, strict=True):
                yield from (tensor.to(dtype) for tensor in combine(source, group, weights))

        self.write(number, new, experts())
        self.maps[str(number)] = list(plan.expert_map)
        size = sum(shape.numel() for shape in shapes) * dtype.itemsize
        self.layers.append(MergedLayer(layer.name, usage, s, plan, (len(layer) * size, len(plan.groups) * size)))

    def write(self, number: int, new: Mapping, experts=()) -> None:
        """One shard: what is not an expert of that layer as it was, then its experts."""
        start, block = f"model.layers.{number}.", FILES[self.config.model_type][0]
        own = [name for name in self.checkpoint if name.startswith(start)]
        self._shard(number, [n for n in own if not n.startswith(f"{start}{block}.experts.")], new, experts)

    def write_rest(self, n_layers: int) -> None:
        """The shard of what is in no layer."""
        self._shard(n_layers, [name for name in self.checkpoint if not name.startswith("model.layers.")], {}, ())

    def _shard(self, number: int, kept: list[str], new: Mapping, experts) -> None:
        shards = self.config.num_hidden_layers + 1
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        spec = {name: self.checkpoint.spec()[name] for name in kept} | dict(new)
        with TensorWriter(self.folder / file, spec) as writer:
            for name in kept:
                writer.write(name, self.checkpoint[name])
            for name, tensor in zip(new, experts, strict=True):
                writer.write(name, tensor)
        self.weight_map |= dict.fromkeys(spec, file)
        self.total_bytes += sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in spec.values())


def _plan(layer: ExpertLayer, usage: Tensor, logits: Tensor, x: Tensor, choices: Mapping) -> tuple[LayerPlan, Tensor]:
    n, rule = choices["n_experts"], "frequency"
    if choices["method"] in ("m_smoe", "average_experts"):
        s = expert_similarity(layer, logits, choices["similarity"])
        groups = group_by_similarity(dominant_experts({"": usage}, n)[""], s)
        rule = "frequency" if choices["method"] == "m_smoe" else "uniform"
    else:
        cosine, means = output_statistics(layer, x)
        s = (1 + cosine) / 2
        groups = agglomerate(means, n) if choices["method"] == "hc_smoe" else k_means(cosine, n)
        groups = led_by_usage(groups, usage)
    return LayerPlan(groups, merge_weights_of(usage, groups, rule)), s


def _listen(heard: list, choices: Mapping):
    """Logits and choices of a router; its inputs too where the method runs experts on them."""

    def hook(module: nn.Module, args: tuple, output: tuple) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        logits, _, chosen = output
        heard.append((logits, chosen, x if choices["method"] in ("hc_smoe", "sub_moe") else x[:, :0]))

    return hook


def _config(folder: Path):
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {folder}: it must be the folder of a transformers model")
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.model_type not in FILES:
        raise ValueError(
            f"{folder} holds a {config.model_type}; known on disk are {', '.join(FILES)} (load others into memory "
            "and call the method on them)"
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{folder} is quantised; merging averages weights, so give the original checkpoint")
    return config


def _empty(config, checkpoint: Checkpoint) -> nn.Module:
    """The decoder without any layer's weights; embeddings are read."""
    name = ARCHITECTURES[config.model_type][0]
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(config)
    model.rotary_emb = type(model.rotary_emb)(config)
    model.set_experts_implementation("eager")  # grouped_mm would copy two thirds of a layer
    for part in ("embed_tokens", "norm"):
        getattr(model, part).load_state_dict({"weight": checkpoint[f"model.{part}.weight"]}, assign=True)
    return model.eval()


def _finish_folder(source: Path, target: Path, config, job: _Job) -> None:
    for file in source.iterdir():
        small = file.suffix in (".json", ".txt", ".model", ".jinja", ".md") and file.name not in (INDEX, "config.json")
        if file.is_file() and small:
            shutil.copyfile(file, target / file.name)
    config_class, model_class = merged_classes(config.model_type)
    new = config_class.from_dict(config.to_dict() | {"model_type": config_class.model_type})
    new.expert_map, new.architectures = job.maps, [model_class.__name__]
    new.save_pretrained(target)
    index = {"metadata": {"total_size": job.total_bytes}, "weight_map": dict(sorted(job.weight_map.items()))}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
