"""The adapter that a merge makes: its factors, what was lost, its place in a model, its folder."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from notebook_kit.adapters._peft_format import pattern_of, write_folder
from notebook_kit.adapters.read import AdapterFactors, Source, read_adapter
from notebook_kit.weights import Weights, at_least_float32

Left, Right = Float[Tensor, "d_out r"], Float[Tensor, "r d_in"]


@dataclass(frozen=True)
class MergedAdapter:
    """One adapter made of several: ΔW = left @ right for each module, and what was lost on the way.

    Args:
        factors: module to left [d_out, rank] and right [rank, d_in], in float32; the scaling is in them.
        rows: one a module: what `report` shows.
        like: the adapter whose configuration a saved folder takes over.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    rows: tuple[dict, ...] = ()
    like: AdapterFactors = field(default_factory=lambda: AdapterFactors({}), repr=False)

    @property
    def report(self):
        """DataFrame: module, rank_before (of the merged ΔW), rank, norm, error (share of ΔW's norm lost), missing."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=["module", "rank_before", "rank", "norm", "error", "missing"])

    @property
    def error(self) -> float:
        """Share of the norm of all ΔW together that the cut to `rank` lost; 0 without a cut."""
        lost = sum((row["error"] * row["norm"]) ** 2 for row in self.rows)
        whole = sum(row["norm"] ** 2 for row in self.rows)
        return math.sqrt(lost / whole) if whole else 0.0

    def deltas(self) -> dict[str, Float[Tensor, "d_out d_in"]]:
        """Each module's ΔW, dense."""
        return {name: left @ right for name, (left, right) in self.factors.items()}

    def on(self, base: Weights) -> dict[str, Tensor]:
        """The base's weights with the change in them.

        Raises:
            ValueError: a module is not in the base, or of another shape.
        """
        return adapter_on(base, AdapterFactors(self.factors, config=self.like.config))

    def save(self, folder: str | Path) -> Path:
        """Write a folder that `load_peft` and `peft.PeftModel.from_pretrained` read; alpha = rank, so the scaling is 1.

        Raises:
            FileExistsError: the folder exists.
        """
        ranks = {name: left.shape[1] for name, (left, _) in self.factors.items()}
        factors = {name: (right, left) for name, (left, right) in self.factors.items()}
        return write_folder(folder, _config(ranks, self.like.config), factors)

    def __repr__(self):
        ranks = sorted({left.shape[1] for left, _ in self.factors.values()})
        text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return f"MergedAdapter({len(self.factors)} modules, {text}, error {self.error:.2g})"


def adapter_on(base: Weights, adapter: Source | AdapterFactors) -> dict[str, Tensor]:
    """Give a model's weights with an adapter's change in them: the full-weight expert that the adapter stands for.

    Args:
        base: state dict of the model that the adapter was trained on; not modified.
        adapter: what `read_adapter` reads.

    Returns:
        dict: base's keys, shapes and dtypes; sums in float32 at least, rounded once.

    Raises:
        ValueError: a module is not in the base (the nearest names are given), or its weight has another shape.
    """
    adapter = read_adapter(adapter)
    result = {key: tensor.clone() for key, tensor in base.items()}
    for key, (left, right) in adapter.keys_in(base).items():
        result[key] = add_delta(result[key], left, right, adapter.fan_in_fan_out)
    return result


def add_delta(weight: Tensor, left: Left, right: Right, fan_in_fan_out: bool = False) -> Tensor:
    """W + left @ right, in W's layout and dtype."""
    wide = at_least_float32(weight)
    delta = left.to(wide) @ right.to(wide)
    square = delta.shape[0] == delta.shape[1]
    transposed = fan_in_fan_out if square else tuple(weight.shape) != tuple(delta.shape)
    return (wide + (delta.T if transposed else delta)).to(weight.dtype)


def _config(ranks: Mapping[str, int], like: Mapping[str, object]) -> dict[str, object]:
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {pattern_of(name): r for name, r in ranks.items() if r != rank}
    names = list(ranks)
    # peft takes a name for every module that ends with it; a regular expression stands for exactly these.
    short = any("." not in name or any(other.endswith(f".{name}") for other in names) for name in names)
    return {
        "peft_type": "LORA",
        "task_type": like.get("task_type"),
        "base_model_name_or_path": like.get("base_model_name_or_path"),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "fan_in_fan_out": bool(like.get("fan_in_fan_out", False)),
        "target_modules": "|".join(map(re.escape, names)) if short else names,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
