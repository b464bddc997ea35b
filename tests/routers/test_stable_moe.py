"""StableMoE: both stages, their losses by hand, and that stage 2 never changes a route."""

import pytest
import torch
from torch.nn import functional as F

from notebook_kit.mixtures import MoE
from notebook_kit.models import MLP
from notebook_kit.routers import StableMoE

IDS = torch.arange(24) % 6


def loss_by_hand(router, x, ids):
    """Expert by expert, as the paper writes it; divided by the number of tokens."""
    a = x @ router.weight.T
    first = a.argmax(1)
    balance, even = 0, len(x) / router.n_experts
    for i in range(router.n_experts):
        mine = first == i
        balance = balance + (int(mine.sum()) - even) / even * a[mine, i].sigmoid().sum()
    distil = F.cross_entropy(router.embedding(ids) @ router.centroids.T, first, reduction="sum")
    return (0.3 * balance + 0.3 * distil) / len(x)


def test_stage_1_by_hand():
    router, x = StableMoE(8, 4, vocab_size=6, capacity_factor=4.0).train(), torch.randn(24, 8)
    routing = router(x, tokens=IDS)
    a = x @ router.weight.T
    assert torch.equal(routing.experts[:, 0], a.argmax(1))
    torch.testing.assert_close(routing.weights[:, 0], a.amax(1).sigmoid())
    torch.testing.assert_close(routing.aux_loss, loss_by_hand(router, x, IDS))


def test_the_balance_loss_by_hand():
    # Three tokens at expert 0, one at expert 1, n = 2: (3-2)/2 = .5 each for three, -.5 for one.
    z = torch.tensor([[2.0, 0], [2, 0], [2, 0], [0, 1]])
    router = StableMoE(1, 2, vocab_size=6, distill_coef=0.0, balance_coef=1.0).train()
    s2, s1 = torch.tensor(2.0).sigmoid(), torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(router.route(z, tokens=IDS[:4]).aux_loss, (1.5 * s2 - 0.5 * s1) / 4)


def test_stage_2_is_constant_for_an_id_and_has_no_loss():
    router = StableMoE(8, 4, vocab_size=6, capacity_factor=4.0).train()
    first, second = (router(torch.randn(24, 8), tokens=IDS) for _ in range(2))
    assert not torch.equal(first.experts, second.experts)
    router.begin_stage_2()
    routes = set()
    for _ in range(5):
        x = torch.randn(24, 8)
        routing = router(x, tokens=IDS)
        assert routing.aux_loss == 0
        routes |= set(zip(IDS.tolist(), routing.experts[:, 0].tolist(), strict=True))
        torch.testing.assert_close(routing.weights, (x @ router.weight.T).gather(1, routing.experts).sigmoid())
    assert len(routes) == 6
    router.zero_grad()
    routing.weights.sum().backward()
    assert router.weight.grad.abs().sum() > 0
    assert router.embedding.weight.grad is None
    assert router.centroids.grad is None


def test_evaluation_uses_the_distilled_router_in_stage_1_too():
    router, x = StableMoE(8, 4, vocab_size=6, capacity_factor=4.0).eval(), torch.randn(24, 8)
    expected = router.distilled(IDS).argmax(1)
    assert torch.equal(router(x, tokens=IDS).experts[:, 0], expected)
    assert int(router.calls) == 0


def test_distillation_learns_what_stage_1_does():
    torch.manual_seed(0)
    router, meaning = StableMoE(8, 4, vocab_size=6, balance_coef=0.0), torch.randn(6, 8)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(150):
        routing = router(meaning[IDS] + 0.01 * torch.randn(24, 8), tokens=IDS)
        optimizer.zero_grad()
        routing.aux_loss.backward()
        optimizer.step()
    assert torch.equal(router.distilled(torch.arange(6)).argmax(1), router.logits(meaning).argmax(1))


def test_the_switch_by_count_and_that_it_is_saved():
    router, x = StableMoE(8, 4, vocab_size=6, distill_steps=3).train(), torch.randn(24, 8)
    stages = []
    for _ in range(4):
        stages.append(int(router.stage))
        router(x, tokens=IDS)
    assert stages == [1, 1, 1, 2]
    fresh = StableMoE(8, 4, vocab_size=6)
    fresh.load_state_dict(router.state_dict())
    assert int(fresh.stage) == 2
    assert "stage=2" in repr(fresh)


def test_overflow_passes_unchanged():
    router = StableMoE(8, 4, vocab_size=6, capacity_factor=0.25).train()
    moe, x = MoE([MLP([8, 8, 8]) for _ in range(4)], router, residual=True), torch.randn(2, 12, 8)
    y = moe(x, tokens=IDS.reshape(2, 12))
    dropped = (moe.routing.experts[:, 0] < 0).reshape(2, 12)
    assert dropped.any()
    torch.testing.assert_close(y[dropped], x[dropped])
    assert not torch.allclose(y[~dropped], x[~dropped])


def test_padding_counts_nowhere():
    router, x = StableMoE(8, 4, vocab_size=6), torch.randn(24, 8)
    mask = torch.arange(24) < 10
    routing = router(x, tokens=IDS.where(mask, -5), mask=mask)
    alone = router(x[:10], tokens=IDS[:10])
    torch.testing.assert_close(routing.aux_loss, alone.aux_loss)
    assert torch.equal(routing.experts[:10], alone.experts)
    assert (routing.experts[10:] == -1).all()


def test_bad_ids():
    with pytest.raises(ValueError, match="StableMoE routes by token ids"):
        StableMoE(8, 4)(torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"in \[0, 5\], got 6"):
        StableMoE(8, 4, vocab_size=6)(torch.randn(1, 8), tokens=torch.tensor([6]))
