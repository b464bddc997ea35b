"""Frank-Wolfe over a pool of LoRA adapters: in the space of the weights' changes, and factor by factor."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from notebook_kit.adapters import (
    LoRA,
    adapter_on,
    adapter_weights,
    attach,
    fold,
    load_adapter_weights,
    merge_adapters,
)
from notebook_kit.merging import frank_wolfe, frank_wolfe_path, save
from notebook_kit.weights import Checkpoint

TARGETS = (0, 1)  # the pool's adapters that the target tasks need; the others are strangers
SCALING = 2.0


def network(seed=0):
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    return model


def with_adapters():
    model = network()
    attach(model, LoRA, targets=r"^\d$", rank=2, alpha=2 * SCALING)
    return model


def adapter(seed):
    """Adapter weights as if trained: both factors are there."""
    g = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(t.shape, generator=g) for name, t in adapter_weights(with_adapters()).items()}


def data_of(tensors, seed):
    """A task that this adapter solves: its network's own outputs."""
    model = with_adapters()
    load_adapter_weights(model, tensors)
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(seed))
    return x, model(x).detach()


def squared_error(output, batch, task):
    return F.mse_loss(output, batch[1])


@pytest.fixture(scope="module")
def pool():
    return [adapter(seed) for seed in range(1, 7)]


@pytest.fixture(scope="module")
def batches(pool):
    return {str(i): data_of(pool[i], seed=i) for i in TARGETS}


@pytest.fixture(scope="module")
def walked(pool, batches):
    base = network().state_dict()
    experts = [adapter_on(base, (tensors, SCALING)) for tensors in pool]
    settings = {"init": "base", "steps": 16, "task_loss": squared_error}
    return base, frank_wolfe_path(base, experts, model=network(), batches=batches, **settings)


def test_the_adapters_that_help_are_picked(walked):
    _, path = walked
    assert path.picks[:2].flatten().tolist() == list(TARGETS)
    shares = path.coefficients[-1, 0, 1:]
    assert float(shares[list(TARGETS)].sum()) > 0.85  # the four strangers share the rest
    assert path.losses[-1].mean() < 0.6 * path.losses[0].mean()
    assert (path.gaps >= 0).all()


def test_the_coefficients_make_one_adapter_of_the_pool(walked, pool, batches):
    """Every iterate is a convex combination: what was found among full weights is one LoRA of the shares' ranks."""
    base, path = walked
    shares = path.coefficients[-1, 0]
    assert (shares >= 0).all()
    assert float(shares.sum()) == pytest.approx(1, abs=1e-5)
    merged = merge_adapters([(tensors, SCALING) for tensors in pool], weights=shares[1:].tolist())
    for name, tensor in merged.on(base).items():
        torch.testing.assert_close(tensor, path.merged[name], rtol=1e-4, atol=1e-5)
    assert merged.report["rank"].max() <= 2 * int((shares[1:] > 0).sum())  # adapters of rank 2
    model, ready = network(), network()
    ready.load_state_dict(path.merged)
    model.load_state_dict(merged.on(base))
    x, _ = batches["0"]
    torch.testing.assert_close(model(x), ready(x), rtol=1e-4, atol=1e-5)


def test_the_base_is_a_vertex_where_no_adapter_helps(pool):
    """The zero change: with the base as the start, a target that the base solves best leaves it alone."""
    base, x = network().state_dict(), torch.randn(100, 16)
    experts = [adapter_on(base, (tensors, SCALING)) for tensors in pool]
    run = {"model": network(), "batches": {"as it was": (x, network()(x).detach())}, "task_loss": squared_error}
    path = frank_wolfe_path(base, experts, init="base", **run)
    assert len(path.picks) == 0
    assert all(torch.equal(path.merged[name], tensor) for name, tensor in base.items())
    joined = frank_wolfe_path(base, [*experts, base], initial_vertex=False, steps=6, **run)  # from a merge, back to it
    assert joined.picks[0, 0, 0] == len(pool)
    assert float(joined.losses[1]) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_factor_by_factor_as_the_official_code(pool, batches, granularity):
    """The vertices are the dicts of A and B; the model that carries them is asked, and its own weights stay.

    Halves of two factor pairs are no half of the two changes, so no task's loss is promised to fall.
    """
    model = with_adapters()
    begin = adapter_weights(model)  # A random, B zero: the base model, with a gradient
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"init": "base", "steps": 8, "task_loss": squared_error, "granularity": granularity}
    path = frank_wolfe_path(begin, pool, model=model, batches=batches, **settings)
    assert path.losses[-1].mean() < path.losses[0].mean()
    assert list(path.merged) == list(begin)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())
    shares = path.coefficients[-1]
    for i, layer in enumerate(path.layers):
        for name in [layer] if granularity == "layer" else list(begin):
            parts = [begin[name], *(tensors[name] for tensors in pool)]
            torch.testing.assert_close(sum(c * t for c, t in zip(shares[i], parts, strict=True)), path.merged[name],
                                       rtol=1e-4, atol=1e-5)  # fmt: skip
    if granularity == "task":
        assert int(path.picks[0]) in TARGETS
    load_adapter_weights(model, path.merged)
    x, _ = batches["0"]
    again = with_adapters()
    load_adapter_weights(again, path.merged)
    torch.testing.assert_close(fold(model)(x), again(x), rtol=1e-4, atol=1e-5)


def test_a_pool_on_disk(pool, batches, tmp_path):
    begin = adapter_weights(with_adapters())
    run = {"model": with_adapters(), "batches": batches, "init": "base", "steps": 4, "task_loss": squared_error}
    files = [Checkpoint(save(tensors, tmp_path / f"{i}.safetensors")) for i, tensors in enumerate(pool)]
    streamed, expected = frank_wolfe(begin, files, **run), frank_wolfe(begin, pool, **run)
    assert all(torch.equal(streamed[name], tensor) for name, tensor in expected.items())
