"""Null experts by the card's numbers, and a trained Mixtral that gets them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit import models
from notebook_kit.mixtures import MoE
from notebook_kit.models import MLP
from notebook_kit.routers import (
    NullExperts,
    TopK,
    aux_loss,
    install,
    pooled_balance_loss,
    record_routing,
    reroute,
    uninstall,
)

IDS = torch.arange(24).reshape(2, 12) * 7 % 256


def test_the_hand_worked_token():
    z = torch.tensor([[2.0, 1, 0, -1, 1.5, 0.5, 0.5, 0.5]])
    routing = NullExperts(1, 4, n_null=4, k=3).route(z)
    expected = torch.tensor([[0.3535, 0.1300, 0.0478, 0.0176, 0.2144, 0.0789, 0.0789, 0.0789]])
    torch.testing.assert_close(routing.probs, expected, atol=1e-4, rtol=0)
    assert routing.experts.tolist() == [[0, -1, 1]]
    one = torch.tensor(1.0).sigmoid().item()
    assert routing.weights[0].tolist() == pytest.approx([one, 0, 1 - one], abs=1e-6)
    z[0, 4] = 1.9  # the null's own score does not matter while it is picked
    torch.testing.assert_close(NullExperts(1, 4, n_null=4, k=3).route(z).weights, routing.weights)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), k=st.integers(2, 6))
def test_without_nulls_it_is_top_k_bit_for_bit(seed, k):
    z = torch.randn(9, 6, generator=torch.Generator().manual_seed(seed))
    ours = NullExperts(1, 6, n_null=0, k=k, balance_coef=0.01).route(z)
    plain = TopK(1, 6, k=k).eval().route(z)
    assert torch.equal(ours.experts, plain.experts)
    assert torch.equal(ours.weights, plain.weights)
    # Shares of picks here, picks a token there.
    torch.testing.assert_close(ours.aux_loss * k, plain.aux_loss)


def test_a_token_of_nulls_only():
    moe = MoE([MLP([2, 2]) for _ in range(2)], NullExperts(2, 2, n_null=4, k=2))
    moe.router.weight.data.fill_(-5.0)
    moe.router.null_weight.data.fill_(5.0)
    x = torch.tensor([[1.0, 1.0], [1.0, 1.0]], requires_grad=True)
    y = moe(x)
    (y.square().sum() + moe.routing.aux_loss).backward()
    assert y.tolist() == [[0.0, 0.0]] * 2
    assert (moe.routing.experts == -1).all()
    for expert in moe.experts:
        assert all(p.grad is None or not p.grad.any() for p in expert.parameters())
    assert torch.isfinite(moe.router.weight.grad).all()
    assert torch.isfinite(x.grad).all()


def test_pooled_the_loss_does_not_care_which_null():
    torch.manual_seed(0)
    p, picks = torch.rand(20, 8).softmax(1), torch.randint(0, 8, (20, 3))
    moved = torch.where(picks >= 4, 4 + (picks + 1) % 4, picks)
    shifted = torch.where(picks >= 4, 4, picks)
    pooled = pooled_balance_loss(p, picks, n_null=4)
    torch.testing.assert_close(pooled_balance_loss(p, moved, n_null=4), pooled)
    torch.testing.assert_close(pooled_balance_loss(p, shifted, n_null=4), pooled)
    assert abs(pooled_balance_loss(p, shifted) - pooled_balance_loss(p, picks)) > 1e-3


def test_an_even_load_gives_one():
    p, picks = torch.full((8, 8), 1 / 8), torch.arange(8)[:, None]
    for n_null in (0, 3, 7):
        assert pooled_balance_loss(p, picks, n_null=n_null).item() == pytest.approx(1, abs=1e-6)
    assert pooled_balance_loss(p[:0], picks[:0], n_null=3).item() == 0


def test_pool_nulls_is_an_ablation_of_the_loss_only():
    z = torch.randn(30, 12)
    pooled, apart = (NullExperts(1, 4, n_null=8, pool_nulls=pool).route(z) for pool in (True, False))
    assert torch.equal(pooled.weights, apart.weights)
    assert pooled.aux_loss != apart.aux_loss


def test_a_null_shadows_the_expert_it_was_tiled_from():
    torch.manual_seed(1)
    router = NullExperts(5, 4, n_null=8, k=6)
    router.weight.data.normal_()
    router.adopt(router.weight)
    x = torch.randn(10, 5)
    old, new = router.logits(x)[:, :4].softmax(1), router(x).probs
    torch.testing.assert_close(new[:, :4], old / 3)
    torch.testing.assert_close(new[:, :4] / new[:, :4].sum(1, keepdim=True), old)
    # Of equal scores the true expert comes first: 6 picks in groups of 3 are 2 true experts.
    assert ((router(x).experts >= 0).sum(1) == 2).all()
    short = router.route(router.logits(x)[:, :4])
    assert torch.equal(short.experts, router(x).experts)
    torch.testing.assert_close(short.weights, router(x).weights)


def test_expected_experts_at_an_even_load():
    assert NullExperts(1, 8, n_null=16, k=4).expected_experts == pytest.approx(4 / 3)
    assert NullExperts(1, 8, n_null=8, k=4).expected_experts == 2
    assert NullExperts(1, 8).n_null == 16


@pytest.mark.parametrize("build", [models.tiny_mixtral, models.tiny_olmoe])
@torch.no_grad()
def test_installed_in_a_trained_model(build):
    model = build()
    before, keys = model(IDS).logits, list(model.state_dict())
    install(model, NullExperts, n_null=16, k=4)
    gate = model.model.layers[0].mlp.gate
    assert torch.equal(gate.installed.null_weight, gate.weight.repeat(2, 1))
    with record_routing(model) as trace:
        model(IDS)
    assert ((trace.layer(1).experts >= 0).sum(1) == 2).all()
    # Two true experts, renormalised: what a top-2 Mixtral computes.
    if build is models.tiny_mixtral:
        torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=0)
    assert aux_loss(model) > 0
    uninstall(model)
    assert torch.equal(model(IDS).logits, before)
    assert list(model.state_dict()) == keys
    install(model, NullExperts, n_null=0, k=8)
    assert torch.isfinite(model(IDS).logits).all()


def test_the_installed_nulls_learn():
    model = models.tiny_mixtral().train()
    install(model, NullExperts, layers=[1])
    model(IDS, labels=IDS).loss.add(aux_loss(model)).backward()
    gate = model.model.layers[1].mlp.gate
    assert gate.weight.grad.abs().sum() > 0
    assert gate.installed.null_weight.grad.abs().sum() > 0


@torch.no_grad()
def test_a_recorded_trace_routed_again():
    model = models.tiny_mixtral()
    with record_routing(model) as trace:
        model(IDS)
    for k in (3, 4, 6):
        routing = reroute(trace, NullExperts, layer=0, n_null=16, k=k)
        assert ((routing.experts >= 0).sum(1) == -(-k // 3)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n_tokens", [0, 1, 6])
def test_small_batches_padding_and_half(n_tokens, dtype):
    router, mask = NullExperts(8, 3).to(dtype), torch.arange(n_tokens) < 4
    routing = router(torch.randn(n_tokens, 8, dtype=dtype), mask=mask)
    assert routing.weights.dtype == torch.float32
    assert routing.logits.shape == (n_tokens, 9)
    assert (routing.experts[~mask] == -1).all()
    assert (routing.weights[~mask] == 0).all()
    sums = routing.weights.sum(1)
    some = (routing.experts >= 0).any(1)
    torch.testing.assert_close(sums, some.float())
    torch.testing.assert_close(routing.aux_loss, router.route(routing.logits[:4]).aux_loss)


def test_all_picks_ties_and_renaming():
    torch.manual_seed(2)
    assert NullExperts(1, 3, n_null=2, k=4).route(torch.zeros(2, 5)).experts.tolist() == [[0, 1, 2, -1]] * 2
    z, order = torch.randn(12, 9), torch.randperm(3)
    columns = torch.cat([order, torch.arange(3, 9)])
    plain, renamed = (NullExperts(1, 3, k=9).route(part) for part in (z, z[:, columns]))
    mapped = order[renamed.experts.clamp_min(0)].where(renamed.experts >= 0, -1)
    assert torch.equal(mapped, plain.experts)
    torch.testing.assert_close(plain.weights, renamed.weights)
    torch.testing.assert_close(plain.aux_loss, renamed.aux_loss)


def test_bad_input():
    with pytest.raises(ValueError, match="k must be at most n_experts \\+ n_null=6, got 7"):
        NullExperts(8, 4, n_null=2, k=7)
    with pytest.raises(ValueError, match="logits need 4 or 6 columns, one an expert, got 5"):
        NullExperts(8, 4, n_null=2, k=2).route(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="NaN"):
        NullExperts(1, 2).route(torch.full((2, 6), float("nan")))
