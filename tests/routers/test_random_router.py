"""A router that is never trained, its schedule, and a dense network cut into slices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from notebook_kit import models
from notebook_kit.mixtures import MoE
from notebook_kit.models import MLP
from notebook_kit.routers import RandomRouter, install, join_mlp, k_schedule, set_k, slice_mlp, uninstall
from notebook_kit.training import fit

IDS = torch.arange(24).reshape(2, 12) * 7 % 256


def test_the_paper_s_schedule():
    steps = {0: 8, 25: 8, 26: 9, 100: 10, 200: 12, 300: 14, 400: 16, 999: 16}
    assert {step: k_schedule(step, 400, k_min=8, k_max=16) for step in steps} == steps


@pytest.mark.parametrize(
    ("schedule", "direction", "ks"),
    [
        ("linear", "down", [16, 14, 12, 10, 8]),
        ("cosine", "up", [8, 9, 10, 13, 16]),
        ("cosine", "down", [16, 15, 14, 11, 8]),
        ("exponential", "up", [8, 12, 14, 15, 16]),
        ("constant", "up", [16] * 5),
        ("multi-step", "up", [8, 8, 16, 16, 16]),
    ],
)
def test_other_shapes(schedule, direction, ks):
    found = [k_schedule(step, 400, schedule=schedule, direction=direction) for step in range(0, 401, 100)]
    assert found == ks


def test_the_steps_of_their_code():
    rising = [k_schedule(s, 100, k_min=1, k_max=16, schedule="multi-step") for s in range(0, 100, 10)]
    assert rising == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16]
    stairs = {"k_min": 1, "k_max": 16, "schedule": "multi-step", "direction": "down"}
    assert [k_schedule(s, 100, **stairs) for s in range(0, 100, 20)] == [16, 8, 4, 2, 1]
    assert k_schedule(99, 100, k_min=3, k_max=7, schedule="multi-step") == 7


@settings(deadline=None, max_examples=40)
@given(
    low=st.integers(1, 20),
    more=st.integers(0, 20),
    schedule=st.sampled_from(["linear", "cosine", "exponential", "multi-step", "constant"]),
)
def test_a_schedule_is_monotone_and_within_its_ends(low, more, schedule):
    for direction in ("up", "down"):
        ks = [k_schedule(s, 60, k_min=low, k_max=low + more, schedule=schedule, direction=direction) for s in range(70)]
        assert ks == sorted(ks, reverse=direction == "down")
        assert min(ks) >= low
        assert max(ks) <= low + more


def test_weights_are_the_renormalised_softmax_and_sets_are_nested():
    z, before = torch.randn(20, 7), [set() for _ in range(20)]
    for k in range(1, 8):
        routing = RandomRouter(1, 7, k=k).route(z)
        torch.testing.assert_close(routing.weights.sum(1), torch.ones(20))
        top = z.softmax(1).gather(1, routing.experts)
        torch.testing.assert_close(routing.weights, top / top.sum(1, keepdim=True), atol=1e-6, rtol=0)
        now = [set(row) for row in routing.experts.tolist()]
        assert all(a < b and len(b) == k for a, b in zip(before, now, strict=True))
        before = now
    assert routing.aux_loss == 0


def net(router):
    torch.manual_seed(0)
    return MoE([MLP([6, 4, 6]) for _ in range(router.n_experts)], router)


def train(moe, steps=5):
    fit(
        moe,
        lambda generator: torch.randn(16, 6, generator=generator),
        lambda model, x: (model(x) - x.flip(1)).square().mean(),
        steps=steps,
        weight_decay=0.1,
        progress=False,
    )


def test_training_never_touches_the_router():
    moe = net(RandomRouter(6, 5, k=3))
    router, x = moe.router, torch.randn(9, 6)
    before = (router.projection.clone(), router.bias.clone(), router(x).experts)
    moe.requires_grad_(True)
    train(moe)
    assert torch.equal(router.projection, before[0])
    assert torch.equal(router.bias, before[1])
    assert torch.equal(router(x).experts, before[2])
    assert not list(router.parameters())
    assert {"router.projection", "router.bias"} <= set(moe.state_dict())


def test_not_frozen_it_learns():
    moe = net(RandomRouter(6, 5, k=3, frozen=False))
    before = moe.router.projection.clone()
    train(moe)
    assert not torch.equal(moe.router.projection, before)


def test_drawn_as_a_linear_layer_and_by_seed():
    router = RandomRouter(64, 512, seed=3)
    for drawn in (router.projection, router.bias):
        assert drawn.abs().max() <= 1 / 8
        assert drawn.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    assert torch.equal(router.projection, RandomRouter(64, 512, seed=3).projection)
    assert not torch.equal(router.projection, RandomRouter(64, 512, seed=4).projection)


@pytest.mark.parametrize("n_experts", [1, 2, 8, 16])
def test_slices_are_the_dense_network(n_experts):
    torch.manual_seed(1)
    dense, x = MLP([6, 16, 5], "gelu"), torch.randn(9, 6)
    slices = slice_mlp(dense, n_experts)
    assert len(slices) == n_experts
    torch.testing.assert_close(sum(expert(x) for expert in slices), dense(x), atol=1e-5, rtol=0)
    back = join_mlp(slices)
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_a_zero_router_over_all_slices(scale):
    dense, x = MLP([6, 16, 6]), torch.randn(9, 6)
    router = RandomRouter(6, 8)
    router.projection.zero_()
    router.bias.zero_()
    y = MoE(slice_mlp(dense, 8, scale=scale), router)(x)
    torch.testing.assert_close(y * 8 / scale, dense(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(join_mlp(slice_mlp(dense, 8, scale=scale), scale=scale)(x), dense(x))


def test_the_order_of_slices_does_not_matter():
    router, order = RandomRouter(6, 8, k=3), torch.randperm(8)
    experts, x = slice_mlp(MLP([6, 16, 6]), 8), torch.randn(9, 6)
    y = MoE(experts, router)(x)
    router.projection, router.bias = router.projection[order], router.bias[order]
    torch.testing.assert_close(MoE([experts[i] for i in order], router)(x), y)


def test_one_model_serves_any_k():
    moe, x = net(RandomRouter(6, 5)), torch.randn(4, 6)
    for k in range(1, 6):
        assert set_k(moe, k) == 1
        moe(x)
        assert moe.routing.experts.shape == (4, k)
    with pytest.raises(ValueError, match="k must be at most n_experts=5, got 6"):
        set_k(moe, 6)
    assert moe.router.k == 5
    with pytest.raises(ValueError, match="no RandomRouter in MLP"):
        set_k(MLP([2, 2]), 1)


def test_the_gradient_reaches_the_k_experts_of_the_tokens_only():
    moe = net(RandomRouter(6, 8, k=2))
    moe(torch.randn(1, 6)).square().sum().backward()
    reached = {i for i, e in enumerate(moe.experts) if any(p.grad is not None and p.grad.any() for p in e.parameters())}
    assert reached == set(moe.routing.experts[0].tolist())


@torch.no_grad()
def test_installed_it_is_random_in_every_layer():
    model = models.tiny_mixtral()
    before = model(IDS).logits
    install(model, RandomRouter, seed=5)
    first, second = (layer.mlp.gate.installed for layer in model.model.layers[:2])
    assert first.k == 2
    assert torch.equal(first.projection, RandomRouter(first.d_model, 8, seed=5).projection)
    assert torch.equal(second.projection, RandomRouter(first.d_model, 8, seed=6).projection)
    assert not torch.allclose(model(IDS).logits, before)
    assert set_k(model, 8) == 2
    assert torch.isfinite(model(IDS).logits).all()
    uninstall(model)
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n_tokens", [0, 1, 6])
def test_small_batches_padding_and_half(n_tokens, dtype):
    router, mask = RandomRouter(8, 4, k=3).to(dtype), torch.arange(n_tokens) < 4
    routing = router(torch.randn(n_tokens, 8, dtype=dtype), mask=mask)
    assert routing.weights.dtype == torch.float32
    assert (routing.experts[~mask] == -1).all()
    assert (routing.weights[~mask] == 0).all()


def test_ties_and_one_expert():
    assert RandomRouter(1, 6, k=2).route(torch.zeros(2, 6)).experts.tolist() == [[0, 1]] * 2
    assert RandomRouter(8, 1)(torch.randn(3, 8)).weights.tolist() == [[1.0]] * 3


def test_bad_input():
    with pytest.raises(ValueError, match="k must be at most n_experts=4, got 5"):
        RandomRouter(8, 4, k=5)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        RandomRouter(8, 4).k = 0
    with pytest.raises(ValueError, match="width d_model=8, got 7"):
        RandomRouter(8, 4)(torch.randn(3, 7))
    with pytest.raises(ValueError, match="NaN"):
        RandomRouter(1, 2).route(torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match="k_min must be at most k_max=4, got 5"):
        k_schedule(0, 10, k_min=5, k_max=4)
    with pytest.raises(ValueError, match="step must be at least 0"):
        k_schedule(-1, 10)
    with pytest.raises(ValueError, match="n_experts must divide the hidden width 16, got 3"):
        slice_mlp(MLP([6, 16, 6]), 3)
    with pytest.raises(ValueError, match="one hidden layer, got 3"):
        slice_mlp(MLP([6, 16, 16, 6]), 2)
    with pytest.raises(ValueError, match="alike at both ends, got 2 kinds"):
        join_mlp([MLP([6, 2, 6]), MLP([6, 2, 5])])
    with pytest.raises(ValueError, match="got 0 kinds"):
        join_mlp([])


def test_dropout_like_the_loss_falls():
    moe = net(RandomRouter(6, 4))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(9))
    before = F.mse_loss(moe(x), x.flip(1))
    train(moe, steps=60)
    assert F.mse_loss(moe(x), x.flip(1)) < before
