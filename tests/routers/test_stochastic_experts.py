"""THOR: draws, the rules of inference, and the loss that makes two passes agree."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn
from torch.nn import functional as F

from notebook_kit import models
from notebook_kit.mixtures import MoE
from notebook_kit.models import MLP
from notebook_kit.routers import (
    StochasticExperts,
    consistency_loss,
    install,
    record_routing,
    reroute,
    set_path,
    two_pass_loss,
    uninstall,
)

IDS = torch.arange(24).reshape(2, 12) * 7 % 256


def layer(n_experts=4, d_model=6, **options):
    torch.manual_seed(0)
    return MoE([MLP([d_model, 5, d_model]) for _ in range(n_experts)], StochasticExperts(d_model, n_experts, **options))


def test_symmetric_divergence_by_hand():
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.6, 0.4]]).log()
    assert consistency_loss(p, q).item() == pytest.approx(0.268764, abs=1e-6)
    assert consistency_loss(q, p).item() == pytest.approx(0.268764, abs=1e-6)
    assert consistency_loss(p, p).item() == 0
    targets = torch.tensor([0])
    without = two_pass_loss(p, q, targets, consistency_coef=0.0)
    assert (two_pass_loss(p, q, targets) - without).item() == pytest.approx(1.34382, abs=1e-5)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 50.0]))
def test_the_divergence_is_its_definition_symmetric_and_finite(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(2, 3, 5, generator=generator).double() * scale for _ in range(2))
    p, q = a.softmax(-1), b.softmax(-1)
    kl = (p * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1) + (q * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1)
    ours = consistency_loss(a.float(), b.float())
    assert ours.item() == pytest.approx(0.5 * kl.mean().item(), abs=1e-6, rel=1e-5)
    torch.testing.assert_close(consistency_loss(b.float(), a.float()), ours)
    assert ours >= 0


def test_large_logits_and_both_gradients():
    a, b = (torch.tensor([[50.0, -50.0], [-50.0, 50.0]], requires_grad=True) for _ in range(2))
    consistency_loss(a, -b).backward()
    assert torch.isfinite(a.grad).all()
    assert torch.isfinite(b.grad).all()
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    consistency_loss(a, b).backward()
    assert a.grad.abs().sum() > 0
    assert b.grad.abs().sum() > 0


def test_padding_does_not_count():
    a, b, y = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.randint(0, 3, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    for loss in (consistency_loss(a, b, mask=mask), consistency_loss(a[mask], b[mask])):
        torch.testing.assert_close(loss, consistency_loss(a * mask[..., None] * 1.0, b, mask=mask))
    masked = two_pass_loss(a, b, y, mask=mask)
    torch.testing.assert_close(masked, two_pass_loss(a[mask], b[mask], y[mask]))
    assert consistency_loss(a[:0], b[:0]) == 0


def test_one_expert_is_twice_the_cross_entropy():
    moe, x, y = layer(1), torch.randn(7, 6), torch.randint(0, 6, (7,))
    a, b = moe(x), moe(x)
    assert consistency_loss(a, b) == 0
    expected = 2 * F.cross_entropy(a, y, label_smoothing=0.1)
    torch.testing.assert_close(two_pass_loss(a, b, y), expected)


def test_training_draws_one_expert_for_the_whole_call():
    moe, drawn = layer(), []
    for _ in range(400):
        experts = moe.router(torch.randn(3, 6)).experts
        assert experts.unique().numel() == 1
        drawn.append(int(experts[0]))
    assert chisquare(torch.bincount(torch.tensor(drawn), minlength=4).numpy()).pvalue > 0.01
    two = StochasticExperts(6, 4, seed=1)
    others = [int(two(torch.randn(1, 6)).experts) for _ in range(400)]
    together = torch.bincount(torch.tensor(drawn) * 4 + torch.tensor(others), minlength=16)
    assert chisquare(together.numpy()).pvalue > 0.01


def test_a_seed_repeats_its_path_and_leaves_the_world_alone():
    first, second = StochasticExperts(6, 8, seed=3), StochasticExperts(6, 8, seed=3)
    state, x = torch.get_rng_state(), torch.zeros(5, 6)
    for _ in range(10):
        assert torch.equal(first(x).experts, second(x).experts)
    twin = copy.deepcopy(first)
    assert torch.equal(first.eval()(x).experts, twin.eval()(x).experts)
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_drawn_experts_learn():
    moe = layer(5, seed=2)
    before = copy.deepcopy(moe.experts)
    optimizer = torch.optim.Adam(moe.parameters(), lr=0.1)
    x, y = torch.randn(8, 6), torch.randint(0, 6, (8,))
    a = moe(x)
    drawn = {int(moe.routing.experts[0])}
    b = moe(x)
    drawn |= {int(moe.routing.experts[0])}
    two_pass_loss(a, b, y).backward()
    optimizer.step()
    assert len(drawn) == 2
    for i, (old, new) in enumerate(zip(before, moe.experts, strict=True)):
        same = all(torch.equal(p, q) for p, q in zip(old.parameters(), new.parameters(), strict=True))
        assert same == (i not in drawn)


@torch.no_grad()
def test_rules_of_inference():
    moe = layer().eval()
    x = torch.randn(3, 50, 6)
    moe.router.inference = "token"
    moe(x)
    assert moe.routing.experts.unique().numel() == 4
    moe.router.inference = "sentence"
    moe(x.repeat(4, 1, 1))
    by_sentence = moe.routing.experts.reshape(12, 50)
    assert (by_sentence == by_sentence[:, :1]).all()
    assert by_sentence[:, 0].unique().numel() > 1
    moe(x[0])  # [n, d]: every row is a sequence
    assert moe.routing.experts.unique().numel() == 4
    set_path(moe, "ensemble")
    mean = sum(expert(x) for expert in moe.experts) / 4
    torch.testing.assert_close(moe(x), mean)
    for i in range(4):
        set_path(moe, [i])
        torch.testing.assert_close(moe(x), moe.experts[i](x))


@torch.no_grad()
def test_token_draws_have_the_ensemble_as_their_mean():
    moe, x = layer().eval(), torch.randn(2, 6)
    many = moe(x.repeat(8000, 1)).reshape(8000, 2, 6).mean(0)
    moe.router.inference = "ensemble"
    torch.testing.assert_close(many, moe(x), atol=0.02, rtol=0)


@torch.no_grad()
def test_equal_experts_make_every_rule_the_same():
    expert = MLP([6, 5, 6])
    moe = MoE([copy.deepcopy(expert) for _ in range(3)], StochasticExperts(6, 3)).eval()
    x = torch.randn(2, 5, 6)
    for rule in ("token", "sentence", "ensemble", "fixed"):
        set_path(moe, rule)
        torch.testing.assert_close(moe(x), expert(x))


def test_paths_of_several_layers():
    net = nn.Sequential(layer(3), layer(4)).eval()
    assert [router.path for router in set_path(net, [2, 3])] == [2, 3]
    with pytest.raises(ValueError, match="one expert for each of the 2 layers, got 1"):
        set_path(net, [0])
    with pytest.raises(ValueError, match=r"in \[0, 2\], got 3"):
        set_path(net, [3, 3])
    assert [module.router.path for module in net] == [2, 3]
    with pytest.raises(ValueError, match="path must be one of token, sentence"):
        set_path(net, "sentense")


@torch.no_grad()
def test_installed_and_rerouted():
    model = models.tiny_mixtral().eval()
    before = model(IDS).logits
    install(model, StochasticExperts, inference="ensemble")
    with record_routing(model) as trace:
        model(IDS)
    assert trace.layer(0).experts.shape[1] == 8
    install(model, StochasticExperts)
    with record_routing(model) as trace:
        model(IDS)
    first, second = (trace.layer(i).experts[:, 0] for i in range(2))
    assert not torch.equal(first, second)
    assert reroute(trace, StochasticExperts, layer=0).experts.shape == (24, 1)
    install(model, StochasticExperts, inference="sentence")
    with pytest.raises(ValueError, match='inference="sentence" needs to know which tokens are one sequence'):
        model(IDS)
    uninstall(model)
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("rule", ["token", "sentence", "ensemble", "fixed"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("n_tokens", [0, 1, 6])
def test_small_batches_and_padding(n_tokens, training, rule):
    moe = layer(inference=rule).bfloat16().train(training)
    x, mask = torch.randn(2, n_tokens, 6, dtype=torch.bfloat16), (torch.arange(n_tokens) < 4).expand(2, -1)
    y = moe(x, mask=mask)
    assert y.shape == x.shape
    assert (y[~mask] == 0).all()
    assert (moe.routing.experts[~mask.reshape(-1)] == -1).all()
    served = moe.routing.weights.sum(1)
    torch.testing.assert_close(served, mask.reshape(-1).float())
    assert moe.routing.aux_loss == 0


def test_bad_input():
    with pytest.raises(ValueError, match="path must be below n_experts=4, got 4"):
        StochasticExperts(8, 4, path=4)
    with pytest.raises(ValueError, match="inference must be one of"):
        StochasticExperts(8, 4, inference="sentense")
    with pytest.raises(ValueError, match="width d_model=8, got 7"):
        StochasticExperts(8, 4)(torch.randn(3, 7))
    with pytest.raises(ValueError, match="NaN"):
        StochasticExperts(1, 2).route(torch.full((2, 2), float("nan")))
    assert not list(StochasticExperts(8, 4).parameters())
