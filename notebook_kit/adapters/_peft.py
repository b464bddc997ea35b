"""LoRA in the format of the `peft` library, both ways: from a model to a folder, and from a folder into a model."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from notebook_kit.adapters._adapter import adapters, is_conv1d, sizes
from notebook_kit.adapters._peft_format import (
    pattern_of,
    read_config,
    read_pairs,
    read_tensors,
    setting_of,
    write_folder,
)
from notebook_kit.adapters._place import place, refuse_nesting
from notebook_kit.adapters._targets import find_hosts
from notebook_kit.adapters.lora import LoRA


def save_peft(model: nn.Module, folder: str | Path) -> Path:
    """Save a model's LoRA adapters so that `peft.PeftModel.from_pretrained(base_model, folder)` loads them.

    Args:
        model: a model whose adapters are all `LoRA`, with one `dropout` and one `rslora`.
        folder: a folder that does not exist yet; it appears only when complete.

    Returns:
        The folder.

    Raises:
        ValueError: no adapter, one that is not LoRA, or settings that peft's format cannot hold.
        FileExistsError: the folder exists.
    """
    found = dict(adapters(model))
    if not found:
        raise ValueError(f"{type(model).__name__} carries no adapter: nothing to save")
    others = [name for name, adapter in found.items() if not isinstance(adapter, LoRA)]
    if others:
        raise ValueError(f"peft's format holds LoRA only; {others[0]} carries {type(found[others[0]]).__name__}")
    factors = {name: (adapter.A, adapter.B) for name, adapter in found.items()}
    return write_folder(folder, _config(model, found), factors)


def load_peft(model: nn.Module, folder: str | Path) -> list[str]:
    """Attach the LoRA adapters that peft (or `save_peft`) saved; what `attach` says of freezing holds here.

    Args:
        model: the base model they were trained on; changed in place.
        folder: with adapter_config.json and adapter_model.safetensors.

    Returns:
        The names of the modules that now carry LoRA.

    Raises:
        FileNotFoundError: one of the two files is missing.
        BadCheckpoint: the weights are a pickle, or damaged.
        ValueError: the configuration asks for what LoRA here does not do, or the tensors do not fit it or the model;
            the text names them. Nothing was changed then.
        TypeError: a module of the checkpoint is not a linear layer.
    """
    folder = Path(folder)
    config, tensors = read_config(folder), read_tensors(folder)
    pairs = read_pairs(tensors, folder)
    refuse_nesting(model)
    for name in set(pairs) - {name for name, _ in model.named_modules()}:
        find_hosts(model, LoRA, rf"^{re.escape(name)}$")  # raises, with the nearest names
    hosts = find_hosts(model, LoRA, lambda name, module: name in pairs)
    tensors_of = {id(model.get_submodule(name)): pair for name, pair in pairs.items()}
    built = {name: _build(name, host, *tensors_of[id(host)], config) for name, host in hosts.items()}
    place(model, built)
    return list(built)


def _config(model: nn.Module, found: dict[str, LoRA]) -> dict[str, Any]:
    for field in ("dropout", "rslora"):
        values = {getattr(adapter, field): name for name, adapter in found.items()}
        if len(values) > 1:
            text = ", ".join(f"{value} at {name}" for value, name in values.items())
            raise ValueError(f"peft's format holds one {field} for all modules, got {text}")
    first = next(iter(found.values()))
    rank, alpha = (
        Counter(getattr(a, field) for a in found.values()).most_common(1)[0][0] for field in ("rank", "alpha")
    )
    config = getattr(model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {pattern_of(name): a.rank for name, a in found.items() if a.rank != rank},
        "alpha_pattern": {pattern_of(name): a.alpha for name, a in found.items() if a.alpha != alpha},
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "fan_in_fan_out": all(is_conv1d(a.host) for a in found.values()),
        "target_modules": _target_modules(model, found),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _target_modules(model: nn.Module, found: dict[str, LoRA]) -> list[str] | str:
    """Full names; where one is also the end of another module's name, a regular expression for exactly these."""
    names = [name for name, _ in model.named_modules()]
    if any(other.endswith(f".{name}") for name in found for other in names):
        return "|".join(map(re.escape, found))
    return list(found)


def _task(model: nn.Module) -> str | None:
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if encoder_decoder and name.endswith("ForConditionalGeneration") else None


def _build(name: str, host: nn.Module, A: Tensor, B: Tensor, config: dict[str, Any]) -> LoRA:
    rank = setting_of(config.get("rank_pattern"), name, config["r"])
    alpha = setting_of(config.get("alpha_pattern"), name, config["lora_alpha"])
    d_in, d_out = sizes(host)
    expected, came = ((rank, d_in), (d_out, rank)), (tuple(A.shape), tuple(B.shape))
    if came != expected:
        raise ValueError(
            f"{name}: A and B must be {expected[0]} and {expected[1]} (rank {rank}), got {came[0]} and {came[1]}"
        )
    for letter, tensor in (("A", A), ("B", B)):
        if not (tensor.is_floating_point() and math.isfinite(tensor.float().abs().max())):
            raise ValueError(
                f"{name}: {letter} must hold finite floating-point numbers, it is {tensor.dtype} or holds NaN or Inf"
            )
    try:
        adapter = LoRA(
            host, rank=rank, alpha=alpha, dropout=config["lora_dropout"], rslora=bool(config.get("use_rslora"))
        )
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from error
    adapter.A.data.copy_(A)
    adapter.B.data.copy_(B)
    return adapter
