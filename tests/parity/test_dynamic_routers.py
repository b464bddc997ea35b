"""Top-p, null experts, random routers and THOR's loss against transformers, torch and plain loops."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import TopPLogitsWarper
from transformers.models.mixtral import modeling_mixtral as mixtral

from notebook_kit import models, zoo
from notebook_kit.routers import (
    NullExperts,
    RandomRouter,
    StochasticExperts,
    TopP,
    consistency_loss,
    install,
    pooled_balance_loss,
    record_routing,
    reroute,
    set_k,
)

IDS = torch.arange(60).reshape(3, 20) * 11 % 256


@pytest.fixture(scope="module")
def trained():
    """The logits of a trained router."""
    bed = zoo.language_moe()
    with torch.no_grad(), record_routing(bed.model) as trace:
        bed.model(bed.batches("test")["fin"][:4])
    return trace


def kept_by_transformers(logits, threshold):
    warped = TopPLogitsWarper(top_p=threshold)(None, logits.log_softmax(1))
    return torch.isfinite(warped)


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("source", ["random", "trained"])
def test_the_set_is_that_of_nucleus_sampling(threshold, source, trained):
    logits = trained.layer_logits(1) if source == "trained" else torch.randn(500, 40) * 2
    routing = TopP(1, logits.shape[1], threshold=threshold).eval().route(logits)
    ours = torch.zeros_like(logits).scatter_add(1, routing.experts.clamp_min(0), (routing.experts >= 0).float()) > 0
    assert torch.equal(ours, kept_by_transformers(logits, threshold))


@pytest.mark.parametrize("build", [models.tiny_mixtral, models.tiny_olmoe])
@torch.no_grad()
def test_installed_top_p_is_a_loop_over_the_block_s_experts(build):
    model = build()
    install(model, TopP, threshold=0.5, normalize=True)
    block, x = model.model.layers[0].mlp, torch.randn(1, 30, 32)
    nn.init.normal_(block.gate.weight, std=0.3)
    rows, expected = x[0], torch.zeros(30, 32)
    p = F.linear(rows, block.gate.weight).softmax(1)
    for t in range(30):
        order = p[t].argsort(descending=True)
        k = int((p[t][order].cumsum(0) < 0.5).sum()) + 1
        for i in order[:k]:
            gate, up = (block.experts.gate_up_proj[i] @ rows[t]).chunk(2)
            expected[t] += p[t, i] / p[t][order[:k]].sum() * (block.experts.down_proj[i] @ (F.silu(gate) * up))
    torch.testing.assert_close(block(x)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_null", [0, 4, 16])
@torch.no_grad()
def test_null_experts_in_mixtral_s_own_block(n_null):
    """transformers' eager experts skip the index N: so nulls can be dispatched there."""
    model = models.tiny_mixtral()
    model.set_experts_implementation("eager")
    block, x = model.model.layers[0].mlp, torch.randn(25, 32)
    nn.init.normal_(block.gate.weight, std=0.3)
    install(model, NullExperts, n_null=n_null, k=4)
    if n_null:
        nn.init.normal_(block.gate.installed.null_weight, std=0.3)
    ours = block(x[None])[0]
    z = torch.cat([F.linear(x, block.gate.weight), F.linear(x, block.gate.installed.null_weight)], 1)
    p, picks = z.softmax(1).topk(4)
    true = picks < 8
    weights = p * true / (p * true).sum(1, keepdim=True).clamp_min(1e-30)
    theirs = block.experts(x, picks.clamp_max(8), weights)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [1, 3])
def test_without_nulls_the_balance_loss_is_mixtral_s(k):
    logits = torch.randn(40, 6)
    picks = logits.topk(k, dim=1).indices
    theirs = mixtral.load_balancing_loss_func((logits,), 6, k)
    torch.testing.assert_close(k * pooled_balance_loss(logits.softmax(1), picks), theirs)


@torch.no_grad()
def test_shadows_leave_a_trained_mixtral_as_it_was(trained):
    for layer in range(3):
        recorded = trained.layer(layer)
        routing = reroute(trained, NullExperts, layer=layer, n_null=16, k=4)
        used = routing.experts >= 0
        assert torch.equal(routing.experts[used].reshape(-1, 2), recorded.experts)
        torch.testing.assert_close(routing.weights[used].reshape(-1, 2), recorded.weights)


@torch.no_grad()
def test_a_random_router_is_a_frozen_linear_layer():
    router, linear, x = RandomRouter(16, 6, k=3), nn.Linear(16, 6), torch.randn(30, 16)
    linear.weight.copy_(router.projection)
    linear.bias.copy_(router.bias)
    values, picks = linear(x).topk(3)
    routing = router(x)
    assert torch.equal(routing.experts, picks)
    torch.testing.assert_close(routing.weights, values.softmax(1))


@torch.no_grad()
def test_random_experts_in_mixtral_s_own_block():
    model = models.tiny_mixtral()
    install(model, RandomRouter, seed=3)
    assert set_k(model, 5) == 2
    block, x = model.model.layers[1].mlp, torch.randn(25, 32)
    routing = block.gate.installed(x)
    torch.testing.assert_close(block(x[None])[0], block.experts(x, routing.experts, routing.weights))
    install(model, StochasticExperts, inference="ensemble")
    every = torch.arange(8).expand(25, 8)
    torch.testing.assert_close(block(x[None])[0], block.experts(x, every, torch.full((25, 8), 1 / 8)))


def test_consistency_is_torch_s_kl_both_ways():
    a, b = torch.randn(40, 10) * 3, torch.randn(40, 10) * 3
    log_p, log_q = a.log_softmax(1), b.log_softmax(1)
    one, two = (F.kl_div(u, v, reduction="batchmean", log_target=True) for u, v in ((log_p, log_q), (log_q, log_p)))
    torch.testing.assert_close(consistency_loss(a, b), (one + two) / 2)
