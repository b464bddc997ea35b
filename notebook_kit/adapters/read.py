"""One look at LoRA adapters, wherever they are: module to two thin factors, with the scaling inside."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from notebook_kit.adapters._adapter import Adapter, exact, is_conv1d
from notebook_kit.adapters._adapter import adapters as adapters_in
from notebook_kit.adapters._peft_format import CONFIG, read_config, read_pairs, read_tensors, setting_of
from notebook_kit.weights import Weights

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AdapterFactors:
    """An adapter as the change it makes: ΔW = left @ right for each module, the scaling multiplied in.

    Args:
        factors: module to left [d_out, r] and right [r, d_in], in float32 at least.
        config: of the peft folder it came from; empty for others.
        label: what to call it.
        scalings: module to the scaling that is in left; 1 where it is not named.
    """

    factors: Mapping[str, Pair]
    config: Mapping[str, object] = field(default_factory=dict)
    label: str = ""
    scalings: Mapping[str, float] = field(default_factory=dict)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether square hosts store their weight transposed (GPT-2)."""
        return bool(self.config.get("fan_in_fan_out", False))

    def to(self, device: torch.device) -> "AdapterFactors":
        """The same adapter with its factors on a device."""
        moved = {name: (left.to(device), right.to(device)) for name, (left, right) in self.factors.items()}
        return replace(self, factors=moved)

    def keys_in(self, base: Weights) -> dict[str, Pair]:
        """The factors by the name of the base's tensor that they change.

        Raises:
            ValueError: a module has no weight in the base, or one of another shape; the nearest names are given.
        """
        label, found = self.label or "the adapter", {}
        for name, (left, right) in self.factors.items():
            key = f"{name}.weight"
            if key not in base:
                near = difflib.get_close_matches(key, list(base), n=2, cutoff=0.5)
                hint = f"; near it: {', '.join(near)}" if near else ""
                raise ValueError(f"{label} changes {name}, but the base has no {key!r}{hint}")
            shape, delta = _shape(base, key), (left.shape[0], right.shape[1])
            if shape not in (delta, delta[::-1]):
                raise ValueError(f"{label} changes {name} by a {list(delta)} matrix, but {key!r} is {list(shape)}")
            found[key] = (left, right)
        return found


Source = str | Path | nn.Module | tuple[Mapping[str, Tensor], float | Mapping[str, float]] | AdapterFactors


def is_adapter_folder(path: object) -> bool:
    """Say whether a path is a folder with an adapter_config.json."""
    return isinstance(path, (str, Path)) and (Path(path) / CONFIG).is_file()


def read_adapter(source: Source) -> AdapterFactors:
    """Read a LoRA adapter.

    Args:
        source: a peft folder (adapter_config.json, adapter_model.safetensors); a model that carries adapters with
            factors; or (tensors, scaling): "<module>.A" and "<module>.B" as `adapter_weights` names them, or peft's
            names, with the scaling (alpha / rank) as a number or module to number.

    Returns:
        AdapterFactors

    Raises:
        FileNotFoundError, BadCheckpoint, ValueError: as `load_peft`; a module with only one of A and B, factors that
            do not fit each other, or NaN or Inf in them.
        TypeError: something else was given; tensors without a scaling, for instance.
    """
    if isinstance(source, AdapterFactors):
        return source
    if isinstance(source, nn.Module):
        return _from_model(source)
    if isinstance(source, (str, Path)):
        return _from_folder(Path(source))
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Mapping):
        return _from_tensors(*source)
    if isinstance(source, Mapping):
        raise TypeError("an adapter's tensors do not hold its scaling: give (tensors, alpha / rank)")
    raise TypeError(f"an adapter is a peft folder, a model or (tensors, scaling), got {type(source).__name__}")


def _from_model(model: nn.Module) -> AdapterFactors:
    found: dict[str, Adapter] = dict(adapters_in(model))
    if not found:
        raise ValueError(f"{type(model).__name__} carries no adapter")
    factors = {name: tuple(part.clone() for part in adapter.factors()) for name, adapter in found.items()}
    config = {"fan_in_fan_out": all(is_conv1d(adapter.host) for adapter in found.values())}
    config["use_rslora"] = any(getattr(adapter, "rslora", False) for adapter in found.values())
    return AdapterFactors(factors, config, "", {name: getattr(a, "scaling", 1.0) for name, a in found.items()})


def _from_folder(folder: Path) -> AdapterFactors:
    config = read_config(folder)
    factors, scalings = {}, {}
    for name, (A, B) in read_pairs(read_tensors(folder), folder).items():
        rank = setting_of(config.get("rank_pattern"), name, config["r"])
        alpha = setting_of(config.get("alpha_pattern"), name, config["lora_alpha"])
        if rank != A.shape[0]:
            raise ValueError(f"{name}: {folder} says rank {rank}, but A has {A.shape[0]} rows")
        scalings[name] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        factors[name] = _pair(name, A, B, scalings[name])
    return AdapterFactors(factors, config, folder.name, scalings)


def _from_tensors(tensors: Mapping[str, Tensor], scaling: float | Mapping[str, float]) -> AdapterFactors:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+?)\.(?:lora_)?([AB])(?:\.\w+)?(?:\.weight)?", key)
        if match is None:
            raise ValueError(f"{key!r} is not the A or B of a LoRA adapter")
        parts.setdefault(match[1], {})[match[2]] = tensor
    factors, scalings = {}, {}
    for name, pair in parts.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"there is only one of A and B for {name}")
        if isinstance(scaling, Mapping) and name not in scaling:
            raise ValueError(f"no scaling is given for {name}")
        scalings[name] = float(scaling[name] if isinstance(scaling, Mapping) else scaling)
        factors[name] = _pair(name, pair["A"], pair["B"], scalings[name])
    if not factors:
        raise ValueError("the adapter holds no tensor")
    return AdapterFactors(factors, scalings=scalings)


def _pair(name: str, A: Tensor, B: Tensor, scaling: float) -> Pair:
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(f"{name}: A [rank, d_in] and B [d_out, rank] do not fit: {list(A.shape)} and {list(B.shape)}")
    left, right = scaling * exact(B), exact(A)
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise ValueError(f"{name}: A or B holds NaN or Inf")
    return left, right


def _shape(base: Weights, key: str) -> tuple[int, ...]:
    spec = getattr(base, "spec", None)  # a checkpoint on disk knows shapes from its header
    return spec()[key][0] if spec is not None else tuple(base[key].shape)
