"""Weights as points of a vector space: one flat vector a model, tied parameters once, and back."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.weights import Weights, at_least_float32, float_keys

Flat = Float[Tensor, "models d"]


class FlatSpace:
    """The vectors of all models that look like base; entries in the order of base's keys, so layer after layer.

    Args:
        base: state dict that gives keys, shapes, dtypes and what is not floating. Two keys that share their memory
            (tied embedding and head) are one stretch of the vector.
    """

    def __init__(self, base: Weights):
        self.like = {name: tensor.detach().clone() for name, tensor in base.items()}
        first: dict[object, str] = {}
        self.owners = {}
        for name in float_keys(base):
            tensor = base[name]
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            shares = isinstance(base, dict) and tensor.numel() > 0  # a lazy mapping may reuse an address
            self.owners[name] = first.setdefault(place if shares else name, name)
        self.names = [name for name, owner in self.owners.items() if owner == name]
        self.sizes = [self.like[name].numel() for name in self.names]
        self.device = next((tensor.device for tensor in self.like.values()), torch.device("cpu"))

    def __len__(self) -> int:
        return sum(self.sizes)

    def flatten(self, models: Sequence[Weights]) -> Flat:
        """One row a model, in float32 at least."""
        empty = torch.empty(0, device=self.device)
        rows = [torch.cat([empty, *(at_least_float32(m[name]).reshape(-1) for name in self.names)]) for m in models]
        return torch.stack(rows)

    def weights(self, row: Float[Tensor, " d"]) -> dict[str, Tensor]:
        """The state dict of one row: base's keys, shapes and dtypes; tied keys hold one tensor."""
        one = {name: stack[0] for name, stack in self.stack(row[None]).items()}
        return {name: one.get(self.owners.get(name), tensor) for name, tensor in self.like.items()}

    def stack(self, flat: Flat) -> dict[str, Float[Tensor, "models ..."]]:
        """All rows at once: each floating parameter with a first axis for the models; tied ones by their first key."""
        pieces = zip(self.names, flat.split(self.sizes, dim=1), strict=True)
        like = self.like
        return {name: piece.reshape(len(flat), *like[name].shape).to(like[name].dtype) for name, piece in pieces}
