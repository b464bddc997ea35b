"""The diffusion transformer against its formula written out plainly, the mixture against transformers' DeepSeek-V2."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from notebook_kit import zoo
from notebook_kit.mixtures import DiTMoE
from notebook_kit.models import sample


def block_of(n_shared, k, normalize):
    """A DeepSeek-V2 block whose shared width, n_shared times an expert's, is DiT-MoE's: an expert is d wide."""
    torch.manual_seed(0)
    config = DeepseekV2Config(
        hidden_size=16,
        num_attention_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=6,
        n_shared_experts=n_shared,
        num_experts_per_tok=k,
        topk_method="greedy",
        norm_topk_prob=normalize,
        routed_scaling_factor=1.0,
    )
    block = DeepseekV2Moe(config).eval()
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return block


@pytest.mark.parametrize(("n_shared", "k"), [(2, 2), (1, 3), (3, 6)])
def test_the_mixture_is_deepseek_v2s(n_shared, k):
    block = block_of(n_shared, k, False)
    layer = DiTMoE(16, 16, n_experts=6, k=k, n_shared=n_shared)
    with torch.no_grad():
        layer.router.weight.copy_(block.gate.weight)
        layer.experts.gate_up.copy_(block.experts.gate_up_proj)
        layer.experts.down.copy_(block.experts.down_proj)
    layer.shared.load_state_dict(block.shared_experts.state_dict())
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(layer(x), block(x), atol=1e-5, rtol=1e-5)


def plain(w, x, t, y, ffn, heads=4):
    """One image through the transformer, token by token and head by head."""
    d = w["read.weight"].shape[0]
    tokens = []
    for row in range(4):
        for column in range(4):
            pixels = x[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1)
            omega = [10_000 ** (-i / (d // 4)) for i in range(d // 4)]
            place = [f(p * o) for p in (column, row) for f in (math.sin, math.cos) for o in omega]
            tokens.append(w["read.weight"] @ pixels + w["read.bias"] + torch.tensor(place))
    tokens = torch.stack(tokens)
    omega = [math.exp(-math.log(10_000) * i / d) for i in range(d)]
    times = torch.tensor([math.cos(1000 * t * o) for o in omega] + [math.sin(1000 * t * o) for o in omega])
    c = w["time.2.weight"] @ F.silu(w["time.0.weight"] @ times + w["time.0.bias"]) + w["time.2.bias"]
    c = F.silu(c + w["label.weight"][y])

    def norm(z):
        return (z - z.mean(1, keepdim=True)) / (z.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    for i in range(3):
        b = {name.removeprefix(f"blocks.{i}."): p for name, p in w.items() if name.startswith(f"blocks.{i}.")}
        h1, s1, g1, h2, s2, g2 = (b["modulation.weight"] @ c + b["modulation.bias"]).chunk(6)
        z = norm(tokens) * (1 + s1) + h1
        q, k, v = (z @ b["qkv.weight"].T + b["qkv.bias"]).chunk(3, dim=1)
        answers = []
        for head in range(heads):
            part = slice(head * d // heads, (head + 1) * d // heads)
            attention = (q[:, part] @ k[:, part].T / math.sqrt(d // heads)).softmax(1)
            answers.append(attention @ v[:, part])
        tokens = tokens + g1 * (torch.cat(answers, 1) @ b["out.weight"].T + b["out.bias"])
        tokens = tokens + g2 * ffn(b, norm(tokens) * (1 + s2) + h2)
    shift, scale = (w["modulation.weight"] @ c + w["modulation.bias"]).chunk(2)
    out = (norm(tokens) * (1 + scale) + shift) @ w["write.weight"].T + w["write.bias"]
    return out.reshape(4, 4, 2, 2).transpose(1, 2).reshape(1, 8, 8)


def dense_ffn(b, z):
    hidden = F.gelu(z @ b["feed_forward.layers.0.weight"].T + b["feed_forward.layers.0.bias"])
    return hidden @ b["feed_forward.layers.1.weight"].T + b["feed_forward.layers.1.bias"]


def mixture_ffn(b, z):
    f = {name.removeprefix("feed_forward."): p for name, p in b.items()}

    def gated(gate, up, down, row):
        return down @ (F.silu(gate @ row) * (up @ row))

    rows = []
    for row in z:
        scores = (f["router.weight"] @ row).softmax(0)
        y = gated(*(f[f"shared.{part}_proj.weight"] for part in ("gate", "up", "down")), row)
        for i in scores.topk(2).indices.tolist():
            y = y + scores[i] * gated(*f["experts.gate_up"][i].chunk(2), f["experts.down"][i], row)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(("kind", "ffn"), [("dense", dense_ffn), ("mixture", mixture_ffn)])
def test_trained_transformers_and_the_formula(kind, ffn):
    model = zoo.digit_diffusion(kind).model
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([0.05, 0.5, 0.97]), torch.tensor([0, 7, 10])
    weights = {name: p.detach() for name, p in model.state_dict().items()}
    with torch.no_grad():
        ours = model(x, t, y)
        theirs = torch.stack([plain(weights, *row, ffn) for row in zip(x, t.tolist(), y.tolist(), strict=True)])
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def test_sampling_and_the_official_loop():
    """The loop of diffusion/rectified_flow.py: two calls a step, one with the class and one without."""
    model = zoo.digit_diffusion("mixture").model
    y, steps, guidance = torch.tensor([2, 5]), 4, 2.5
    z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for i in range(steps, 0, -1):
            t = torch.full((2,), i / steps)
            vc, vu = model(z, t, y), model(z, t, torch.full_like(y, 10))
            z = z - (vu + guidance * (vc - vu)) / steps
    ours = sample(model, y, steps=steps, guidance=guidance, seed=7)
    torch.testing.assert_close(ours, z, atol=1e-4, rtol=1e-4)
