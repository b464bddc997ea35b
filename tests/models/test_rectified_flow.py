"""Rectified flow: the straight way, its loss, guidance, and the walk back."""

import pytest
import torch
from torch import nn

from notebook_kit.models import DiffusionTransformer, flow_errors, flow_loss, noised, sample, sample_path, velocity


class Linear(nn.Module):
    """v = a_y z + b t, with a = 1, 2, ... for classes and 0 for none: solvable by hand."""

    n_classes, channels, size = 3, 1, 2

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, z, t, y):
        self.calls.append(len(z))
        a = torch.where(y < 3, y + 1.0, torch.zeros(len(y)))
        return a[:, None, None, None] * z + t[:, None, None, None]


def test_the_way_by_hand():
    x, noise = torch.full((3, 1, 2, 2), 2.0), torch.full((3, 1, 2, 2), -2.0)
    z = noised(x, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert z[:, 0, 0, 0].tolist() == [2, 1, -2]


def test_one_euler_step_along_the_exact_velocity_returns_the_image():
    x, noise = torch.randn(5, 1, 8, 8), torch.randn(5, 1, 8, 8)
    t = torch.ones(5)
    torch.testing.assert_close(noised(x, noise, t) - (noise - x), x)

    def exact(z, t, y):
        return noise - x

    assert torch.equal(flow_errors(exact, x, torch.zeros(5).long(), noise, torch.rand(5)), torch.zeros(5))


def test_the_error_of_a_model_that_answers_zero():
    x, noise = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    errors = flow_errors(DiffusionTransformer(), x, torch.arange(4), noise, torch.rand(4))
    torch.testing.assert_close(errors, (noise - x).square().mean((1, 2, 3)))


def test_classes_are_dropped_as_often_as_asked():
    seen = []

    def spy(z, t, y):
        seen.append(y)
        return z * 0

    spy.n_classes = 10
    for drop, share in ((0.0, 0.0), (0.1, 0.1), (1.0, 1.0)):
        torch.manual_seed(0)
        model = nn.Module()
        model.forward, model.n_classes = spy, 10
        flow_loss(model, torch.zeros(4000, 1, 1, 1), torch.zeros(4000).long(), drop=drop)
        assert (seen.pop() == 10).float().mean().item() == pytest.approx(share, abs=0.02)


def test_training_draws_times_around_one_half():
    times = []
    model = nn.Module()
    model.forward, model.n_classes = lambda z, t, y: times.append(t) or z * 0, 10
    torch.manual_seed(0)
    flow_loss(model, torch.zeros(8000, 1, 1, 1), torch.zeros(8000).long())
    normal = torch.logit(times[0])
    assert abs(normal.mean()) < 0.05
    assert normal.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("guidance", "factor"), [(0.0, 0.0), (1.0, 2.0), (1.5, 3.0), (4.0, 8.0)])
def test_guidance_by_hand(guidance, factor):
    model, z = Linear(), torch.randn(2, 1, 2, 2)
    v = velocity(model, z, torch.zeros(2), torch.ones(2).long(), guidance=guidance)
    torch.testing.assert_close(v, factor * z)
    assert model.calls == ([2] if guidance == 1 else [4])


def test_the_walk_by_hand():
    # class 0: v = z + t. From z, two steps: z - (z + 1) / 2, then minus (z + 1/2) / 2.
    path = sample_path(Linear(), torch.tensor([0]), steps=2, guidance=1.0)
    first = path[0] - (path[0] + 1) / 2
    torch.testing.assert_close(path[1], first)
    torch.testing.assert_close(path[2], first - (first + 0.5) / 2)
    assert path.shape == (3, 1, 1, 2, 2)


def test_samples_are_the_end_of_the_path_and_the_seed_decides():
    y = torch.tensor([0, 1, 2])
    path = sample_path(Linear(), y, steps=5, guidance=2.0, seed=3)
    assert torch.equal(sample(Linear(), y, steps=5, guidance=2.0, seed=3), path[-1])
    assert not torch.equal(sample_path(Linear(), y, steps=5, seed=4)[0], path[0])
    other = sample_path(Linear(), y + 1, steps=1, seed=3)
    assert torch.equal(other[0], path[0])
    state = torch.random.get_rng_state()
    sample(Linear(), y, steps=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_gradient_is_kept():
    assert not sample(DiffusionTransformer(), torch.tensor([1]), steps=2).requires_grad


def test_settings_out_of_range():
    with pytest.raises(ValueError, match=r"steps must be an integer in \[1, 1000\]|steps must be in \[1, 1000\]"):
        sample(Linear(), torch.tensor([0]), steps=0)
    with pytest.raises(ValueError, match=r"guidance must be in \[0, 20\]"):
        sample_path(Linear(), torch.tensor([0]), guidance=-1.0)
