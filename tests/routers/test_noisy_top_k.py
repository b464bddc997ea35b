"""Noisy top-k: the smooth load by hand, its start at zero, and evaluation without noise."""

import pytest
import torch

from notebook_kit.routers import NoisyTopK


def test_at_the_start_all_experts_are_alike():
    routing = NoisyTopK(8, 4, k=4).eval()(torch.randn(5, 8))
    torch.testing.assert_close(routing.weights, torch.full((5, 4), 0.25))
    assert routing.aux_loss == 0


def test_the_chance_by_hand():
    # z_0 = 1, threshold .5, std 1: P = Phi(.5) = .6915.
    router = NoisyTopK(1, 3, k=1 + 1)
    z = torch.tensor([[1.0, 0.5, 2.0]])
    chance = router._chance(z, z, torch.ones(1, 3))
    assert chance[0, 0].item() == pytest.approx(0.6915, abs=1e-4)  # in: against the third, .5
    assert chance[0, 1].item() == pytest.approx(0.3085, abs=1e-4)  # out: against the second, 1
    assert chance[0, 2].item() == pytest.approx(0.9332, abs=1e-4)


def test_the_chance_is_how_often_an_expert_is_picked_when_its_noise_is_drawn_again():
    router, z, sigma = NoisyTopK(1, 4, k=2), torch.tensor([[0.3, 0.1, -0.2, 0.6]]), torch.full((1, 4), 0.7)
    h = z + torch.randn(1, 4) * sigma
    chance = router._chance(z, h, sigma)[0, 1].item()
    again = h.repeat(20000, 1)
    again[:, 1] = 0.1 + 0.7 * torch.randn(20000)
    picked = (again.topk(2, dim=1).indices == 1).any(1).float().mean().item()
    assert picked == pytest.approx(chance, abs=0.012)


def test_with_every_expert_the_load_is_every_token():
    router = NoisyTopK(8, 3, k=3)
    assert torch.equal(router._chance(torch.randn(5, 3), torch.randn(5, 3), torch.ones(5, 3)), torch.ones(5, 3))


def test_noise_only_in_training():
    router, x = NoisyTopK(8, 6), torch.randn(40, 8)
    assert not torch.equal(router.train()(x).experts, router(x).experts)
    assert torch.equal(router.eval()(x).experts, router(x).experts)


def test_both_weights_learn():
    router = NoisyTopK(8, 6).train()
    routing = router(torch.randn(40, 8))
    (routing.aux_loss + routing.weights.square().sum()).backward()
    assert router.weight.grad.abs().sum() > 0
    assert router.noise_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("n_tokens", [0, 1, 9])
def test_small_batches_padding_and_half(n_tokens, training):
    router = NoisyTopK(8, 4).bfloat16().train(training)
    mask = torch.arange(n_tokens) < 5
    routing = router(torch.randn(n_tokens, 8, dtype=torch.bfloat16), mask=mask)
    assert torch.isfinite(routing.aux_loss)
    assert (routing.experts[~mask] == -1).all()
    assert routing.weights[~mask].sum() == 0


def test_one_expert_and_bad_input():
    assert NoisyTopK(8, 1, k=1).train()(torch.randn(3, 8)).weights.tolist() == [[1.0]] * 3
    with pytest.raises(ValueError, match="no gradient"):
        NoisyTopK(8, 4, k=1)
    with pytest.raises(ValueError, match="k must be at most n_experts=4, got 5"):
        NoisyTopK(8, 4, k=5)
    with pytest.raises(ValueError, match="NaN"):
        NoisyTopK(8, 4).route(torch.full((2, 4), float("nan")))
