"""DiT-MoE: un-normalised routed experts beside a shared path, and the balance loss by hand."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from notebook_kit.catalog import entry_of, papers
from notebook_kit.mixtures import DiTMoE, SwiGLU, aux_loss, image_balance_loss
from notebook_kit.models import DiffusionTransformer, flow_loss
from notebook_kit.routing import record_routing


def made(d=6, d_ff=10, seed=0, **settings):
    torch.manual_seed(seed)
    return DiTMoE(d, d_ff, **settings)


def expert(layer, i, z):
    gate, up = (z @ layer.experts.gate_up[i].T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ layer.experts.down[i].T


def by_loop(layer, z):
    """The formula, token by token."""
    rows = []
    for row in z.reshape(-1, z.shape[-1]):
        scores = (layer.router.weight @ row).softmax(0)
        best = scores.argsort(descending=True)[: layer.router.k].tolist()
        weights = scores[best] / scores[best].sum() if layer.router.normalize else scores[best]
        rows.append(sum(w * expert(layer, i, row) for w, i in zip(weights, best, strict=True)))
    routed = torch.stack(rows).reshape(z.shape)
    return routed if layer.shared is None else routed + layer.shared(z)


@settings(deadline=None, max_examples=25)
@given(
    n_experts=st.integers(2, 10),
    k=st.integers(2, 4),
    n_shared=st.integers(0, 3),
    normalize=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sorted_by_expert_equals_the_loop(n_experts, k, n_shared, normalize, training, seed):
    layer = made(n_experts=n_experts, k=min(k, n_experts), n_shared=n_shared, normalize=normalize, seed=seed)
    z = torch.randn(2, 7, 6)
    torch.testing.assert_close(layer.train(training)(z), by_loop(layer, z), atol=1e-5, rtol=1e-5)


def test_training_and_inference_take_one_path():
    layer, z = made(), torch.randn(3, 5, 6)
    assert torch.equal(layer.train()(z), layer.eval()(z))


def test_all_experts_are_the_dense_soft_mixture():
    layer, z = made(n_experts=4, k=4, n_shared=0), torch.randn(9, 6)
    scores = (z @ layer.router.weight.T).softmax(1)
    expected = sum(scores[:, i : i + 1] * expert(layer, i, z) for i in range(4))
    torch.testing.assert_close(layer(z), expected, atol=1e-6, rtol=1e-5)


def test_one_expert_has_weight_one():
    layer, z = made(n_experts=1, k=1, n_shared=0), torch.randn(9, 6)
    torch.testing.assert_close(layer(z), expert(layer, 0, z))
    assert layer.routing.weights.tolist() == [[1.0]] * 9


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_experts(normalize):
    layer, z = made(n_experts=5, n_shared=0, normalize=normalize), torch.randn(9, 6)
    with torch.no_grad():
        layer.experts.gate_up.copy_(layer.experts.gate_up[:1].expand_as(layer.experts.gate_up))
        layer.experts.down.copy_(layer.experts.down[:1].expand_as(layer.experts.down))
    kept = layer(z) * 0 + layer.routing.weights.sum(1, keepdim=True)
    if normalize:
        torch.testing.assert_close(kept, torch.ones_like(kept))
    torch.testing.assert_close(layer(z), kept * expert(layer, 0, z), atol=1e-5, rtol=1e-5)


def test_scores_sum_to_one_kept_ones_to_less_and_no_slot_is_lost():
    layer = made(n_experts=8, k=2)
    layer(torch.randn(400, 6) * 5)
    routing = layer.routing
    torch.testing.assert_close(routing.probs.sum(1), torch.ones(400))
    assert (routing.weights.sum(1) < 1).all()
    assert (routing.experts >= 0).all()
    assert routing.dropped == 0


def test_the_shared_path_is_two_d_wide_whatever_the_experts():
    layer = made(d=6, d_ff=10)
    assert layer.shared.gate_proj.weight.shape == (12, 6)
    assert layer.experts.down.shape == (8, 6, 10)
    assert DiTMoE(6).experts.down.shape == (8, 6, 24)
    assert made(n_shared=0).shared is None
    z = torch.randn(4, 6)
    torch.testing.assert_close(made()(z) - made(n_shared=0)(z) * 0, by_loop(made(), z), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("per_image", [False, True])
def test_the_balance_loss_by_hand(per_image):
    # P rows [.7, .3], [.6, .4], k = 1: f = (2, 0), P = (.65, .35), 0.01 · 1.3
    layer = made(d=2, n_experts=2, k=1, per_image=per_image)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2))
    layer(torch.tensor([[[0.7, 0.3], [0.6, 0.4]]]).log())
    assert layer.routing.aux_loss.item() == pytest.approx(0.013)
    layer(torch.tensor([[[0.7, 0.3], [0.3, 0.7]]]).log())
    assert layer.routing.aux_loss.item() == pytest.approx(0.01)


def test_balance_for_each_image_is_stricter():
    # Two images, each wholly in its own expert: even over the batch, uneven in each.
    z = torch.tensor([[[5.0, -5.0]] * 4, [[-5.0, 5.0]] * 4])
    for per_image, expected in ((False, 1.0), (True, 2.0)):
        layer = made(d=2, n_experts=2, k=1, per_image=per_image)
        with torch.no_grad():
            layer.router.weight.copy_(torch.eye(2))
        layer(z)
        assert layer.routing.aux_loss.item() == pytest.approx(0.01 * expected, rel=1e-3)


def test_the_loss_counts_all_k_picks_and_is_the_official_one():
    layer = made(n_experts=5, k=3, balance_coef=0.1)
    layer(torch.randn(2, 11, 6))
    probs, experts = layer.routing.probs, layer.routing.experts
    f = 5 * F.one_hot(experts.reshape(-1), 5).float().mean(0)
    assert layer.routing.aux_loss.item() == pytest.approx(0.1 * (f * probs.mean(0)).sum().item(), rel=1e-5)
    ce = torch.zeros(2, 5).scatter_add_(1, experts.reshape(2, -1), torch.ones(2, 33)).div_(33 / 5)
    official = (ce * probs.reshape(2, 11, 5).mean(1)).sum(1).mean()
    assert image_balance_loss(probs.reshape(2, 11, 5), experts.reshape(2, 11, 3)).item() == pytest.approx(
        official.item()
    )


@pytest.mark.parametrize("per_image", [False, True])
def test_padding_is_not_routed_and_counts_nowhere(per_image):
    layer, z = made(per_image=per_image), torch.randn(2, 6, 6)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    y = layer(z, mask=mask)
    loss = layer.routing.aux_loss
    assert torch.equal(y[1, 4:], torch.zeros(2, 6))
    z[1, 4:] = 100.0
    again = layer(z, mask=mask)
    torch.testing.assert_close(again, y)
    torch.testing.assert_close(layer.routing.aux_loss, loss)


def test_experts_may_change_places_with_their_rows():
    layer, z = made(), torch.randn(20, 6)
    moved = copy.deepcopy(layer)
    order = torch.randperm(8)
    with torch.no_grad():
        for mine, theirs in ((moved.experts.gate_up, layer.experts.gate_up), (moved.experts.down, layer.experts.down)):
            mine.copy_(theirs[order])
        moved.router.weight.copy_(layer.router.weight[order])
    torch.testing.assert_close(moved(z), layer(z), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("n_experts", [2, 10])
def test_upcycled_it_is_the_dense_transformer(n_experts):
    torch.manual_seed(0)
    dense = DiffusionTransformer(feed_forward=lambda d: SwiGLU(d, 20), n_blocks=2, d_model=16)
    with torch.no_grad():
        for p in dense.parameters():
            p.add_(0.1 * torch.randn_like(p))
    sparse = copy.deepcopy(dense)
    for block in sparse.blocks:
        block.feed_forward = DiTMoE.from_dense(
            block.feed_forward, n_experts=n_experts, n_shared=0, normalize=True, balance_coef=0.0
        )
    x, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 4, 10])
    expected = dense(x, t, y)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(sparse(x, t, y), expected, atol=1e-5, rtol=1e-5)


def test_upcycling_leaves_the_layer_alone():
    layer = SwiGLU(6, 10)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    state = torch.random.get_rng_state()
    upcycled = DiTMoE.from_dense(layer, n_experts=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        upcycled.experts.down.zero_()
        upcycled.experts.gate_up.zero_()
    assert all(torch.equal(before[name], p) for name, p in layer.named_parameters())


def test_gradients_reach_everything_that_trains():
    model = DiffusionTransformer(feed_forward=lambda d: DiTMoE(d, 8, n_experts=3), d_model=16, n_blocks=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    torch.manual_seed(0)
    loss = flow_loss(model, torch.randn(16, 1, 8, 8), torch.arange(16) % 10)
    (loss + aux_loss(model)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert [block.feed_forward.routing.aux_loss.item() for block in model.blocks] == pytest.approx([0.01] * 2, rel=0.3)


def test_a_transformer_of_mixtures_is_recorded_with_places_and_classes():
    model = DiffusionTransformer(feed_forward=lambda d: DiTMoE(d, 8, n_experts=3), d_model=16, n_blocks=2)
    with torch.no_grad(), record_routing(model.blocks) as trace, trace.labelled(["3", "7"]):
        model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([3, 7]))
    assert len(trace) == 32
    assert len(trace.layers) == 2
    assert trace.positions.tolist() == [*range(16)] * 2
    assert trace.label_names == ["3", "7"]
    assert not trace.normalize
    assert torch.equal(trace.layer(1).experts, model.blocks[1].feed_forward.routing.experts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer, z = made(d=8, d_ff=16, n_experts=2), torch.randn(2, 5, 8)  # both experts are used: no pick can flip
    expected = layer(z)
    out = layer.to(dtype)(z.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("shape", [(0, 6), (1, 6), (2, 0, 6), (1, 1, 6)])
def test_few_tokens(shape):
    layer, z = made(), torch.randn(shape)
    assert layer(z).shape == shape
    assert torch.isfinite(layer.routing.aux_loss)


def test_bad_settings_and_inputs():
    with pytest.raises(ValueError, match=r"k"):
        made(n_experts=2, k=3)
    with pytest.raises(ValueError, match=r"normalize.*k=1"):
        made(k=1, normalize=True)
    with pytest.raises(ValueError, match=r"n_shared must be.*\[0, 16\].*DiTMoE"):
        made(n_shared=17)
    with pytest.raises(ValueError, match=r"per_image.*\[4, 6\]"):
        made(per_image=True)(torch.randn(4, 6))
    with pytest.raises(ValueError, match=r"NaN"):
        made()(torch.full((2, 6), torch.nan))


def test_it_is_in_the_catalogue():
    assert entry_of(DiTMoE).papers == ("dit-moe",)
    assert papers()["dit-moe"]["arxiv"] == "2407.11633"
