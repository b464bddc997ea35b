"""LoRA in the format of the `peft` library, both ways: a folder with adapter_config.json and adapter_model.safetensors.

Tensor names there are "base_model.model.<module>.lora_A.weight" and "...lora_B.weight", in the shapes used here.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from notebook_kit import checkpoints
from notebook_kit.adapters._adapter import adapters, is_conv1d, sizes
from notebook_kit.adapters._attach import find_hosts, place, refuse_nesting
from notebook_kit.adapters.lora import LoRA

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# Fields of peft's LoraConfig that change the function; with any other value LoRA here would compute something else.
PLAIN = {
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    # The other initialisations subtract the adapter's first value from the base weights.
    "init_lora_weights": (True, False, "gaussian", "eva"),
}


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
    folder = Path(folder)
    found = dict(adapters(model))
    if not found:
        raise ValueError(f"{type(model).__name__} carries no adapter: nothing to save")
    others = [name for name, adapter in found.items() if not isinstance(adapter, LoRA)]
    if others:
        raise ValueError(f"peft's format holds LoRA only; {others[0]} carries {type(found[others[0]]).__name__}")
    if folder.exists():
        raise FileExistsError(f"{folder} exists; give a folder that does not")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {folder.absolute().parent} to write {folder.name} in")
    config = _config(model, found)
    tensors = {}
    for name, adapter in found.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = adapter.A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = adapter.B
    with checkpoints.atomic(folder) as partial:
        partial.mkdir()
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        checkpoints.save(tensors, partial / WEIGHTS)
    return folder


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
    config, tensors = _read_config(folder), _read_tensors(folder)
    pairs = _pairs(tensors, folder)
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
        "rank_pattern": {_key(name): a.rank for name, a in found.items() if a.rank != rank},
        "alpha_pattern": {_key(name): a.alpha for name, a in found.items() if a.alpha != alpha},
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "fan_in_fan_out": all(is_conv1d(a.host) for a in found.values()),
        "target_modules": _target_modules(model, found),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _key(name: str) -> str:
    # peft looks for r"(.*\.)?(key)$" with re.match; "^" keeps "fc" from standing for "block.fc" as well.
    return f"^{re.escape(name)}"


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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}")
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} describes {kind!r}; `load_peft` reads LORA")
    for field, allowed in PLAIN.items():
        value = config.get(field, allowed[0])
        if not any(value == option and type(value) is type(option) for option in allowed):
            raise ValueError(f"{path} sets {field}={value!r}, which LoRA here does not do (it takes {allowed[0]!r})")
    for field, default in (("r", 8), ("lora_alpha", 8), ("lora_dropout", 0.0)):
        number = config.setdefault(field, default)
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ValueError(f"{path} sets {field}={number!r}, expected a number")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise ValueError(f"{path} sets {field}={config[field]!r}, expected names to numbers")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise checkpoints.BadCheckpoint(
                f"{folder / PICKLE} is a pickle, which can run code when it is opened, so it is refused. In a place "
                f"you trust, convert it once: safetensors.torch.save_file(torch.load({PICKLE!r}, weights_only=True), "
                f"{WEIGHTS!r})"
            )
        raise FileNotFoundError(f"no {WEIGHTS} in {folder}")
    return checkpoints.load(folder / WEIGHTS)


def _pairs(tensors: dict[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module name."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None:
            hint = "; LoRA on embeddings is not supported" if "lora_embedding" in key else ""
            raise ValueError(f"{folder / WEIGHTS} holds {key!r}, which is not the A or B of a linear layer{hint}")
        parts.setdefault(match[1], {})[match[2]] = tensor
    if not parts:
        raise ValueError(f"{folder / WEIGHTS} holds no tensor")
    for name, pair in parts.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{folder / WEIGHTS} holds only one of A and B for {name}")
    return {name: (pair["A"], pair["B"]) for name, pair in parts.items()}


def _build(name: str, host: nn.Module, A: Tensor, B: Tensor, config: dict[str, Any]) -> LoRA:
    rank = _pattern(config.get("rank_pattern"), name, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
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


def _pattern(patterns: dict[str, Any] | None, name: str, default: float) -> float:
    """peft's rule: the first key that matches the end of the name, from a dot on."""
    for key, value in (patterns or {}).items():
        try:
            found = re.match(rf"(.*\.)?({key})$", name)
        except re.error as error:
            raise ValueError(f"{CONFIG} has {key!r} in a pattern, which is no regular expression: {error}") from None
        if found:
            return value
    return default
