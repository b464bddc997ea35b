"""The mixture against a loop over tokens, on any experts and any router."""

import copy

import pytest
import torch
from torch import nn

from notebook_kit import models
from notebook_kit.mixtures import MoE, SwiGLUExperts, aux_loss
from notebook_kit.models import MLP
from notebook_kit.routers import ExpertChoice, HashRouter, NoisyTopK, StableMoE, TopK
from tests.untyped import untyped

ROUTERS = [
    lambda: TopK(6, 5),
    lambda: TopK(6, 5, k=1, convention="switch", capacity_factor=0.5),
    lambda: NoisyTopK(6, 5, k=3),
    lambda: ExpertChoice(6, 5, k=2),
]


def by_loop(moe, x):
    """Σ w E(x), one token at a time."""
    routing = moe.router(x)
    rows = []
    for row, weights, experts in zip(x, routing.weights, routing.experts.tolist(), strict=True):
        total = torch.zeros_like(row)
        for weight, expert in zip(weights, experts, strict=True):
            if expert >= 0:
                total = total + weight * one(moe.experts, expert, row)
        rows.append(total)
    return torch.stack(rows)


def one(experts, index, row):
    if isinstance(experts, nn.ModuleList):
        return experts[index](row)
    gate, up = (experts.gate_up[index] @ row).chunk(2)
    return experts.down[index] @ (nn.functional.silu(gate) * up)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("fused", [False, True])
def test_the_sparse_sum_and_its_gradient(router, fused):
    experts = SwiGLUExperts(5, 6, 7) if fused else [MLP([6, 9, 6]) for _ in range(5)]
    moe, x = MoE(experts, router()).eval(), torch.randn(11, 6, requires_grad=True)
    expected = by_loop(moe, x)
    torch.testing.assert_close(moe(x), expected)
    parameters = [x, *moe.parameters()]
    loss, plain = moe(x).square().sum(), expected.square().sum()
    ours = torch.autograd.grad(loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(plain, parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        a, b = (torch.zeros(()) if g is None or not g.any() else g for g in (a, b))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("d_model", "d_ff"), [(6, 7), (8, 16)])  # the second can use torch's grouped product
@pytest.mark.parametrize("n_tokens", [1, 40, 700])
def test_few_and_many_rows(d_model, d_ff, n_tokens):
    moe = MoE(SwiGLUExperts(5, d_model, d_ff), TopK(d_model, 5)).eval()
    x = torch.randn(n_tokens, d_model, requires_grad=True)
    expected = by_loop(moe, x)
    torch.testing.assert_close(moe(x), expected, atol=1e-5, rtol=1e-4)
    parameters = [x, moe.experts.gate_up, moe.experts.down, moe.router.weight]
    ours, theirs = (torch.autograd.grad(y.square().sum(), parameters) for y in (moe(x), expected))
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(moe.double()(x.double()).float(), expected, atol=1e-5, rtol=1e-4)


def test_shapes_padding_and_the_remembered_routing():
    moe = MoE([MLP([6, 6]) for _ in range(5)], TopK(6, 5, capacity_factor=1.0))
    x = torch.randn(2, 3, 6)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    y = moe(x, mask=mask)
    assert y.shape == x.shape
    assert (y[~mask] == 0).all()
    assert len(moe.routing) == 6
    assert aux_loss(moe) == moe.routing.aux_loss
    assert moe(torch.randn(0, 6)).shape == (0, 6)
    assert moe(torch.randn(6)).shape == (6,)


def test_when_nobody_is_served():
    moe = MoE([MLP([6, 6]) for _ in range(5)], TopK(6, 5))
    assert moe(torch.randn(4, 6), mask=torch.zeros(4, dtype=torch.bool)).tolist() == [[0.0] * 6] * 4


def test_a_trained_layer_can_be_copied():
    moe = MoE([MLP([6, 6]) for _ in range(5)], TopK(6, 5))
    moe(torch.randn(4, 6)).sum().backward()
    x = torch.randn(3, 6)
    torch.testing.assert_close(copy.deepcopy(moe)(x), moe(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    moe = MoE(SwiGLUExperts(5, 6, 7), TopK(6, 5)).eval()
    x = torch.randn(9, 6)
    expected = moe(x)
    half = copy.deepcopy(moe).to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), expected, atol=0.1, rtol=0.1)


def test_bad_input():
    with pytest.raises(ValueError, match="n_experts=4, got 5 experts"):
        MoE([MLP([6, 6]) for _ in range(5)], TopK(6, 4))
    with pytest.raises(ValueError, match="leaks the future"):
        MoE([MLP([6, 6]) for _ in range(5)], ExpertChoice(6, 5), causal=True)
    moe = MoE([MLP([6, 6]) for _ in range(5)], TopK(6, 5))
    for mask in (torch.ones(2, 4).bool(), torch.ones(6).bool(), torch.ones(2, 3)):
        with untyped(), pytest.raises(ValueError, match=r"True or False for each token, shape \[2, 3\], got"):
            moe(torch.randn(2, 3, 6), mask=mask)
    with pytest.raises(ValueError, match="must consist of a `gate` and fused `experts`, it has"):
        MoE.from_transformers(models.tiny_deepseek_v3().model.layers[1].mlp)


@pytest.mark.parametrize("router", ROUTERS)
def test_what_the_weights_leave_over_passes_by(router):
    moe, x = MoE([MLP([6, 9, 6]) for _ in range(5)], router(), residual=True).eval(), torch.randn(2, 6, 6)
    y = moe(x)
    plain = by_loop(moe, x.reshape(12, 6)).reshape(x.shape)
    left = 1 - moe.routing.weights.sum(1).reshape(2, 6, 1)
    torch.testing.assert_close(y, plain + left * x)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    assert torch.equal(moe(x, mask=mask)[~mask], x[~mask])


def test_token_ids_reach_the_routers_that_read_them():
    ids, x = torch.tensor([[1, 2, 3], [3, 1, 2]]), torch.randn(2, 3, 6)
    experts = [MLP([6, 9, 6]) for _ in range(5)]
    moe = MoE(experts, HashRouter(6, 5, vocab_size=4))
    y = moe(x, tokens=ids)
    expected = torch.stack(
        [experts[int(moe.router.table[0, i])](row) for i, row in zip(ids.flatten(), x.flatten(0, 1), strict=True)]
    )
    torch.testing.assert_close(y, expected.reshape(x.shape))
    assert MoE(experts, StableMoE(6, 5, vocab_size=4))(x, tokens=ids).shape == x.shape
    plain = MoE(experts, TopK(6, 5))
    assert torch.equal(plain(x, tokens=ids), plain(x))
    with pytest.raises(ValueError, match="HashRouter routes by token ids"):
        moe(x)
