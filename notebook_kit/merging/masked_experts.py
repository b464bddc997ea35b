"""Experts as one shared vector and a mask of bits each: what `tall_masks` returns, in memory and on disk."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from notebook_kit.checkpoints import BadCheckpoint, load, save
from notebook_kit.weights import at_least_float32


def pack(mask: Bool[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """Eight booleans a byte; the last byte is filled up with zeros."""
    return torch.from_numpy(np.packbits(mask.reshape(-1).cpu().numpy())).to(mask.device)


def unpack(bits: UInt8[Tensor, " bytes"], shape: Sequence[int]) -> Bool[Tensor, "..."]:
    """The mask of a shape again."""
    mask = torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=math.prod(shape))).bool()
    return mask.reshape(tuple(shape)).to(bits.device)


@dataclass(frozen=True)
class MaskedExperts:
    """K experts in the space of two models and K bits a weight.

    Args:
        base: state dict θ₀.
        merged: the multi-task vector τ_MTL of each floating tensor, in its dtype.
        bits: for each expert and floating tensor its mask, packed.
        names: of the experts.
    """

    base: dict[str, Tensor]
    merged: dict[str, Tensor]
    bits: list[dict[str, Tensor]]
    names: list[str]

    def __len__(self) -> int:
        return len(self.bits)

    def __repr__(self) -> str:
        shares = ", ".join(f"{name} {density:.2f}" for name, density in zip(self.names, self.densities(), strict=True))
        return (
            f"MaskedExperts({len(self)} experts of {sum(t.numel() for t in self.merged.values()):,} weights: {shares})"
        )

    def expert(self, which: int | str) -> dict[str, Tensor]:
        """Expert `which`, by place or name, reconstructed: θ₀ + m ⊙ τ_MTL.

        Returns:
            dict: a state dict with base's keys, shapes and dtypes.

        Raises:
            ValueError: there is no such expert.
        """
        return self._plus(self.mask(which))

    def unmasked(self, scale: float = 1.0) -> dict[str, Tensor]:
        """The merge without any mask, θ₀ + scale · τ_MTL: what the masks rescue the experts from."""
        return self._plus({}, scale)

    def mask(self, which: int | str) -> dict[str, Tensor]:
        """The boolean mask of expert `which`, by tensor name.

        Raises:
            ValueError: there is no such expert.
        """
        place = self.names.index(which) if which in self.names else which
        if not isinstance(place, int) or not 0 <= place < len(self):
            raise ValueError(f"no expert {which!r}: there are 0 to {len(self) - 1}, called {', '.join(self.names)}")
        return {name: unpack(bits, self.merged[name].shape) for name, bits in self.bits[place].items()}

    def densities(self) -> list[float]:
        """Share of the weights that each expert's mask keeps."""
        d = sum(tensor.numel() for tensor in self.merged.values())
        return [sum(int(np.bitwise_count(b.cpu().numpy()).sum()) for b in of.values()) / max(1, d) for of in self.bits]

    def claims(self) -> dict[str, Tensor]:
        """How many experts claim each weight: 0 is catastrophic, 1 selfish."""
        counts = {name: torch.zeros_like(tensor, dtype=torch.int64) for name, tensor in self.merged.items()}
        for i in range(len(self)):
            for name, mask in self.mask(i).items():
                counts[name] += mask
        return counts

    def sizes(self) -> dict[str, float]:
        """Bytes: the base, the merged vector, the masks, all three; the models they stand for; and the ratio."""
        base, merged = (sum(tensor.nbytes for tensor in part.values()) for part in (self.base, self.merged))
        masks = sum(bits.nbytes for of_expert in self.bits for bits in of_expert.values())
        total, apart = base + merged + masks, base * (1 + len(self))
        return {"base": base, "merged": merged, "masks": masks, "total": total, "apart": apart, "ratio": apart / total}

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically.

        Args:
            path: the file.

        Returns:
            The path written.
        """
        parts = {f"base/{name}": tensor for name, tensor in self.base.items()}
        parts |= {f"merged/{name}": tensor for name, tensor in self.merged.items()}
        for i, of_expert in enumerate(self.bits):
            parts |= {f"mask {i}/{name}": bits for name, bits in of_expert.items()}
        parts["names"] = torch.frombuffer(bytearray(json.dumps(self.names).encode()), dtype=torch.uint8)
        return save(parts, path)

    @classmethod
    def load(cls, path: str | Path) -> "MaskedExperts":
        """Read what `save` wrote.

        Args:
            path: the file.

        Raises:
            BadCheckpoint: not such a file, or its parts do not fit together; the text says which.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load(path).items():
            part, _, name = key.partition("/")
            found.setdefault(part, {})[name] = tensor
        base, merged, names = found.pop("base", {}), found.pop("merged", {}), found.pop("names", {}).get("")
        if names is None:
            raise BadCheckpoint(
                f"{path} holds no masked experts: it has no tensor 'names'; MaskedExperts.save writes one"
            )
        names = _texts(names, path)
        if set(found) - {f"mask {i}" for i in range(len(names))}:
            raise BadCheckpoint(f"{path} holds masks for other experts than its {len(names)} names: {', '.join(found)}")
        bits = [found.get(f"mask {i}", {}) for i in range(len(names))]
        for name, tensor in merged.items():
            if name not in base or base[name].shape != tensor.shape:
                raise BadCheckpoint(f"{path}: 'merged/{name}' has no tensor of its shape in the base")
            for i, of_expert in enumerate(bits):
                if name not in of_expert or of_expert[name].shape != ((tensor.numel() + 7) // 8,):
                    raise BadCheckpoint(f"{path}: 'mask {i}/{name}' must hold {(tensor.numel() + 7) // 8} bytes")
        return cls(base, merged, bits, names)

    def _plus(self, mask: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        result = {name: tensor.clone() for name, tensor in self.base.items()}
        for name, tau in self.merged.items():
            start, change = at_least_float32(self.base[name]), at_least_float32(tau) * scale
            result[name] = (start + (change * mask[name] if mask else change)).to(tau.dtype)
        return result


def _texts(tensor: Tensor, path: str | Path) -> list[str]:
    try:
        names = json.loads(bytes(tensor.tolist()))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadCheckpoint(f"{path}: 'names' is no list of texts in JSON; MaskedExperts.save writes one")
    return names
