"""Adapters and their merges work where their models are, on a device that is not the CPU (`tests.elsewhere`)."""

import pytest
import torch
from torch import nn

from notebook_kit.adapters import (
    LoRA,
    ParallelBottleneck,
    SeriesBottleneck,
    adapter_on,
    adapter_weights,
    attach,
    detach,
    fold,
    load_adapter_weights,
    load_peft,
    merge_adapters,
    save_peft,
)
from notebook_kit.merging import ties
from tests.elsewhere import Elsewhere, elsewhere, fetch, move, send

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def trained(adapter, seed=1, **values):
    """A model with adapters that are not zero."""
    model = small()
    attach(model, adapter, targets=r"^\d$", rank=2, **values)
    values = adapter_weights(model)
    g = torch.Generator().manual_seed(seed)
    load_adapter_weights(model, {name: torch.randn(t.shape, generator=g) * 0.3 for name, t in values.items()})
    return model


def close(ours, expected):
    assert isinstance(ours, Elsewhere)
    torch.testing.assert_close(fetch(ours.detach()), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", [LoRA, ParallelBottleneck, SeriesBottleneck])
def test_attach_load_fold_and_detach(adapter):
    linear = {} if adapter is LoRA else {"activation": "identity"}
    here, away, other = trained(adapter, **linear), move(small()), move(small())
    expected, x = here(X), send(X)
    with elsewhere():
        for model in (away, other):
            attach(model, adapter, targets=r"^\d$", rank=2, **linear)
            load_adapter_weights(model, adapter_weights(here))  # tensors of the CPU
            close(model(x), expected)
            model(x).square().mean().backward()
        assert all(isinstance(tensor, Elsewhere) for tensor in adapter_weights(away).values())
        close(fold(away)(x), expected)
        close(detach(other)(x), small()(X))


def test_folders_are_read_onto_the_models_device(tmp_path):
    here, away = trained(LoRA), move(small())
    save_peft(here, tmp_path / "adapter")
    with elsewhere():
        load_peft(away, tmp_path / "adapter")
        close(away(send(X)), here(X))


@pytest.mark.parametrize("how", [{}, {"rank": 2}, {"method": ties, "density": 0.5, "scope": "tensor"}])
def test_merged_adapters_from_two_devices(how, tmp_path):
    """The merge lives where the first adapter does; a folder is on the CPU, a model where it is."""
    first, second, base = trained(LoRA), trained(LoRA, seed=2), small().state_dict()
    save_peft(second, tmp_path / "second")
    sources = [(adapter_weights(first), first[0].scaling), tmp_path / "second"]
    expected = merge_adapters(sources, **how)
    with elsewhere():
        merged = merge_adapters([(send(adapter_weights(first)), first[0].scaling), tmp_path / "second"], **how)
        for name, delta in merged.deltas().items():
            close(delta, expected.deltas()[name])
        for name, tensor in merged.on(send(base)).items():
            close(tensor, expected.on(base)[name])
        for name, tensor in adapter_on(send(base), tmp_path / "second").items():  # the base decides
            close(tensor, adapter_on(base, tmp_path / "second")[name])
