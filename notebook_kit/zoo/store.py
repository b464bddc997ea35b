"""Where the checkpoints lie: safetensors files in the package, and a manifest that says how each was made."""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from notebook_kit import weights as weights_io

FOLDER = Path(__file__).parent / "checkpoints"


def manifest() -> dict[str, dict]:
    """Return what is known of each bed.

    Returns:
        Bed to seed, minutes (CPU time of training), score (test split: checkpoint to task to figure), files (bytes and
        SHA-256), torch version; for the mixture also router: per layer bits, chance_mean, chance_99, and load.
    """
    path = FOLDER / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record(bed: str, entry: Mapping) -> None:
    """Write one bed's entry of the manifest, with the size and the SHA-256 of each of its files.

    Args:
        bed: the bed's name, which is also its folder.
        entry: anything JSON can hold.
    """
    paths = sorted(p for p in (FOLDER / bed).iterdir() if p.is_file())
    files = {p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in paths}
    beds = manifest() | {bed: {**entry, "torch": torch.__version__, "files": files}}
    text = json.dumps(dict(sorted(beds.items())), indent=1) + "\n"
    (FOLDER / "manifest.json").write_text(text, encoding="utf-8")


def write(bed: str, name: str, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Save one state dict of a bed.

    Args:
        bed: the bed's name.
        name: of the checkpoint, without an ending.
        weights: state dict.
        dtype: of the numbers on disk.
    """
    (FOLDER / bed).mkdir(parents=True, exist_ok=True)
    rounded = {key: tensor.detach().to(dtype).contiguous() for key, tensor in weights.items()}
    weights_io.save(rounded, FOLDER / bed / f"{name}.safetensors")


def write_config(bed: str, config: Mapping) -> None:
    """Save the fields of a model's configuration beside its checkpoints."""
    (FOLDER / bed).mkdir(parents=True, exist_ok=True)
    (FOLDER / bed / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_config(bed: str) -> dict:
    """Return the fields of a model's configuration."""
    return json.loads(_existing(bed, "config.json").read_text(encoding="utf-8"))


def read(bed: str, name: str) -> dict[str, Tensor]:
    """Load one state dict of a bed; every call gives new float32 tensors.

    Args:
        bed: the bed's name.
        name: of the checkpoint, without an ending.

    Returns:
        State dict.

    Raises:
        FileNotFoundError: the checkpoint was never built; the text has the command that builds it.
    """
    path = _existing(bed, f"{name}.safetensors")
    stamp = path.stat()
    return {key: tensor.clone() for key, tensor in _cached(path, stamp.st_mtime_ns, stamp.st_size).items()}


def _existing(bed: str, file: str) -> Path:
    path = FOLDER / bed / file
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `python -m notebook_kit.zoo.build {bed}`")
    return path


@lru_cache(maxsize=64)
def _cached(path: Path, changed_ns: int, size: int) -> dict[str, Tensor]:
    return {key: tensor.float() for key, tensor in weights_io.load(path).items()}
