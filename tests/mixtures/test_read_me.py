"""Read-ME: masks by hand, two forms that agree, a router that runs before the model, training in turns."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit import models
from notebook_kit.mixtures import (
    PreGate,
    ReadME,
    alternate,
    channel_scores,
    keep_channels,
    split_channels,
    train_backbone,
    train_router,
)
from notebook_kit.mixtures.channels import Watch, gated_mlps
from notebook_kit.mixtures.pre_gate import as_routing
from notebook_kit.mixtures.read_me_targets import layer_targets, router_loss, router_targets
from notebook_kit.mixtures.read_me_training import next_token_loss

IDS = torch.arange(36).reshape(3, 12) * 7 % 256


def build(density=0.5, n_domains=3, model=None, **settings):
    model = model or models.tiny_llama()
    generator = torch.Generator().manual_seed(1)
    domains = {str(i): torch.randint(i * 60, i * 60 + 60, (2, 20), generator=generator) for i in range(n_domains)}
    kept = keep_channels(channel_scores(model, domains), density=density)
    return ReadME(model, kept, **({"router_dim": 16} | settings)).eval()


def draw(generator):
    return torch.randint(0, 180, (3, 10), generator=generator)


def test_masks_by_hand():
    scores = torch.tensor([[[5.0, 4, 3, 1, 0, 2], [5, 0, 1, 4, 3, 2]]])
    kept = keep_channels(scores, density=0.5)
    assert [row.nonzero().flatten().tolist() for row in kept[0]] == [[0, 1, 2], [0, 3, 4]]
    residual, specific = split_channels(kept)
    assert residual[0].nonzero().flatten().tolist() == [0]
    assert [row.nonzero().flatten().tolist() for row in specific[0]] == [[1, 2], [3, 4]]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), n=st.integers(1, 10), d_ff=st.integers(1, 40), density=st.floats(0.01, 1.0))
def test_masks_of_any_scores(seed, n, d_ff, density):
    scores = torch.randint(0, 5, (2, n, d_ff), generator=torch.Generator().manual_seed(seed)).float()
    kept = keep_channels(scores, density=density)
    assert (kept.sum(-1) == max(round(density * d_ff), 1)).all()
    residual, specific = split_channels(kept)
    assert not (residual[:, None] & specific).any()
    assert torch.equal(residual[:, None] | specific, kept)
    lowest = scores.masked_fill(~kept, 9).amin(-1)
    assert (lowest >= scores.masked_fill(kept, -1).amax(-1)).all()
    if n == 1:
        assert not specific.any()


@torch.no_grad()
def test_scores_are_mean_absolute_channels():
    model = models.tiny_llama()
    scores = channel_scores(model, {"a": IDS, "b": IDS[:1]})
    assert scores.shape == (2, 2, 64)
    with Watch(gated_mlps(model)) as seen:
        model(IDS)
    torch.testing.assert_close(scores[1, 0], seen.channels[1].abs().mean((0, 1)))
    mlp = model.model.layers[1].mlp
    assert not mlp.down_proj._forward_pre_hooks
    a = mlp.act_fn(mlp.gate_proj(seen.inputs[1])) * mlp.up_proj(seen.inputs[1])
    torch.testing.assert_close(a, seen.channels[1])
    mean = channel_scores(model, {"all": IDS})
    parts = channel_scores(model, {"first": IDS[:1], "rest": IDS[1:]})
    torch.testing.assert_close(mean[:, 0], parts[:, 0] / 3 + parts[:, 1] * 2 / 3)


@torch.no_grad()
def test_density_one_is_the_dense_model():
    model = models.tiny_llama()
    readme = build(1.0, model=model)
    torch.testing.assert_close(readme(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(readme.cut()(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
    assert sum(p.numel() for e in readme.cut().model.model.layers[0].mlp.experts for p in e.parameters()) == 0


@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_masked_and_cut_are_the_same_for_any_routing(density, bias):
    model = models.tiny_llama(mlp_bias=bias)
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.down_proj) if bias else ():
            linear.bias.normal_()
    readme = build(density, model=model)
    cut = readme.cut()
    for seed in range(3):
        choices = torch.randint(3, IDS.shape, generator=torch.Generator().manual_seed(seed))
        expected = readme(IDS, choices=choices).logits
        torch.testing.assert_close(cut(IDS, choices=choices).logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(cut(IDS).logits, readme(IDS).logits, atol=1e-5, rtol=0)
    assert torch.equal(cut.choices, readme.choices)


def test_the_residual_is_stored_once():
    readme = build(0.6)
    residual, specific = split_channels(readme.model.model.layers[0].mlp.kept)
    assert residual.any()
    mlp = readme.cut().model.model.layers[0].mlp
    assert mlp.residual["gate_proj"].weight.shape == (int(residual.sum()), 32)
    stored = sum(p.numel() for p in mlp.parameters())
    assert stored == 3 * 32 * int(residual.sum() + specific.sum())


@torch.no_grad()
def test_the_router_is_causal_and_needs_no_backbone():
    readme = build()
    before = readme.router(IDS)
    changed = IDS.clone()
    changed[:, 6] = 99
    torch.testing.assert_close(readme.router(changed)[:, :6], before[:, :6])
    assert not torch.allclose(readme.router(changed)[:, 6:], before[:, 6:])
    choices = readme.choose(IDS)
    readme(IDS)
    assert torch.equal(readme.choices, choices.expand(2, 3, 12))
    assert readme.router.embed.weight.shape == (256, 16)
    del readme.model
    assert torch.equal(readme.choose(IDS), choices)
    routing = as_routing(before)
    assert routing.experts[:, 0].tolist() == choices.flatten().tolist()
    assert routing.load.sum() == 1


@torch.no_grad()
def test_left_padding_changes_no_choice():
    router = build().router
    padded = torch.cat([torch.full((3, 4), 7), IDS], 1)
    mask = torch.cat([torch.zeros(3, 4), torch.ones(3, 12)], 1).bool()
    torch.testing.assert_close(router(padded, mask)[:, 4:], router(IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("router", ["pre-gate", "layer-wise"])
@pytest.mark.parametrize("cut", [False, True])
@torch.no_grad()
def test_it_generates_as_the_whole_text_says(router, cut):
    readme = build(router=router)
    readme = readme.cut() if cut else readme
    text = readme.generate(IDS[:, :5], max_new_tokens=4)
    assert text.shape == (3, 9)
    assert torch.equal(readme(text).logits[:, 4:-1].argmax(-1), text[:, 5:])


@torch.no_grad()
def test_a_batch_grouped_by_expert_is_one_sequence_after_the_other():
    cut = build().cut()
    together = cut(IDS).logits
    one_by_one = torch.cat([cut(row[None]).logits for row in IDS])
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=0)
    mlp, x = cut.model.model.layers[0].mlp, torch.randn(2, 7, 32)
    cut.plan.choices = torch.randint(3, (2, 7))
    grouped, choices = mlp(x), cut.plan.choices
    for row in range(2):
        for t in range(7):
            cut.plan.choices = choices[row : row + 1, t : t + 1]
            torch.testing.assert_close(mlp(x[row : row + 1, t : t + 1])[0, 0], grouped[row, t], atol=1e-6, rtol=1e-5)


def test_targets_by_hand():
    # Two experts with 5 channels of their own; the token fires 0 to 4 most, in this order.
    specific = torch.zeros(2, 10, dtype=torch.bool)
    specific[0, :5], specific[1, 5:] = True, True
    channels = torch.tensor([[10.0, 9, 8, 7, 6, 1, -20, 0, 0.5, 0.2]])
    graded = torch.tensor([5, 4, 3, 2, 1]) / 15  # in 5, 4, 3, 2, 1 of the five groups; raw values, so -20 is last
    dist = router_targets(channels, specific)
    expected = torch.tensor([[graded.sum(), 0.0]])
    torch.testing.assert_close(dist, (expected - expected.mean()) * 10)
    assert router_targets(channels, torch.zeros(2, 10, dtype=torch.bool)).tolist() == [[0.0, 0.0]]


def test_the_router_loss_by_its_definition():
    z, dist = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    log_p, q = z.log_softmax(-1), dist.softmax(-1)
    hard = torch.nn.functional.one_hot(dist.argmax(-1), 3) * 0.5 + 0.5 / 3
    expected = 0.75 * -(hard * log_p).sum(-1).mean() + 0.25 * -(q * log_p).sum(-1).mean()
    torch.testing.assert_close(router_loss(z, dist), expected)
    torch.testing.assert_close(router_loss(z, dist, alpha=0.0), -(q * log_p).sum(-1).mean())


@pytest.mark.parametrize("router", ["pre-gate", "layer-wise"])
def test_training_in_turns_moves_what_it_should(router):
    readme = build(router=router)
    before = copy.deepcopy(readme.state_dict())
    gates = ("router.", ".gate.")

    def moved():
        return {name for name, value in readme.state_dict().items() if not torch.equal(value, before[name])}

    history = train_router(readme, draw, steps=4, lr=1e-2)
    assert moved()
    assert all(any(part in name for part in gates) for name in moved())
    assert len(history) == 4
    before = copy.deepcopy(readme.state_dict())
    train_backbone(readme, draw, steps=3)
    assert moved()
    assert not any(part in name for name in moved() for part in gates)
    assert not any("kept" in name for name in moved())
    assert all(p.requires_grad and p.grad is None for p in readme.parameters())
    assert not readme.plan.dense


def test_the_losses_fall():
    readme = build()
    ids = draw(torch.Generator().manual_seed(0))
    history = train_router(readme, lambda generator: ids, steps=25, lr=1e-2)
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    rounds = alternate(readme, lambda generator: ids, rounds=2, router_steps=2, backbone_steps=15, backbone_lr=1e-2)
    assert len(rounds) == 2
    assert rounds[1]["backbone"] < rounds[0]["backbone"]
    torch.testing.assert_close(next_token_loss(readme, ids), readme(ids, labels=ids).loss)


def test_targets_come_from_the_dense_model():
    readme = build()
    targets, inputs = layer_targets(readme, IDS)
    assert [t.shape for t in targets] == [(3, 12, 3)] * 2
    with torch.no_grad(), Watch(gated_mlps(readme.model)) as seen:
        readme.plan.dense = True
        readme(IDS)
        readme.plan.dense = False
    torch.testing.assert_close(inputs[1], seen.inputs[1])
    specific = split_channels(readme.model.model.layers[1].mlp.kept)[1]
    torch.testing.assert_close(targets[1], router_targets(seen.channels[1], specific))


@torch.no_grad()
def test_half_precision_and_one_domain():
    readme = build(n_domains=1, model=models.tiny_llama().to(torch.bfloat16))
    assert readme.router.embed.weight.dtype == torch.float32
    logits = readme(IDS).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(readme.cut()(IDS).logits, logits, atol=0.05, rtol=0.05)
    assert (readme.choices == 0).all()


def test_layer_wise_gates_keep_their_precision_in_a_half_model():
    readme = build(router="layer-wise", model=models.tiny_llama().to(torch.bfloat16))
    assert readme(IDS).logits.dtype == torch.bfloat16
    assert readme.model.model.layers[0].mlp.gate.weight.dtype == torch.float32
    assert len(train_router(readme, draw, steps=2)) == 2
    with torch.no_grad():
        torch.testing.assert_close(readme.cut()(IDS).logits, readme(IDS).logits, atol=0.05, rtol=0.05)
    assert readme.to(torch.bfloat16)(IDS).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_the_model_it_came_from_is_untouched():
    model = models.tiny_llama()
    before, state = model(IDS).logits, copy.deepcopy(model.state_dict())
    readme = build(model=model)
    readme.model.model.layers[0].mlp.up_proj.weight.zero_()
    assert torch.equal(model(IDS).logits, before)
    assert all(torch.equal(a, state[name]) for name, a in model.state_dict().items())
    twin = copy.deepcopy(readme)
    assert torch.equal(twin(IDS).logits, readme(IDS).logits)
    assert twin.plan is not readme.plan
    assert twin.plan is twin.model.model.layers[0].mlp.plan


def test_bad_input():
    model = models.tiny_llama()
    with pytest.raises(ValueError, match=r"kept must have shape \[layers, experts, d_ff\] .* got \[1, 2, 64\]"):
        ReadME(model, torch.ones(1, 2, 64, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"MixtralForCausalLM must have `model.layers` whose `mlp` holds gate_proj"):
        gated_mlps(models.tiny_mixtral())
    with pytest.raises(ValueError, match="at least one domain"):
        channel_scores(model, {})
    with pytest.raises(ValueError, match="dim must be at most d_model=32 and a multiple of 2 n_heads=4, got 64"):
        build(router_dim=64)
    with pytest.raises(ValueError, match=r"density must be in \[0.01, 1\], got 0"):
        keep_channels(torch.rand(1, 1, 4), density=0.0)
    readme = build()
    with pytest.raises(ValueError, match=r"choices must be in \[0, 2\]"):
        readme(IDS, choices=torch.full_like(IDS, 3))
    with pytest.raises(ValueError, match="reads the whole prefix"):
        readme(IDS[:, -1:], past_key_values=readme(IDS, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match=r"one expert for each of \[3, 12\] tokens is needed, got \[3, 5\]"):
        readme(IDS, choices=torch.zeros(3, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="train the masked one, then cut"):
        train_backbone(readme.cut(), draw, steps=1)
    with pytest.raises(ValueError, match="cut already"):
        readme.cut().cut()
    with pytest.raises(ValueError, match="layer-wise routers choose inside"):
        build(router="layer-wise").choose(IDS)
    with pytest.raises(ValueError, match="a multiple of 2 n_heads=6"):
        PreGate(torch.randn(10, 8), 2, dim=8, n_heads=3)
