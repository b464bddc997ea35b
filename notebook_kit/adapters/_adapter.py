"""What every adapter has in common: it stands where its host stood, and may know its form in weight space."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.weights import at_least_float32

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh, "identity": lambda z: z}


class CannotFold(ValueError):
    """The adapter has no weight-space form, or its host's weights cannot take it; the text says why."""


class Adapter(nn.Module):
    """Base of all adapters: keeps the host as `self.host`, and lets the model read the host's attributes through it.

    A subclass writes `__init__` (trainable tensors made by `self.trainable`), `forward`, and, if its effect is a
    change of the host's weights, `factors` or `delta`.

    Args:
        host: the module to stand around: nn.Linear, or transformers' Conv1D (a linear layer that stores its weight
            transposed). A subclass for other hosts overrides `supports`.

    Raises:
        TypeError: the host is of another type, or its weight is quantised or not yet initialised.
    """

    hosts = "nn.Linear or transformers' Conv1D"

    def __init__(self, host: nn.Module):
        super().__init__()
        name = type(self).__name__
        if not self.supports(host):
            raise TypeError(f"{name} sits on {self.hosts}, got {type(host).__name__}")
        weight = getattr(host, "weight", None)
        if isinstance(weight, Tensor) and (nn.parameter.is_lazy(weight) or not weight.is_floating_point()):
            state = "not initialised yet" if nn.parameter.is_lazy(weight) else f"stored as {weight.dtype}"
            raise TypeError(
                f"{name} needs a host with a floating-point weight, this {type(host).__name__}'s is {state}"
            )
        self.host = host
        self.training = host.training

    def __getattr__(self, name: str):
        # Only reached for what the adapter itself lacks: models read `self.q_proj.weight.dtype` and the like.
        try:
            return super().__getattr__(name)
        except AttributeError:
            host = self.__dict__.get("_modules", {}).get("host")
            if host is None:
                raise
            return getattr(host, name)

    @classmethod
    def supports(cls, host: nn.Module) -> bool:
        """Say whether this adapter can sit on a module."""
        return is_linear(host)

    def trainable(self, *shape: int) -> nn.Parameter:
        """Make a parameter of zeros, on the host's device and in its dtype."""
        weight = getattr(self.host, "weight", None)
        if weight is None:  # the host is a sub-layer
            weight = next(parameter for parameter in self.host.parameters() if parameter.is_floating_point())
        return nn.Parameter(torch.zeros(shape, device=weight.device, dtype=weight.dtype))

    def factors(self) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
        """Give the change of the host's weight as a product of two thin matrices, left and right.

        Returns:
            left and right, in float32 at least; ΔW = left @ right, of shape [d_out, d_in] whatever the host's layout.

        Raises:
            CannotFold: the effect is not a change of the host's weight; the text says why.
        """
        raise CannotFold(f"{type(self).__name__} has no weight-space form")

    def delta(self) -> dict[str, Tensor]:
        """Give what folding adds to the host's parameters.

        Returns:
            dict: parameter name of the host ("weight", "bias") to a tensor of its shape, in float32 at least.

        Raises:
            CannotFold: as `factors`.
        """
        left, right = self.factors()
        return {"weight": as_stored(left @ right, self.host)}


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Every adapter in a model, by the name of the module it stands for."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Adapter))


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear layer: nn.Linear, or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Say whether a module is transformers' Conv1D (GPT-2), without importing transformers."""
    return any(
        (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D") for kind in type(module).__mro__
    )


def sizes(host: nn.Module) -> tuple[int, int]:
    """The sizes (d_in, d_out) of a linear host."""
    d_out, d_in = matrix(host).shape
    return d_in, d_out


def matrix(host: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """The host's weight W with y = W x, whatever the layout it is stored in."""
    return host.weight.T if is_conv1d(host) else host.weight


def as_stored(change: Float[Tensor, "d_out d_in"], host: nn.Module) -> Tensor:
    """A [d_out, d_in] matrix in the layout of the host's weight."""
    return change.T if is_conv1d(host) else change


def exact(tensor: Tensor) -> Tensor:
    """A tensor to compute a fold with: detached, float32 at least."""
    return at_least_float32(tensor.detach())


def check_rank(
    rank: int, host: nn.Module, adapter: str, limit: int | None = None, between: tuple[int, int] | None = None
) -> None:
    """Refuse a rank above `limit`, which is min(d_in, d_out) by default, of the host or as given by `between`.

    Raises:
        ValueError: names the rank, the host's sizes and the adapter.
    """
    d_in, d_out = between or sizes(host)
    limit = min(d_in, d_out) if limit is None else limit
    if rank > limit:
        raise ValueError(
            f"rank must be at most {limit} for a host of {d_in} inputs and {d_out} outputs, got {rank} ({adapter})"
        )
