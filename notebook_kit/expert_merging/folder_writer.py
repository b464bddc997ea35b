"""A merged mixture written to a folder: one shard a layer, then the index and the configuration."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from notebook_kit.checkpoints import INDEX, Checkpoint, TensorWriter
from notebook_kit.expert_merging.disk import FILES, DiskLayer
from notebook_kit.expert_merging.mapped import merged_classes
from notebook_kit.expert_merging.plan import LayerPlan


class FolderWriter:
    """Writes one shard a layer, and remembers what the index and the configuration must say."""

    def __init__(self, checkpoint: Checkpoint, config, folder: Path):
        self.checkpoint, self.config, self.folder = checkpoint, config, folder
        self.maps: dict[str, list[int]] = {}
        self.weight_map: dict[str, str] = {}
        self.total_bytes = 0

    def merge(self, layer: DiskLayer, number: int, plan: LayerPlan, combine) -> tuple[int, int]:
        """Write a layer with merged experts; returns the bytes of its experts before and after."""
        spec = [self.checkpoint.spec()[f"{layer.prefix}.experts.0.{name}.weight"] for name in layer.matrices]
        new = {
            f"{layer.prefix}.experts.{g}.{name}.weight": entry
            for g in range(len(plan.groups))
            for name, entry in zip(layer.matrices, spec, strict=True)
        }

        def experts():
            for group, weights in zip(plan.groups, plan.weights, strict=True):
                for tensor, (_, dtype) in zip(combine(layer, group, weights), spec, strict=True):
                    yield tensor.to(dtype)

        self.write(number, new, experts())
        self.maps[str(number)] = list(plan.expert_map)
        size = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in spec)
        return len(layer) * size, len(plan.groups) * size

    def write(self, number: int, new: Mapping, experts: Iterable[Tensor] = ()) -> None:
        """One shard: what is not an expert of that layer as it was, then its experts."""
        start, block = f"model.layers.{number}.", FILES[self.config.model_type][0]
        own = [name for name in self.checkpoint if name.startswith(start)]
        self._shard(number, [n for n in own if not n.startswith(f"{start}{block}.experts.")], new, experts)

    def write_rest(self, n_layers: int) -> None:
        """The shard of what is in no layer."""
        self._shard(n_layers, [name for name in self.checkpoint if not name.startswith("model.layers.")], {}, ())

    def _shard(self, number: int, kept: list[str], new: Mapping, experts: Iterable[Tensor]) -> None:
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


def finish_folder(source: Path, target: Path, config, writer: FolderWriter) -> None:
    for file in source.iterdir():
        small = file.suffix in (".json", ".txt", ".model", ".jinja", ".md") and file.name not in (INDEX, "config.json")
        if file.is_file() and small:
            shutil.copyfile(file, target / file.name)
    config_class, model_class = merged_classes(config.model_type)
    new = config_class.from_dict(config.to_dict() | {"model_type": config_class.model_type})
    new.expert_map, new.architectures = writer.maps, [model_class.__name__]
    new.save_pretrained(target)
    index = {"metadata": {"total_size": writer.total_bytes}, "weight_map": dict(sorted(writer.weight_map.items()))}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
