"""What the four mixtures of LoRA experts share: start, dispatch, labels, padding, routing that others can read."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from notebook_kit.adapters import (
    CannotFold,
    adapter_weights,
    attach,
    detach,
    fold,
    load_adapter_weights,
    trainable_parameters,
)
from notebook_kit.mixtures import (
    LoRAMoE,
    MeteoRA,
    MoLA,
    SMoRA,
    aux_loss,
    sample_labels,
    split_experts,
    stack_experts,
)
from notebook_kit.mixtures.lora_dispatch import DISPATCH
from notebook_kit.models import MLP
from notebook_kit.routers import TopK, record_routing, reroute
from tests.adapters.conftest import MODELS, disturb, run

KINDS = {
    "loramoe": (LoRAMoE, {"n_experts": 4, "rank": 3}),
    "mola": (MoLA, {"n_experts": 4, "k": 2, "rank": 3}),
    "smora": (SMoRA, {"rank": 8, "k": 3}),
    "meteora": (MeteoRA, {"n_experts": 4, "k": 2, "rank": 3, "train_adapters": True}),
}
SINGLE = {
    "loramoe": (LoRAMoE, {"n_experts": 1, "rank": 3}),
    "mola": (MoLA, {"n_experts": 1, "k": 1, "rank": 3}),
    "smora": (SMoRA, {"rank": 3, "k": 3, "granularity": 3}),
    "meteora": (MeteoRA, {"n_experts": 1, "k": 1, "rank": 3}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind, trained=True, **more):
    """An MLP of three layers with a mixture in each, and 7 rows."""
    model = MLP([8, 12, 12, 5]).eval()
    method, values = KINDS[kind]
    attach(model, method, targets=r"layers", **values, **more)
    if trained:
        disturb(model, std=0.4)
    return model, torch.randn(7, 8)


def by_loop(layer, x):
    """W x and the picked experts, one token and one pick at a time."""
    routing = layer.router(x)
    rows = []
    for row, weights, experts in zip(x, routing.weights, routing.experts.tolist(), strict=True):
        y = layer.host(row)
        for weight, i in zip(weights, experts, strict=True):
            if i >= 0:
                y = y + weight * layer.scaling[i] * (layer.B[i] @ (layer.A[i] @ row))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("name", MODELS)
@kinds
def test_a_new_mixture_changes_nothing_and_leaves_nothing_behind(kind, name):
    build, inputs, targets = MODELS[name]
    model = build()
    before, weights = run(model, inputs), copy.deepcopy(model.state_dict())
    names = attach(model, KINDS[kind][0], targets=targets, **KINDS[kind][1])
    torch.testing.assert_close(run(model, inputs), before, rtol=0, atol=1e-6)
    disturb(model, std=0.5)
    assert (run(model, inputs) - before).abs().max() > 1e-3
    assert len(trainable_parameters(model)) == len(names)
    with pytest.raises(CannotFold, match="another matrix for each token"):
        fold(model)
    detach(model)
    assert torch.equal(run(model, inputs), before)
    assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())


@kinds
def test_the_sum_and_its_gradient_by_every_dispatch(kind):
    model, x = made(kind)
    layer, y = model.layers[0], x.requires_grad_()
    parameters = [x, layer.A, layer.B, layer.router.weight]
    plain = by_loop(layer, y)
    expected = torch.autograd.grad(plain.square().sum(), parameters)
    for dispatch in DISPATCH:
        layer.dispatch = dispatch
        out = layer(y)
        torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), parameters), expected, atol=1e-3, rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_a_mixture_is_one_wide_lora_with_block_gates(rank, n_experts, n_tokens, seed):
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(n_experts, rank, 6, generator=g), torch.randn(n_experts, 7, rank, generator=g)
    x, gates = torch.randn(n_tokens, 6, generator=g), torch.randn(n_tokens, n_experts, generator=g)
    wide_A, wide_B = stack_experts(A, B)
    wide = ((x @ wide_A.T) * gates.repeat_interleave(rank, 1)) @ wide_B.T
    experts = torch.arange(n_experts).expand(n_tokens, n_experts)
    for dispatch in DISPATCH.values():
        torch.testing.assert_close(dispatch(x, A, B, gates, experts), wide, atol=1e-4, rtol=1e-4)
    back = split_experts(wide_A, wide_B, n_experts)
    assert torch.equal(back[0], A)
    assert torch.equal(back[1], B)


def test_split_needs_equal_blocks():
    with pytest.raises(ValueError, match="n_experts must divide the rank 6, got 4"):
        split_experts(torch.zeros(6, 3), torch.zeros(2, 6), 4)


@kinds
def test_padding_gets_no_expert_and_counts_nowhere(kind):
    model, _ = made(kind)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    layer = model.layers[0]
    with sample_labels(model, torch.tensor([1, 0]), mask=mask):
        y = layer(x)
    torch.testing.assert_close(y[~mask], layer.host(x)[~mask])
    routing = layer.routing
    assert (routing.experts[~mask.reshape(-1)] == -1).all()
    assert not routing.weights[~mask.reshape(-1)].any()
    loss = routing.aux_loss
    x[~mask] = 17.0
    with sample_labels(model, torch.tensor([1, 0]), mask=mask):
        layer(x)
    torch.testing.assert_close(layer.routing.aux_loss, loss)
    assert layer.told.mask is None, "the layer forgets what it was told"


@kinds
def test_all_padding_and_empty_batches(kind):
    model, _ = made(kind)
    for dispatch in DISPATCH:
        for layer in model.layers:
            layer.dispatch = dispatch
        assert model(torch.zeros(0, 8)).shape == (0, 5)
        with sample_labels(model, torch.ones(3).long(), mask=torch.zeros(3).bool()):
            y = model(torch.ones(3, 8))
        assert y.shape == (3, 5)
        assert torch.isfinite(aux_loss(model))


@kinds
def test_what_a_batch_is_told_must_fit_it(kind):
    model, x = made(kind)
    with (
        pytest.raises(ValueError, match=re.escape("mask must have one value a sample or a token, [7] or [7], got [6]")),
        sample_labels(model, mask=torch.ones(6).bool()),
    ):
        model(x)
    with pytest.raises(ValueError, match="MLP holds no mixture of LoRA experts"), sample_labels(MLP([2, 2])):
        pass


@kinds
def test_traces_losses_weights_and_copies(kind):
    model, x = made(kind)
    with torch.no_grad(), record_routing(model) as trace:
        model(x)
    assert trace.layers == ("layers.0", "layers.1", "layers.2")
    assert len(trace) == 7
    same = reroute(trace, model.layers[1].router, layer=1)
    assert torch.equal(same.experts, trace.layer(1).experts)
    again = copy.deepcopy(model)
    disturb(again, std=0.1, seed=5)
    load_adapter_weights(again, adapter_weights(model))
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert aux_loss(model).ndim == 0


@kinds
def test_gradients_reach_what_trains_and_the_base_stays(kind):
    model, x = made(kind, trained=False)
    model.train()
    before = {key: t.clone() for key, t in model.state_dict().items() if ".host." in key}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # in the first step B is zero, and A gets no gradient
        with sample_labels(model, torch.arange(7) % 2):
            (model(x).square().sum() + aux_loss(model)).backward()
        optimizer.step()
    layer = model.layers[0]
    assert all(p.grad.any() for p in (layer.A, layer.B, layer.router.weight))
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


@kinds
def test_experts_that_nobody_picked_get_no_gradient(kind):
    if kind == "loramoe":
        return test_every_expert_of_loramoe_answers()
    model, x = made(kind)
    layer = model.layers[0]
    layer(x[:1]).sum().backward()
    picked = torch.zeros(layer.n_experts, dtype=torch.bool)
    picked[layer.routing.experts[0]] = True
    for part in (layer.A, layer.B):
        assert part.grad[picked].flatten(1).any(1).all()
        assert not part.grad[~picked].any()


def test_every_expert_of_loramoe_answers():
    model, x = made("loramoe")
    model(x)
    assert (model.layers[0].routing.weights > 0).all()


@kinds
def test_the_order_of_the_experts_does_not_matter(kind):
    model, x = made(kind)
    layer, order = model.layers[0], None
    y = layer(x)
    order = torch.randperm(layer.n_experts)
    with torch.no_grad():
        for tensor in (layer.A, layer.B, layer.scaling, layer.router.weight):
            tensor.copy_(tensor[order].clone())
    torch.testing.assert_close(layer(x), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@kinds
def test_other_precisions(kind, dtype):
    layer = made(kind)[0].layers[0].to(dtype)
    x = torch.randn(9, 8, dtype=dtype)
    exact = copy.deepcopy(layer).double()
    for dispatch in DISPATCH:
        layer.dispatch = dispatch
        y = layer(x)
        assert y.dtype == dtype
        assert layer.routing.weights.dtype == torch.float32
        exact.router.forward = lambda rows, **about: layer.routing  # a rounded logit may pick another expert
        expected = exact(x.double())
        torch.testing.assert_close(y.double(), expected, atol=8 * torch.finfo(dtype).eps + 1e-6, rtol=0.02)


@kinds
def test_attached_to_a_model_of_half_precision(kind):
    model = MLP([8, 12, 5]).to(torch.bfloat16)
    attach(model, KINDS[kind][0], targets="layers", **KINDS[kind][1])
    assert model.layers[0].A.dtype == torch.bfloat16
    assert model.layers[0].router.weight.dtype == torch.float32
    with sample_labels(model, torch.zeros(3).long()):
        assert model(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@kinds
def test_nan_is_refused(kind):
    model, x = made(kind)
    x[3, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN, first at token 3"):
        model(x)


@kinds
def test_wrong_hosts_and_ranks(kind):
    method, values = KINDS[kind]
    with pytest.raises(TypeError, match=r"sits on nn\.Linear"):
        method(nn.Conv2d(1, 1, 1), **values)
    values = values | ({"rank": 64, "k": 32, "granularity": 16} if kind == "smora" else {"rank": 9})
    with pytest.raises(ValueError, match="rank must be at most 8"):
        method(nn.Linear(8, 8), **values)


@pytest.mark.parametrize("kind", SINGLE)
def test_a_single_expert_is_a_lora_and_folds(kind):
    method, values = SINGLE[kind]
    model, x = MLP([8, 12, 5]).eval(), torch.randn(6, 8)
    attach(model, method, targets="layers", **values)
    disturb(model, std=0.4)
    layer, y = model.layers[0], model(x)
    delta = layer.scaling[0] * layer.B[0] @ layer.A[0]
    torch.testing.assert_close(layer(x), layer.host(x) + x @ delta.T, atol=1e-5, rtol=1e-5)
    assert float(layer.routing.aux_loss) == 0
    torch.testing.assert_close(fold(model)(x), y, atol=1e-5, rtol=1e-5)
    assert type(model.layers[0]) is nn.Linear


def test_dropout_hides_from_the_experts_and_not_from_the_router():
    layer = MoLA(nn.Linear(6, 6), n_experts=3, rank=2, dropout=0.9).train()
    layer.B.data.normal_()
    x = torch.randn(40, 6)
    a, logits = layer(x), layer.routing.logits
    assert not torch.equal(a, layer(x))
    assert torch.equal(logits, layer.routing.logits)
    assert torch.equal(layer.eval()(x), layer(x))


def test_trained_by_any_router_of_the_kit():
    layer = MoLA(nn.Linear(6, 4), n_experts=3, rank=2)
    layer.router = TopK(6, 3, k=1, convention="switch")
    assert layer(torch.randn(5, 6)).shape == (5, 4)
