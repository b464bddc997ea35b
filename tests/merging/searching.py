"""Small models for tests of merges that search: one with every odd kind of tensor, and one whose loss is a bowl."""

import torch
from torch import nn
from torch.nn import functional as F


class Odd(nn.Module):
    """A linear classifier beside a scalar, an empty tensor, integers and booleans."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))
        self.scalar = nn.Parameter(torch.zeros(()))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("steps", torch.tensor([3, 7]))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x):
        return F.linear(x, self.weight) * (1 + self.scalar)


class Point(nn.Module):
    """Returns its only parameter, whatever the input."""

    def __init__(self, d=3):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(d))

    def forward(self, _):
        return self.x


def odd_weights(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(3, 4, generator=g).to(dtype),
        "scalar": torch.randn((), generator=g).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "steps": torch.tensor([seed, 7]),
        "mask": torch.tensor([True, False]),
    }


def odd_data(n=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {task: (torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)) for task in ("north", "south")}


def unchanged(before, now):
    return all(torch.equal(before[key], now[key]) for key in before)


def copies(*models):
    return [{key: tensor.clone() for key, tensor in weights.items()} for weights in models]
