"""A second device, played on the CPU: whoever mixes it with the CPU fails as on a GPU, and no GPU is needed.

A tensor "elsewhere" says that its device is "meta" (autograd and factories accept that word without any hardware) and
keeps its numbers in a CPU tensor inside. `elsewhere()` watches every operation: one that gets tensors from both places
fails as CUDA's does; so does a draw elsewhere with a generator of the CPU.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

AWAY = torch.device("meta")
aten = torch.ops.aten
# CUDA lets these cross: copies, and indices that are still on the CPU.
COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class Elsewhere(torch.Tensor):
    """A tensor of the second device; its numbers are in `.here`."""

    @staticmethod
    def __new__(cls, here):
        size, strides = here.shape, here.stride()
        return torch.Tensor._make_wrapper_subclass(cls, size, strides, here.storage_offset(), None, here.dtype,
                                                   here.layout, AWAY, False, here.requires_grad)  # fmt: skip

    def __init__(self, here):
        self.here = here

    def data_ptr(self):
        return self.here.data_ptr()

    def tolist(self):
        return self.here.tolist()

    def new_tensor(self, data):
        return Elsewhere(self.here.new_tensor(data))

    def numpy(self, *, force=False):
        raise TypeError("can't convert meta device type tensor to numpy; copy it to the CPU first")

    def __repr__(self):
        return f"Elsewhere({self.here})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    used = (args[0], *args[2:]) if func in INDEXING else args  # the indices themselves may be of the CPU
    tensors = [leaf for leaf in tree_leaves((used, kwargs)) if isinstance(leaf, torch.Tensor)]
    away = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    scalars_pass = "TensorList" not in str(func._schema) and "Tensor[]" not in str(func._schema)
    here = [t for t in tensors if not isinstance(t, Elsewhere) and not (scalars_pass and t.dim() == 0)]
    if away and here and func not in COPIES:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found two devices, meta and cpu")
    indices = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Elsewhere)]
    if indices and not away and func not in COPIES:
        raise RuntimeError(f"{func}: indices of another device, meta, than the indexed tensor's, cpu")
    device = kwargs.get("device")
    result_away = away if device is None else torch.device(device) == AWAY
    if func is aten.copy_.default:
        result_away = isinstance(args[0], Elsewhere)
    if result_away and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{func}: expected a generator of device meta, found one of cpu")
    if result_away and func is aten.multinomial.default and args[3:] and args[3] is not None:
        raise RuntimeError(f"{func}: expected a generator of device meta, found one of cpu")

    def unwrap(leaf):
        return leaf.here if isinstance(leaf, Elsewhere) else leaf

    plain = tree_map(unwrap, args)
    options = tree_map(unwrap, kwargs)
    if device is not None:
        options["device"] = torch.device("cpu")
        if func is aten._to_copy.default and torch.device(device) != (AWAY if away else torch.device("cpu")):
            options["dtype"] = options.get("dtype") or plain[0].dtype
    out = func(*plain, **options)

    def wrap(leaf):
        return Elsewhere(leaf) if result_away and isinstance(leaf, torch.Tensor) else leaf

    return return_and_correct_aliasing(func, args, kwargs, tree_map(wrap, out)) if away else tree_map(wrap, out)


@contextmanager
def elsewhere():
    """While this runs, operations that mix the two devices fail."""
    with _Watch():
        yield


def send(value):
    """Tensors, in whatever lists, tuples and dicts, on the second device."""
    return tree_map(lambda leaf: Elsewhere(leaf.detach().clone()) if isinstance(leaf, torch.Tensor) else leaf, value)


def fetch(value):
    """Their numbers, back on the CPU."""
    return tree_map(lambda leaf: leaf.here if isinstance(leaf, Elsewhere) else leaf, value)


def move(model: nn.Module) -> nn.Module:
    """A module's parameters and buffers on the second device, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else nn.Parameter(send(parameter))
        for name, buffer in module._buffers.items():
            module._buffers[name] = send(buffer)
    return model
