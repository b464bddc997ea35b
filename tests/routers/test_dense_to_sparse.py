"""Dense to sparse by the card's numbers, and what holds for any logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit import models
from notebook_kit.mixtures import MoE, spawn_experts
from notebook_kit.models import MLP
from notebook_kit.routers import (
    DenseToSparse,
    aux_loss,
    gumbel_noise,
    install,
    record_routing,
    reroute,
    set_step,
    temperature_schedule,
    uninstall,
)

Z = torch.tensor([[2.0, 0.0, -2.0, -4.0]])
IDS = torch.arange(24).reshape(2, 12) * 7 % 256


def at(temperature, n=4, **hyperparameters):
    return DenseToSparse(1, n, temperature=temperature, decay="constant", **hyperparameters)


@pytest.mark.parametrize(("temperature", "active"), [(2.0, 4), (1.0, 4), (0.5, 2), (0.3, 2), (0.25, 1)])
def test_cooler_is_sparser(temperature, active):
    routing = at(temperature).route(Z)
    assert routing.experts.tolist() == [list(range(active))]
    torch.testing.assert_close(routing.weights[0], Z.softmax(1)[0, :active])


def test_the_gates_at_three_tenths():
    expected = torch.tensor([0.998727, 0.001271, 2e-6, 0.0])
    torch.testing.assert_close(at(0.3).route(Z).probs[0], expected, atol=5e-7, rtol=0)
    weighed = at(0.3, gumbel_weights=True).route(Z)
    torch.testing.assert_close(weighed.weights[0], expected[:2], atol=5e-7, rtol=0)


@pytest.mark.parametrize(
    ("decay", "step", "expected"),
    [
        ("exponential", 0, 2.0),
        ("exponential", 25, 1.24467),
        ("exponential", 50, 0.774597),
        ("exponential", 100, 0.3),
        ("exponential", 170, 0.3),
        ("linear", 25, 1.575),
        ("linear", 50, 1.15),
        ("linear", 999, 0.3),
        ("constant", 50, 2.0),
    ],
)
def test_schedules(decay, step, expected):
    assert temperature_schedule(step, 100, decay=decay) == pytest.approx(expected, abs=1e-5)
    router = DenseToSparse(1, 4, steps=100, decay=decay)
    assert set_step(router, step) == 1
    assert router.temperature == pytest.approx(expected, abs=1e-5)


def test_cold_gates_draw_experts_from_the_softmax():
    z, n = torch.tensor([1.0, 0.0, -0.5, 0.3]), 20_000
    rows = z.expand(n, 4)
    routing = at(0.01, switch_to_hard=0).route(rows, noise=gumbel_noise(rows, seed=3))
    share, p = torch.bincount(routing.experts[:, 0]) / n, z.softmax(0)
    assert ((share - p).abs() < 3 * (p * (1 - p) / n).sqrt()).all()
    assert routing.experts.shape == (n, 1)


def test_threshold_zero_is_the_dense_gate_and_one_keeps_the_largest():
    z = torch.randn(30, 6)
    dense = at(1.0, n=6, threshold=0.0).route(z)
    assert (dense.experts >= 0).all()
    torch.testing.assert_close(dense.weights.sum(1), torch.ones(30))
    assert (at(0.01, n=6, threshold=0.0).route(100 * z).experts >= 0).all()
    one = at(1.0, n=6, threshold=1.0).route(z)
    assert torch.equal(one.experts, z.argmax(1, keepdim=True))


def test_the_hard_stage_begins_at_its_step():
    router = DenseToSparse(1, 4, steps=100, switch_to_hard=10)
    for step, hard in ((0, False), (9, False), (10, True), (50, True)):
        set_step(router, step)
        assert router.hard is hard
        assert (router.route(Z).experts.shape[1] == 1) is hard
    never = DenseToSparse(1, 4)
    set_step(never, 10_000)
    assert not never.hard


def loss_of(z, **hyperparameters):
    return at(1.0, n=z.shape[1], balance_coef=1.0, **hyperparameters).route(z).aux_loss.item()


def test_the_balance_loss():
    sure = 40 * torch.eye(4)
    assert loss_of(torch.zeros(8, 4), threshold=0.0) == pytest.approx(4)
    assert loss_of(sure.repeat(2, 1)) == pytest.approx(1, abs=1e-5)
    assert loss_of(sure[:1].repeat(8, 1)) == pytest.approx(4, abs=1e-5)


def test_evaluation_is_the_most_probable_expert():
    router, x = DenseToSparse(6, 5).eval(), torch.randn(9, 6)
    routing, p = router(x), router.logits(x).softmax(1)
    assert torch.equal(routing.experts, p.argmax(1, keepdim=True))
    torch.testing.assert_close(routing.weights, p.amax(1, keepdim=True))
    assert torch.equal(router(x).weights, routing.weights)
    dense = DenseToSparse(6, 5, evaluation="dense", threshold=0.0).eval()(x)
    assert (dense.experts >= 0).all()


def test_the_same_seed_the_same_noise():
    first, again, other = (DenseToSparse(6, 5, seed=seed) for seed in (1, 1, 2))
    again.weight, other.weight, x = first.weight, first.weight, torch.randn(20, 6)
    state = torch.get_rng_state()
    a = first(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.probs, again(x).probs)
    assert not torch.equal(a.probs, other(x).probs)
    assert not torch.equal(a.probs, first(x).probs)  # the next call draws anew
    noise = gumbel_noise(a.logits, seed=0)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.4)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 20),
    threshold=st.sampled_from([0.0, 1e-3, 0.2, 1.0]),
    temperature=st.sampled_from([0.01, 0.5, 20.0]),
)
def test_what_holds_for_any_logits(seed, n, threshold, temperature):
    z = torch.randn(7, n, generator=torch.Generator().manual_seed(seed)) * 3
    noise = gumbel_noise(z, seed=seed)
    routing = at(temperature, n=n, threshold=threshold).route(z, noise=noise)
    gates = ((z + noise) / temperature).softmax(1)
    active = (gates > threshold) | (threshold == 0)  # 0 is dense, also where float32 rounds a gate to 0
    active[torch.arange(7), gates.argmax(1)] = True
    used = torch.zeros(7, n + 1).scatter_(1, routing.experts + 1, 1.0)[:, 1:].bool()
    assert torch.equal(used, active)
    assert routing.experts[:, 0].tolist() == gates.argmax(1).tolist()
    w = z.softmax(1) * active
    torch.testing.assert_close(routing.weights.sum(1), w.sum(1))
    expected = 0.01 * n * (w.mean(0) * active.float().mean(0)).sum()
    torch.testing.assert_close(routing.aux_loss, expected)


def test_renaming_experts_renames_the_answer():
    z, order = torch.randn(12, 9), torch.randperm(9)
    plain, renamed = at(0.5, n=9).route(z), at(0.5, n=9).route(z[:, order])
    assert torch.equal(order[renamed.experts.clamp_min(0)].where(renamed.experts >= 0, -1), plain.experts)
    torch.testing.assert_close(renamed.weights, plain.weights)
    torch.testing.assert_close(renamed.aux_loss, plain.aux_loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n_tokens", [0, 1, 5])
@pytest.mark.parametrize("training", [True, False])
def test_small_batches_padding_and_half(n_tokens, dtype, training):
    router, mask = DenseToSparse(8, 6).to(dtype).train(training), torch.arange(n_tokens) < 3
    routing = router(torch.randn(n_tokens, 8, dtype=dtype), mask=mask)
    assert routing.probs.dtype == routing.weights.dtype == torch.float32
    assert (routing.experts[~mask] == -1).all()
    assert (routing.weights[~mask] == 0).all()
    alone = router.route(routing.logits[:3]).aux_loss
    assert torch.isfinite(alone)
    if not training:
        torch.testing.assert_close(routing.aux_loss, alone)


def test_ties_and_one_expert():
    assert at(1.0).eval().route(torch.zeros(2, 4)).experts.tolist() == [[0]] * 2
    assert at(1.0).route(torch.zeros(2, 4)).experts.tolist() == [[0, 1, 2, 3]] * 2
    assert DenseToSparse(8, 1)(torch.randn(3, 8)).weights.tolist() == [[1.0]] * 3


@pytest.mark.parametrize("gumbel_weights", [False, True])
def test_gradients_reach_the_gate_and_the_active_experts_only(gumbel_weights):
    router = DenseToSparse(6, 5, threshold=0.25, gumbel_weights=gumbel_weights, balance_coef=0.0)
    moe = MoE([MLP([6, 6]) for _ in range(5)], router)
    moe(torch.randn(1, 6)).square().sum().backward()
    assert router.weight.grad.abs().sum() > 0
    used = set(moe.routing.experts[0].tolist()) - {-1}
    assert {i for i, e in enumerate(moe.experts) if e.layers[0].weight.grad is not None} == used
    balanced = DenseToSparse(6, 5, balance_coef=1.0)
    balanced(torch.randn(9, 6)).aux_loss.backward()
    assert balanced.weight.grad.abs().sum() > 0


def test_copies_behind_dense_weights_are_the_seed_expert():
    expert, x = MLP([6, 9, 6]), torch.randn(12, 6)
    copies = spawn_experts(expert, 4, mask_rate=0.0)
    moe = MoE(copies, DenseToSparse(6, 4, threshold=0.0))
    torch.testing.assert_close(moe(x), expert(x))
    sparse = MoE(copies, DenseToSparse(6, 4, temperature=0.5, threshold=0.3))
    y = sparse(x)
    torch.testing.assert_close(y, sparse.routing.weights.sum(1, keepdim=True) * expert(x))
    assert (sparse.routing.experts == -1).any()


@torch.no_grad()
def test_installed_and_rerouted():
    model = models.tiny_mixtral()
    before = model(IDS).logits
    install(model, DenseToSparse, steps=50, seed=4)
    routers = [layer.mlp.gate.installed for layer in model.model.layers]
    assert [router.seed for router in routers] == [4, 5]
    assert set_step(model, 50) == 2
    with record_routing(model) as trace:
        model(IDS)
    fresh = reroute(trace, DenseToSparse, layer=0)
    assert torch.equal(fresh.experts[:, 0], trace.layer(0).experts[:, 0])
    model.train()
    assert torch.isfinite(model(IDS).logits).all()
    assert aux_loss(model) > 0
    uninstall(model.eval())
    assert torch.equal(model(IDS).logits, before)


def test_bad_input():
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 1.5 \(DenseToSparse\)"):
        DenseToSparse(8, 4, threshold=1.5)
    with pytest.raises(ValueError, match=r"final_temperature must be at most temperature=0.2, got 0.3: the gate cools"):
        DenseToSparse(8, 4, temperature=0.2)
    with pytest.raises(ValueError, match="step must be at least 0 and steps at least 1, got -1 and 10"):
        temperature_schedule(-1, 10)
    with pytest.raises(ValueError, match="got no DenseToSparse router in MLP"):
        set_step(MLP([2, 2]), 0)
    with pytest.raises(ValueError, match="got step -1"):
        set_step(DenseToSparse(8, 4), -1)
    with pytest.raises(ValueError, match="NaN"):
        at(1.0, n=2).route(torch.full((2, 2), math.nan))
    with pytest.raises(ValueError, match="width d_model=8, got 7"):
        DenseToSparse(8, 4)(torch.randn(3, 7))
