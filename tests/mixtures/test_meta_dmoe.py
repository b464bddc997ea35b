"""One step towards the experts, by hand; who is left out; what gets a gradient and what never changes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from notebook_kit.mixtures import ExpertAggregator, MetaDMoE, meta_train, pretrain_aggregator
from notebook_kit.models import MLP

X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def made(n=3, dtype=torch.float32, **options):
    torch.manual_seed(0)
    experts = [MLP([6, 8, 8]).to(dtype) for _ in range(n)]
    aggregator = ExpertAggregator(8, n_heads=2, dropout=0.0).to(dtype)
    options = {"inner_lr": 0.5} | options
    student, head = MLP([6, 8, 8]).to(dtype), nn.Linear(8, 3).to(dtype)
    return MetaDMoE(experts, student, head, aggregator=aggregator, **options).eval()


class Times(nn.Module):
    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, x):
        return self.theta * x


def by_hand(first_order=False):
    return MetaDMoE(
        [Times(1.0)], Times(0.0), nn.Linear(1, 2), aggregator=Times(1.0), inner_lr=0.25, first_order=first_order
    )


def test_the_step_by_hand():
    """f = θx, x = 1, θ = 0, t = 1: loss 1, gradient -2, θ' = 0.5, loss after 0.25."""
    model, x = by_hand(), torch.ones(1, 1)
    target = torch.ones(1, 1, requires_grad=True)
    theta = model.adapt(x, target=target, keep_graph=True)["theta"]
    assert theta.item() == 0.5
    assert F.mse_loss(theta * x, target).item() == 0.25
    to_target, to_theta = torch.autograd.grad(theta, [target, model.student.theta])
    assert to_target.item() == 0.5
    assert to_theta.item() == 0.5
    first = by_hand(first_order=True)
    theta = first.adapt(x, target=target, keep_graph=True)["theta"]
    assert torch.autograd.grad(theta, first.student.theta)[0].item() == 1
    assert theta.item() == 0.5
    assert model.student.theta.item() == 0


@pytest.mark.parametrize("options", [{"inner_lr": 0.0}, {"inner_steps": 0}])
def test_no_step_is_the_student(options):
    model = made(**options)
    assert torch.equal(model(X, weights=model.adapt(X)), model(X))


def test_the_order_of_the_experts_is_nothing():
    a = ExpertAggregator(8, depth=2, n_heads=2).eval()
    tokens = torch.randn(5, 4, 8)
    torch.testing.assert_close(a(tokens[:, [2, 0, 3, 1]]), a(tokens), atol=1e-6, rtol=1e-5)
    weights = a.attention(tokens)
    assert weights.shape == (5, 4, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 4))


def test_leaving_out_is_computing_with_the_others():
    model = made(3)
    tokens = model.expert_features(X)
    torch.testing.assert_close(model.target(X, left_out=1), model.aggregator(tokens[:, [0, 2]]), atol=1e-6, rtol=1e-5)
    pair = made(2)
    torch.testing.assert_close(pair.target(X, left_out=0), pair.aggregator(pair.expert_features(X)[:, 1:]))
    alone = made(1, mask=False)
    loss = alone.episode_loss(X[:6], X[6:], Y[6:], expert=0)
    weights = alone.adapt(X[:6], target=alone.aggregator(alone.expert_features(X[:6])))
    torch.testing.assert_close(loss, F.cross_entropy(alone(X[6:], weights=weights), Y[6:]))


def test_the_step_comes_nearer_to_the_experts():
    model = made(inner_lr=0.05, inner_steps=3)
    t = model.target(X).detach()
    after = torch.func.functional_call(model.student, model.adapt(X), (X,))
    assert F.mse_loss(after, t) < F.mse_loss(model.student(X), t)


@pytest.mark.parametrize("first_order", [False, True])
def test_the_aggregator_learns_through_the_step_only(first_order):
    model = made(first_order=first_order)
    model.episode_loss(X[:6], X[6:], Y[6:], expert=0).backward()
    reached = sum(p.grad.abs().sum().item() for p in model.aggregator.parameters() if p.grad is not None)
    assert (reached == 0) == first_order
    assert all(p.grad is None for p in model.experts.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.head.parameters())
    assert model.student.layers[0].weight.grad.abs().sum() > 0


def test_second_order_gradient_against_finite_differences():
    model = made(dtype=torch.float64, inner_lr=1.0)
    weight = model.student.layers[0].weight

    def loss():
        return model.episode_loss(X[:6].double(), X[6:].double(), Y[6:], expert=1)

    (gradient,) = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        weight[2, 3] += 1e-5
        up = loss().item()
        weight[2, 3] -= 2e-5
        down = loss().item()
    assert gradient[2, 3].item() == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-9)


def test_training_moves_what_it_should():
    model = made()
    before = copy.deepcopy(model.state_dict())

    def episodes(generator):
        rows = torch.randperm(12, generator=generator)
        return X[rows[:6]], X[rows[6:]], Y[rows[6:]], int(rows[0] % 3)

    losses = meta_train(model, episodes, steps=30, lr=0.01, aggregator_lr=0.01, epoch=10)
    assert sum(losses[-5:]) < sum(losses[:5])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("experts."), name
    again = made()
    assert meta_train(again, episodes, steps=30, lr=0.01, aggregator_lr=0.01, epoch=10) == losses
    head = nn.Linear(8, 3)
    losses = pretrain_aggregator(model, head, lambda g: (X, Y), steps=30, lr=0.01)
    assert losses[-1] < losses[0]
    assert torch.equal(model.experts[0].layers[0].weight, before["experts.0.layers.0.weight"])


def test_modes_come_back_and_experts_stay_in_evaluation():
    model = made().train()
    assert not model.experts.training
    meta_train(model, lambda g: (X[:6], X[6:], Y[6:], None), steps=1)
    assert model.student.training
    assert not model.experts.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model, x = made(dtype=dtype), X.to(dtype)
    assert model(x, weights=model.adapt(x)).dtype == dtype


def test_ten_experts_and_an_empty_prediction():
    model = made(10)
    assert model.target(X, left_out=9).shape == (12, 8)
    assert model(X[:0]).shape == (0, 3)


def test_adapting_works_without_gradients_around():
    model = made()
    with torch.no_grad():
        inside = model.adapt(X)
    outside = model.adapt(X)
    assert all(torch.equal(inside[name], outside[name]) for name in inside)


def test_bad_input():
    with pytest.raises(ValueError, match="at least one feature extractor"):
        made(0)
    with pytest.raises(ValueError, match="left_out must be one of 3 experts"):
        made().target(X, left_out=3)
    with pytest.raises(ValueError, match="with one expert set mask=False"):
        made(1).target(X, left_out=0)
    with pytest.raises(ValueError, match="support must hold"):
        made().adapt(X[:0])
    uneven = MetaDMoE([MLP([6, 8]), MLP([6, 7])], MLP([6, 8]), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"features of one width \[batch, d\], got \[\[12, 8\], \[12, 7\]\]"):
        uneven.target(X)
    narrow = MetaDMoE([MLP([6, 8])], MLP([6, 1]), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"the shape of the experts' \[12, 8\], got \[12, 1\]"):
        narrow.adapt(X)
    with pytest.raises(ValueError, match="n_heads must divide the width 8, got 3"):
        ExpertAggregator(8, n_heads=3)
    with pytest.raises(ValueError, match=r"inner_lr must be in \[0, 1\]"):
        made(inner_lr=-1.0)
    with pytest.raises(ValueError, match="in episode 1: lower inner_lr"):
        meta_train(made(), lambda g: (X * float("nan"), X, Y, None), steps=1)
