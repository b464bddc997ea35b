"""The diffusion transformer: zero at birth, patches there and back, conditions that reach every block."""

import copy

import pytest
import torch
from torch import nn

from notebook_kit.models import MLP, DiffusionTransformer, flow_loss, sample
from notebook_kit.models.diffusion_transformer import position_table, time_features
from tests.untyped import untyped


def woken(seed=0, **settings):
    """A model whose zero weights are no longer zero."""
    torch.manual_seed(seed)
    model = DiffusionTransformer(**settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def batch(n=3, channels=1, size=8):
    return torch.randn(n, channels, size, size), torch.rand(n), torch.arange(n) % 10


@pytest.mark.parametrize("settings", [{}, {"channels": 3, "patch": 4}, {"size": 6, "patch": 3, "d_model": 16}])
def test_a_new_model_answers_zero_and_its_blocks_are_the_identity(settings):
    model = DiffusionTransformer(**settings)
    x, t, y = batch(channels=settings.get("channels", 1), size=settings.get("size", 8))
    assert torch.equal(model(x, t, y), torch.zeros_like(x))
    width = model.position.shape[1]
    tokens = torch.randn(2, 5, width)
    assert torch.equal(model.blocks(tokens, torch.randn(2, width)), tokens)


def test_a_block_without_gates_is_the_identity():
    block = woken().blocks[0]
    with torch.no_grad():
        for gate in (2, 5):
            block.modulation.weight.view(6, 48, 48)[gate] = 0
            block.modulation.bias.view(6, 48)[gate] = 0
    tokens = torch.randn(2, 16, 48)
    assert torch.equal(block(tokens, torch.randn(2, 48)), tokens)


@pytest.mark.parametrize(("size", "patch", "channels"), [(8, 2, 1), (8, 4, 3), (6, 1, 2), (4, 4, 1)])
def test_patches_and_back(size, patch, channels):
    model = DiffusionTransformer(size=size, patch=patch, channels=channels)
    x = torch.randn(2, channels, size, size)
    patches = model.patches(x)
    assert patches.shape == (2, (size // patch) ** 2, patch * patch * channels)
    assert torch.equal(model.images(patches), x)


def test_patches_by_hand():
    patches = DiffusionTransformer(size=4, patch=2).patches(torch.arange(16.0).reshape(1, 1, 4, 4))
    assert patches[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_time_and_class_and_position_matter_and_images_do_not_mix():
    model = woken()
    x, t, y = batch(2)
    out = model(x, t, y)
    assert not torch.allclose(out, model(x, t * 0.5, y), atol=1e-4)
    assert not torch.allclose(out, model(x, t, y + 1), atol=1e-4)
    assert not torch.allclose(out, model(x, t, torch.full_like(y, 10)), atol=1e-4)
    flipped = model.patches(model(model.images(model.patches(x).flip(1)), t, y)).flip(1)
    assert not torch.allclose(model.patches(out), flipped, atol=1e-4)
    torch.testing.assert_close(model(x[:1], t[:1], y[:1]), out[:1])


def test_time_features_by_hand():
    features = time_features(torch.tensor([0.0, 1000.0]), 4)
    assert features[0].tolist() == [1, 1, 0, 0]
    expected = torch.tensor([1000.0, 10.0])
    torch.testing.assert_close(features[1], torch.cat([expected.cos(), expected.sin()]), atol=1e-4, rtol=0)


def test_position_table_by_hand():
    table = position_table(2, 4)  # one frequency, 1: sin and cos of the column, then of the row
    for place, (row, column) in zip(table, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        r, c = torch.tensor(float(row)), torch.tensor(float(column))
        torch.testing.assert_close(place, torch.stack([c.sin(), c.cos(), r.sin(), r.cos()]))
    assert "position" not in DiffusionTransformer().state_dict()


def test_the_feed_forward_is_made_once_a_block_and_none_is_an_mlp():
    assert isinstance(DiffusionTransformer().blocks[0].feed_forward, MLP)
    model = DiffusionTransformer(feed_forward=lambda d: nn.Linear(d, d), n_blocks=2)
    layers = {id(block.feed_forward) for block in model.blocks}
    assert len(layers) == 2


def test_every_weight_gets_a_gradient_once_the_gates_are_open():
    model = woken()
    x, t, y = batch(4)
    model(x, t, y).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = woken()
    x, t, y = batch(2)
    expected = model(x, t, y)
    # Times in half precision are coarse; what is compared is the rest of the network.
    t = t.to(dtype)
    expected = model(x, t.float(), y)
    out = model.to(dtype)(x.to(dtype), t, y)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=0.15, rtol=0.15)


def test_an_empty_batch():
    x, t, y = batch(0)
    assert woken()(x, t, y).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"patch": 3}, r"patch.*size=8.*3"), ({"d_model": 46}, r"multiple of 4.*46"), ({"n_heads": 5}, r"n_heads=5.*48")],
)
def test_sizes_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionTransformer(**settings)


def test_inputs_that_do_not_fit():
    model, x, t, y = DiffusionTransformer(), torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 10])
    model(x, t, y)
    for wrong in (torch.randn(2, 1, 6, 6), torch.randn(2, 3, 8, 8)):
        with untyped(), pytest.raises(ValueError, match=r"images must be \[n, 1, 8, 8\], got"):
            model(wrong, t, y)
    for times, classes in ((torch.rand(3), y), (t, y[:1])):
        with untyped(), pytest.raises(ValueError, match="2 images need one noise level and one class each"):
            model(x, times, classes)
    with pytest.raises(ValueError, match=r"classes must be in \[0, 10\], where 10 is none, got 0 to 11"):
        model(x, t, torch.tensor([0, 11]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_and_learns(dtype):
    torch.manual_seed(0)
    model = DiffusionTransformer(n_blocks=1, d_model=16)
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    y = torch.tensor([3, 7])
    exact = sample(model, y, steps=3)
    half = copy.deepcopy(model).to(dtype)
    drawn = sample(half, y, steps=3)
    assert drawn.dtype == dtype
    torch.testing.assert_close(drawn.float(), exact, atol=0.1, rtol=0.1)
    flow_loss(half, torch.randn(2, 1, 8, 8, dtype=dtype), y).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in half.parameters())
