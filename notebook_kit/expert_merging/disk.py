"""Experts on disk: a layer that is read one expert at a time, and a model that runs without holding its experts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from notebook_kit.checkpoints import Checkpoint
from notebook_kit.expert_merging.mapped import ARCHITECTURES
from notebook_kit.expert_merging.outputs import expert_output
from notebook_kit.expert_merging.view import ExpertLayer

# model type: how files call the block, and an expert's gate, up and down
FILES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


@dataclass(frozen=True)
class DiskLayer(ExpertLayer):
    """The experts of one layer: read from the checkpoint when they are asked for, and not kept.

    Args:
        name: of the block in the model.
        block: the module; it knows shapes and router, its experts have no weights.
        checkpoint: where they are.
        prefix: of the block's tensors there.
        matrices: what files call an expert's gate, up and down.
    """

    checkpoint: Checkpoint
    prefix: str
    matrices: tuple[str, str, str]

    def expert(self, e: int) -> tuple[Tensor, ...]:
        return tuple(self.part(e, place) for place in range(len(self.matrices)))

    def part(self, e: int, place: int) -> Tensor:
        return self.checkpoint[f"{self.prefix}.experts.{e}.{self.matrices[place]}.weight"]

    def __len__(self) -> int:
        return len(self.experts.gate_up_proj)

    def _read(self, place: int) -> Tensor:
        """One matrix of every expert: a third of the layer."""
        every = torch.empty(0)
        for e in range(len(self)):
            part = self.part(e, place)
            if not e:
                every = torch.empty(len(self), *part.shape, dtype=part.dtype)
            every[e] = part
        return every

    def forward(
        self, x: Float[Tensor, "tokens d"], chosen: Int[Tensor, "tokens k"], weights: Float[Tensor, "tokens k"]
    ) -> Float[Tensor, "tokens d"]:
        """Run the chosen experts, one after another; what the block's `experts` do.

        Args:
            x: inputs.
            chosen: experts of each token.
            weights: what multiplies their outputs.
        """
        y = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            token, slot = (chosen == e).nonzero(as_tuple=True)
            out = expert_output(self, dict(zip(self.parts, self.expert(e), strict=True)), x[token])
            y.index_add_(0, token, (out * weights[token, slot, None]).to(y.dtype))
        return y


def known_config(folder: Path):
    """The configuration of a model folder whose experts can be read one by one.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: another architecture, or a quantised checkpoint.
    """
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


def empty_model(config, checkpoint: Checkpoint) -> nn.Module:
    """The decoder without any layer's weights; embeddings and the last norm are read."""
    name = ARCHITECTURES[config.model_type][0]
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(config)
    model.rotary_emb = type(model.rotary_emb)(config)
    for part in ("embed_tokens", "norm"):
        getattr(model, part).load_state_dict({"weight": checkpoint[f"model.{part}.weight"]}, assign=True)
    return model.eval()


def disk_layers(model: nn.Module, checkpoint: Checkpoint) -> dict[int, DiskLayer]:
    """The routed layers of an `empty_model`, by the number of their decoder layer."""
    block, matrices = FILES[model.config.model_type]
    return {
        number: DiskLayer(
            f"model.layers.{number}.mlp", layer.mlp, checkpoint, f"model.layers.{number}.{block}", matrices
        )
        for number, layer in enumerate(model.layers)
        if hasattr(layer.mlp, "experts")
    }


@torch.no_grad()
def run_from_disk(
    model: nn.Module,
    layers: dict[int, DiskLayer],
    ids: Int[Tensor, "n length"],
    heard: Callable[[int, Tensor, Tensor, Tensor], None],
    *,
    chunk: int = 8,
    step: Callable[[], object] = lambda: None,
) -> None:
    """Run a text through a model whose layers are read when their turn comes.

    Args:
        model: from `empty_model`; its layers are empty again afterwards.
        layers: from `disk_layers`.
        ids: token ids.
        heard: called for each routed layer, while it has its weights, with its number, the router's logits
            [tokens, experts], the chosen experts [tokens, k] and the block's inputs [tokens, d].
        chunk: sequences that run through attention at a time.
        step: called after each decoder layer.
    """
    checkpoint, block = next(iter(layers.values())).checkpoint, FILES[model.config.model_type][0]

    def streamed(layer: nn.Module, number: int):
        original, start = layer.forward, f"model.layers.{number}."
        names = [key for key in layer.state_dict() if not key.startswith("mlp.experts.")]

        def forward(hidden_states: Tensor, *args, **kwargs):
            own = {name: checkpoint[start + name.replace("mlp.", f"{block}.", 1)] for name in names}
            layer.load_state_dict(own, strict=False, assign=True)
            inputs, whole, n = [], torch.empty_like(hidden_states), len(hidden_states)
            if number in layers:  # the block adds to what attention leaves: that is done below, for all tokens at once
                layer.mlp.forward = lambda x: inputs.append(x) or torch.zeros_like(x)
            for at in range(0, n, chunk):
                span = slice(at, at + chunk)
                cut = {k: v[span] if isinstance(v, Tensor) and n > 1 and len(v) == n else v for k, v in kwargs.items()}
                output = original(hidden_states[span], *args, **cut)
                whole[span] = output[0] if isinstance(output, tuple) else output
                del output
            if number in layers:
                del layer.mlp.forward
                whole += _routed(layer.mlp, layers[number], torch.cat(inputs), lambda *said: heard(number, *said))
            layer.to("meta")
            step()
            return whole

        return forward

    for number, layer in enumerate(model.layers):
        layer.forward = streamed(layer, number)  # its attributes stay readable
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for layer in model.layers:
            del layer.forward


def _routed(block: nn.Module, layer: DiskLayer, x: Tensor, heard: Callable) -> Tensor:
    def hook(module: nn.Module, args: tuple, output: tuple) -> None:
        logits, _, chosen = output
        heard(logits, chosen, args[0].reshape(-1, args[0].shape[-1]))

    handle, block.experts.forward = layer.router_module.register_forward_hook(hook), layer.forward
    try:
        output = block(x)
    finally:
        handle.remove()
        del block.experts.forward
    return output[0] if isinstance(output, tuple) else output
