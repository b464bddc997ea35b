"""The folder in which the `peft` library keeps an adapter: its two files, read and written.

adapter_config.json says what the adapter is; adapter_model.safetensors holds "base_model.model.<module>.lora_A.weight"
and "...lora_B.weight", in the shapes used here. What LoRA here would not compute the same is refused.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from notebook_kit import checkpoints

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


def write_folder(folder: str | Path, config: Mapping[str, Any], factors: Mapping[str, tuple[Tensor, Tensor]]) -> Path:
    """Write an adapter's two files; the folder appears only when complete.

    Args:
        folder: a folder that does not exist yet.
        config: what adapter_config.json holds.
        factors: module to (A, B).

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists.
        FileNotFoundError: there is no folder to write it in.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; give a folder that does not")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {folder.absolute().parent} to write {folder.name} in")
    tensors = {}
    for name, (A, B) in factors.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
    with checkpoints.atomic(folder) as partial:
        partial.mkdir()
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        checkpoints.save(tensors, partial / WEIGHTS)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration, with peft's defaults; one that LoRA here cannot follow raises ValueError and says why."""
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


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors by their names in the file; a pickle is refused (BadCheckpoint)."""
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise checkpoints.BadCheckpoint(
                f"{folder / PICKLE} is a pickle, which can run code when it is opened, so it is refused. In a place "
                f"you trust, convert it once: safetensors.torch.save_file(torch.load({PICKLE!r}, weights_only=True), "
                f"{WEIGHTS!r})"
            )
        raise FileNotFoundError(f"no {WEIGHTS} in {folder}")
    return checkpoints.load(folder / WEIGHTS)


def read_pairs(tensors: dict[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
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


def setting_of(patterns: dict[str, Any] | None, name: str, default: float) -> float:
    """peft's rule: the first key that matches the end of the name, from a dot on."""
    for key, value in (patterns or {}).items():
        try:
            found = re.match(rf"(.*\.)?({key})$", name)
        except re.error as error:
            raise ValueError(f"{CONFIG} has {key!r} in a pattern, which is no regular expression: {error}") from None
        if found:
            return value
    return default


def pattern_of(name: str) -> str:
    """The key that stands for one module in rank_pattern and alpha_pattern."""
    # peft looks for r"(.*\.)?(key)$" with re.match; "^" keeps "fc" from standing for "block.fc" as well.
    return f"^{re.escape(name)}"
