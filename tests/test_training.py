"""The training loop: the same seed gives the same run, and what cannot be trained is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from notebook_kit.training import fit


def line(generator):
    x = torch.rand(16, 1, generator=generator)
    return x, 3 * x + 1


def squared_error(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def net(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Dropout(dropout), nn.Linear(8, 1))


def run(model, **settings):
    return fit(model, line, squared_error, **({"steps": 20, "lr": 0.01, "progress": False} | settings))


def test_it_learns_and_reports_every_step():
    model = net()
    history = run(model, steps=400, lr=0.02)
    assert history.step.tolist() == list(range(1, 401))
    assert history.loss.iloc[-1] < 0.01 < history.loss.iloc[0]


def test_two_runs_are_equal_dropout_included_and_another_seed_differs():
    a, b, c = net(0.5), net(0.5), net(0.5)
    first, second, third = run(a), run(b), run(c, seed=1)
    assert first.equals(second)
    assert not first.equals(third)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_the_callers_random_state_and_the_models_mode_are_left_alone():
    model = net(0.5).eval()
    state = torch.get_rng_state()
    run(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training


def test_evaluate_runs_in_evaluation_mode_and_fills_its_rows():
    modes = []

    def evaluate(model):
        modes.append((model.training, torch.is_grad_enabled()))
        return {"accuracy": 0.5}

    history = run(net(), steps=10, evaluate=evaluate, evaluate_every=4)
    assert history.step[history.accuracy.notna()].tolist() == [4, 8, 10]
    assert modes == [(False, False)] * 3


def test_evaluating_does_not_change_the_run():
    def evaluate(model):
        return {"draw": torch.rand(1, generator=torch.Generator().manual_seed(0)).item()}

    assert run(net(0.5)).loss.equals(run(net(0.5), evaluate=evaluate, evaluate_every=1).loss)


def test_frozen_parameters_stay():
    model = net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    run(model, weight_decay=0.1)
    assert torch.equal(model[0].weight, before)


def test_schedule_scales_the_learning_rate():
    model = net()
    before = [p.clone() for p in model.parameters()]
    shares = []
    run(model, steps=4, schedule=lambda share: shares.append(share) or 0.0)
    assert shares == [0, 0.25, 0.5, 0.75]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_nan_names_the_step_and_gives_the_mode_back():
    calls = []

    def poisoned(model, batch):
        calls.append(1)
        return squared_error(model, batch) * (float("nan") if len(calls) == 3 else 1)

    model = net().eval()
    with pytest.raises(ValueError, match=r"nan at step 3 .toy."):
        fit(model, line, poisoned, steps=5, progress=False, desc="toy")
    assert not model.training


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match=r"no parameter that requires a gradient"):
        run(net().requires_grad_(False))
    with pytest.raises(ValueError, match=r"steps must be at least 1"):
        run(net(), steps=0)


# ---------------------------------------------------------------- second moments
class Linear2(nn.Module):
    """Loss = g · w: its gradient is the constant g, whatever w is."""

    def __init__(self, g):
        super().__init__()
        self.w, self.unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.g = torch.tensor(g)


def test_moments_of_a_constant_gradient_approach_its_square():
    model, moments = Linear2([2.0, -3.0]), {}
    fit(model, lambda g: None, lambda m, _: m.g @ m.w, steps=300, progress=False, moments=moments)
    assert list(moments) == ["w", "unused"]
    torch.testing.assert_close(moments["w"], (1 - 0.999**300) * torch.tensor([4.0, 9.0]), rtol=1e-4, atol=0)
    assert moments["unused"].tolist() == [0, 0, 0]


def test_moments_are_torchs_own_and_change_nothing():
    a, b, moments = net(0.5), net(0.5), {}
    assert run(a, weight_decay=0.1).equals(run(b, weight_decay=0.1, moments=moments))
    torch.manual_seed(0)  # fit seeds dropout; here there is none
    plain, kept = net(), {}
    run(plain, steps=3, moments=kept)
    again, generator = net(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(again.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        squared_error(again, line(generator)).backward()
        optimizer.step()
    for name, p in again.named_parameters():
        assert torch.equal(kept[name], optimizer.state[p]["exp_avg_sq"])
        assert kept[name].data_ptr() != optimizer.state[p]["exp_avg_sq"].data_ptr()


def test_tied_weights_have_one_moment():
    model, moments = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {}
    model[1].weight = model[0].weight

    def draw(generator):
        x = torch.rand(8, 4, generator=generator)
        return x, x.flip(1)

    fit(model, draw, squared_error, steps=2, progress=False, moments=moments)
    assert list(moments) == ["0.weight", "0.bias", "1.bias"]


def test_moments_must_start_empty():
    with pytest.raises(ValueError, match=r"moments must be an empty dict to be filled, got one with 1 entries"):
        run(net(), moments={"old": torch.ones(1)})
