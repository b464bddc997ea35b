"""Dense-to-sparse against torch's Gumbel softmax and the official gate; Read-ME against transformers' own layers."""

import functools
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama as llama

from notebook_kit import models, zoo
from notebook_kit.mixtures import ReadME, channel_scores, expert_cache, keep_channels
from notebook_kit.mixtures.pre_gate import _rotary, _turn
from notebook_kit.mixtures.read_me_targets import router_loss, router_targets
from notebook_kit.routers import DenseToSparse, gumbel_noise


def official_gate(logits, tau, soft, use_gumbel_gates):
    """The lines of `topkgating` in the authors' fork, with its threshold."""
    gumbel_gates = F.gumbel_softmax(logits, tau=tau, hard=False)
    hard = F.one_hot(gumbel_gates.argmax(1), logits.shape[1]).bool()
    chosen = torch.gt(gumbel_gates, 0.001) if soft else hard
    gates = chosen * (gumbel_gates if use_gumbel_gates else F.softmax(logits, dim=1))
    loss = torch.mean(gates.mean(0) * chosen.to(gates.dtype).mean(0)) * logits.shape[1] ** 2
    return gates, loss


@pytest.mark.parametrize("tau", [2.0, 0.7, 0.1])
def test_the_same_draw_as_torchs_gumbel_softmax(tau):
    z = torch.randn(50, 8)
    torch.manual_seed(5)
    expected = F.gumbel_softmax(z, tau=tau)
    routing = DenseToSparse(1, 8, temperature=tau, decay="constant").route(z, noise=gumbel_noise(z, seed=5))
    torch.testing.assert_close(routing.probs, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tau", [2.0, 0.3])
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("gumbel_weights", [True, False])
def test_gates_loss_and_gradient_of_the_official_gate(tau, soft, gumbel_weights):
    z = (3 * torch.randn(40, 8)).requires_grad_()
    pull = torch.randn(40, 8)
    torch.manual_seed(7)
    gates, loss = official_gate(z, tau, soft, gumbel_weights)
    (expected,) = torch.autograd.grad((gates * pull).sum() + loss, z)
    settings = {"temperature": tau, "decay": "constant", "balance_coef": 1.0, "gumbel_weights": gumbel_weights}
    router = DenseToSparse(1, 8, switch_to_hard=None if soft else 0, **settings)
    routing = router.route(z, noise=gumbel_noise(z, seed=7))
    dense = torch.zeros(40, 9).scatter_add(1, routing.experts + 1, routing.weights)[:, 1:]
    torch.testing.assert_close(dense, gates, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(routing.aux_loss, loss)
    (ours,) = torch.autograd.grad((dense * pull).sum() + routing.aux_loss, z)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_rotary_is_transformers():
    config = llama.LlamaConfig(hidden_size=32, num_attention_heads=2, rope_parameters=None)
    x = torch.randn(1, 2, 12, 16)
    theirs = llama.LlamaRotaryEmbedding(config)(x, torch.arange(12)[None])
    expected, _ = llama.apply_rotary_pos_emb(x, x, *theirs)
    torch.testing.assert_close(_turn(x, *_rotary(12, 16, x)), expected, atol=1e-5, rtol=1e-5)


def test_the_masks_of_the_official_script_with_one_channel_more():
    scores = torch.rand(2, 3, 64)
    ours = keep_channels(scores, density=0.5)
    for layer in range(2):
        for domain in range(3):
            vector = scores[layer, domain]
            threshold = vector.sort(descending=True).values[31]  # N - 1, and they test >
            theirs = vector > threshold
            assert theirs.sum() == 31
            assert (ours[layer, domain] & ~theirs).sum() == 1
            assert not (theirs & ~ours[layer, domain]).any()


def official_loss(feat, pred, masks):
    """`loss_func` of train_red.py, with N where they have N - 1."""
    n = int(masks[0].sum())
    graded, falling = torch.zeros_like(feat), feat.sort(dim=-1, descending=True).values
    for count in (n, int(n / 5 * 4), int(n / 5 * 3), int(n / 5 * 2), int(n / 5)):
        graded += (feat > falling[..., count, None]).float() / 3 / n
    dist = graded @ masks.T.float()
    dist = (dist - dist.mean()) * 10
    tokens = pred.shape[0] * pred.shape[1]
    soft = -torch.sum(dist.softmax(-1) * pred.log_softmax(-1)) / tokens
    hard = nn.CrossEntropyLoss(label_smoothing=0.5)(pred.reshape(tokens, -1), dist.argmax(-1).flatten())
    return dist, 0.75 * hard + 0.25 * soft


@pytest.mark.parametrize("n", [3, 20, 23])
def test_router_targets_and_loss_of_the_official_script(n):
    channels, pred = torch.randn(2, 7, 64), torch.randn(2, 7, 3)
    specific = keep_channels(torch.rand(1, 3, 64), density=n / 64)[0]
    dist, loss = official_loss(channels, pred, specific)
    torch.testing.assert_close(router_targets(channels, specific), dist, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(router_loss(pred, dist), loss)


@torch.no_grad()
def test_a_masked_layer_is_transformers_mlp_with_zeroed_columns():
    model = models.tiny_llama()
    kept = keep_channels(torch.rand(2, 3, 64), density=0.4)
    readme = ReadME(model, kept, router_dim=16)
    ids = torch.arange(20)[None]
    for expert in range(3):
        pruned = models.tiny_llama()
        for layer, mask in zip(pruned.model.layers, kept[:, expert], strict=True):
            layer.mlp.down_proj.weight.mul_(mask)
        choices = torch.full_like(ids, expert)
        for form in (readme, readme.cut()):
            torch.testing.assert_close(form(ids, choices=choices).logits, pruned(ids).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_on_trained_weights_both_forms_agree():
    bed = zoo.language_experts()
    windows = {name: ids[:1] for name, ids in bed.batches("val").items()}
    readme = ReadME(bed.model, keep_channels(channel_scores(bed.model, windows)))
    ids = torch.cat(list(windows.values()))
    torch.testing.assert_close(readme.cut()(ids).logits, readme(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("capacity", [1, 2, 3, 5])
def test_lru_counts_as_pythons_own(capacity):
    sequence = torch.randint(0, 6, (400,)).tolist()
    cached = functools.lru_cache(maxsize=capacity)(lambda expert: expert)
    for expert in sequence:
        cached(expert)
    assert int(expert_cache(sequence, capacity=capacity, policy="lru").hits.sum()) == cached.cache_info().hits


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_lfu_counts_as_a_plain_one(capacity):
    sequence, held, uses, hits = torch.randint(0, 6, (300,)).tolist(), OrderedDict(), {}, 0
    for expert in sequence:
        if expert in held:
            hits += 1
            held.move_to_end(expert)
        else:
            if len(held) == capacity:
                rarest = min(uses[e] for e in held)
                held.pop(next(e for e in held if uses[e] == rarest))
            held[expert] = True
        uses[expert] = uses.get(expert, 0) + 1
    assert int(expert_cache(sequence, capacity=capacity, policy="lfu").hits.sum()) == hits
