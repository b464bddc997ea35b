"""Top-p by hand-worked examples, and what holds for any logits."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit import models
from notebook_kit.mixtures import MoE
from notebook_kit.models import MLP
from notebook_kit.routers import TopK, TopP, aux_loss, entropy_loss, install, record_routing, reroute, uninstall
from notebook_kit.routers.top_p import nucleus

P = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
IDS = torch.arange(24).reshape(2, 12) * 7 % 256


def route(probs, **hyperparameters):
    return TopP(1, probs.shape[1], **hyperparameters).eval().route(probs.log())


@pytest.mark.parametrize(
    ("threshold", "k", "mass"),
    [
        (0.0, 1, 0.5),
        (0.3, 1, 0.5),
        (0.4, 1, 0.5),
        (0.5, 1, 0.5),
        (0.6, 2, 0.8),
        (0.7, 2, 0.8),
        (0.9, 3, 0.95),
        (1, 4, 1),
    ],
)
def test_as_many_experts_as_reach_the_threshold(threshold, k, mass):
    routing = route(P, threshold=threshold)
    assert routing.experts.tolist() == [list(range(k))]
    assert routing.weights.sum().item() == pytest.approx(mass, abs=1e-6)
    assert route(P, threshold=threshold, normalize=True).weights.sum().item() == pytest.approx(1, abs=1e-6)


def test_a_flat_router_over_sixteen():
    routing = TopP(1, 16, threshold=0.4).route(torch.zeros(3, 16))
    assert routing.experts.tolist() == [list(range(7))] * 3


def test_entropy_in_nats():
    assert entropy_loss(P.log()).item() == pytest.approx(1.14212, abs=1e-5)
    assert entropy_loss(torch.zeros(2, 16).log_softmax(1)).item() == pytest.approx(2.77259, abs=1e-5)
    sure = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert entropy_loss(sure).item() == 0
    mask = torch.tensor([True, False])
    assert entropy_loss(torch.cat([P, P.roll(1)]).log(), mask=mask).item() == pytest.approx(1.14212, abs=1e-5)


def test_the_entropy_pulls_at_no_flat_row():
    z = torch.zeros(3, 5, requires_grad=True)
    entropy_loss(z.log_softmax(1)).backward()
    assert z.grad.abs().max() < 1e-7


def test_both_losses_are_in_the_routing():
    z = torch.randn(20, 4)
    both = TopP(1, 4, balance_coef=0.5, entropy_coef=0.25).route(z).aux_loss
    parts = [TopP(1, 4, balance_coef=0.5, entropy_coef=0.0), TopP(1, 4, balance_coef=0.0, entropy_coef=0.25)]
    torch.testing.assert_close(both, sum(router.route(z).aux_loss for router in parts))
    assert TopP(1, 4, balance_coef=0.0, entropy_coef=0.0).route(z).aux_loss == 0
    # An even load gives the mean number of experts: here every token uses 2 of 4, in turn.
    even = torch.tensor([[0.45, 0.45, 0.05, 0.05], [0.05, 0.05, 0.45, 0.45]])
    balance = TopP(1, 4, threshold=0.9, balance_coef=1.0, entropy_coef=0.0).route(even.log()).aux_loss
    assert balance.item() == pytest.approx(2, abs=1e-5)


def test_threshold_one_is_the_dense_mixture():
    torch.manual_seed(0)
    router, x = TopP(6, 12, threshold=1.0), torch.randn(9, 6)
    router.weight.data.normal_()
    moe = MoE([MLP([6, 5, 6]) for _ in range(12)], router)
    p = router.logits(x).softmax(1)
    dense = sum(p[:, [i]] * expert(x) for i, expert in enumerate(moe.experts))
    torch.testing.assert_close(moe(x), dense, atol=1e-6, rtol=0)
    assert (moe.routing.experts >= 0).all()


def test_an_expert_nobody_needs_gets_no_rows():
    seen = []
    experts = [MLP([6, 6]) for _ in range(4)]
    for i, expert in enumerate(experts):
        expert.register_forward_hook(lambda module, args, out, i=i: seen.append((i, len(args[0]))))
    router = TopP(6, 4, threshold=0.4)
    router.weight.data.zero_()
    router.weight.data[2, 0] = 5.0
    MoE(experts, router)(torch.eye(6)[:1].repeat(3, 1))
    assert seen == [(2, 3)]


def test_temperature_divides_the_logits():
    z = torch.randn(30, 8)
    hot, plain = TopP(1, 8, temperature=3.0, threshold=0.7).route(z), TopP(1, 8, threshold=0.7).route(z / 3)
    assert torch.equal(hot.experts, plain.experts)
    assert (hot.experts >= 0).sum() > (TopP(1, 8, threshold=0.7).route(z).experts >= 0).sum()


def test_normalized_sets_of_size_k_are_mixtrals():
    z = torch.randn(200, 6)
    routing = TopP(1, 6, threshold=0.6, normalize=True).route(z)
    counts = (routing.experts >= 0).sum(1)
    for k in (2, 3):
        mixtral, rows = TopK(1, 6, k=k).eval().route(z[counts == k]), counts == k
        assert rows.any()
        assert torch.equal(routing.experts[rows, :k], mixtral.experts)
        torch.testing.assert_close(routing.weights[rows, :k], mixtral.weights)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), n=st.integers(1, 40), scale=st.sampled_from([0.0, 0.5, 3.0, 30.0]))
def test_what_holds_for_any_logits(seed, n, scale):
    z = torch.randn(7, n, generator=torch.Generator().manual_seed(seed)) * scale
    sets = []
    for threshold in (0.0, 0.2, 0.5, 0.9, 1.0):
        routing = TopP(1, n, threshold=threshold).eval().route(z)
        used = routing.experts >= 0
        assert used[:, 0].all()
        assert (routing.weights[~used] == 0).all()
        assert (routing.weights.sum(1) >= threshold - 1e-5).all()
        assert (routing.weights.sum(1) <= 1 + 1e-5).all()
        # Without the last expert the threshold is not reached.
        last = routing.weights.masked_fill(~used, 9).amin(1)
        assert ((routing.weights.sum(1) - last < threshold + 1e-5) | (used.sum(1) == 1)).all()
        sets.append([set(row) - {-1} for row in routing.experts.tolist()])
    for fewer, more in pairwise(sets):
        assert all(a <= b for a, b in zip(fewer, more, strict=True))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), threshold=st.floats(0, 1), levels=st.integers(1, 9))
def test_the_short_way_is_the_whole_sort(seed, threshold, levels):
    z = torch.randint(0, levels, (11, 30), generator=torch.Generator().manual_seed(seed)).float()
    p = z.softmax(1)
    order = p.sort(dim=1, descending=True, stable=True)
    before = order.values.cumsum(1) - order.values
    kept = order.values > 0 if threshold >= 1 else before < threshold - 1e-6
    kept[:, 0] = True
    picks, ours = nucleus(p, threshold)
    assert torch.equal(ours.sum(1), kept.sum(1))
    assert torch.equal(picks.where(ours, -1), order.indices.where(kept, -1)[:, : picks.shape[1]])


def test_renaming_experts_renames_the_answer():
    z, order = torch.randn(12, 20), torch.randperm(20)
    plain, renamed = TopP(1, 20).route(z), TopP(1, 20).route(z[:, order])
    mapped = order[renamed.experts.clamp_min(0)].where(renamed.experts >= 0, -1)
    assert torch.equal(mapped, plain.experts)
    torch.testing.assert_close(renamed.weights, plain.weights)
    torch.testing.assert_close(renamed.aux_loss, plain.aux_loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n_tokens", [0, 1, 5])
def test_small_batches_padding_and_half(n_tokens, dtype):
    router, mask = TopP(8, 20, threshold=0.9).to(dtype), torch.arange(n_tokens) < 3
    routing = router(torch.randn(n_tokens, 8, dtype=dtype), mask=mask)
    assert routing.probs.dtype == routing.weights.dtype == torch.float32
    assert (routing.experts[~mask] == -1).all()
    assert (routing.weights[~mask] == 0).all()
    assert torch.isfinite(routing.aux_loss)
    alone = router.route(routing.logits[:3])
    torch.testing.assert_close(routing.aux_loss, alone.aux_loss)


def test_ties_and_one_expert():
    assert TopP(1, 5, threshold=0.5).route(torch.zeros(2, 5)).experts.tolist() == [[0, 1, 2]] * 2
    assert TopP(8, 1)(torch.randn(3, 8)).weights.tolist() == [[1.0]] * 3


def test_the_router_learns_from_the_task_and_from_its_losses():
    for coefficients in ({"balance_coef": 0.0, "entropy_coef": 0.0}, {"balance_coef": 0.1, "entropy_coef": 0.1}):
        router = TopP(8, 4, **coefficients)
        routing = router(torch.randn(20, 8))
        (routing.weights[:, 0].sum() + routing.aux_loss).backward()
        assert router.weight.grad.abs().sum() > 0
        assert torch.isfinite(router.weight.grad).all()


def test_bad_input():
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 1.1 \(TopP\)"):
        TopP(8, 4, threshold=1.1)
    with pytest.raises(ValueError, match="NaN, first at token 1"):
        TopP(1, 2).route(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]))
    with pytest.raises(ValueError, match="width d_model=8, got 7"):
        TopP(8, 4)(torch.randn(3, 7))


@pytest.mark.parametrize("build", [models.tiny_mixtral, models.tiny_qwen3_moe, models.tiny_deepseek_v3])
@torch.no_grad()
def test_installed_the_trace_knows_how_many_experts_each_token_used(build):
    model = build()
    before = model(IDS).logits
    install(model, TopP, threshold=0.3)
    with record_routing(model) as trace:
        model(IDS)
    routing = trace.layer(0)
    fresh = reroute(trace, TopP, layer=0, threshold=0.3)
    assert torch.equal((routing.experts >= 0).sum(1), (fresh.experts >= 0).sum(1))
    assert aux_loss(model) > 0
    uninstall(model)
    assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_installed_with_threshold_one_is_all_experts():
    model = models.tiny_mixtral()
    install(model, TopK, k=8)
    dense = model(IDS).logits
    install(model, TopP, threshold=1.0)  # normalize as Mixtral does
    torch.testing.assert_close(model(IDS).logits, dense, atol=1e-5, rtol=0)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 15)
