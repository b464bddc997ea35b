"""DeepSeekMoE against transformers' DeepSeek-V2, DeepSeek-V3 and Qwen2-MoE; the union of experts against torch."""

import copy

import pytest
import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config, LlamaConfig, Qwen2MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from notebook_kit import models
from notebook_kit.mixtures import DeepSeekMoE, SelectiveAttention, UnionOfExperts
from notebook_kit.models import MLP

SIZES = {"hidden_size": 16, "moe_intermediate_size": 8, "num_experts_per_tok": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 4}
DEEPSEEK = SIZES | {"n_routed_experts": 8, "n_shared_experts": 2}


def v2(**settings):
    return DeepseekV2Moe(DeepseekV2Config(**(DEEPSEEK | settings)))


def v3(**settings):
    return DeepseekV3MoE(DeepseekV3Config(**(DEEPSEEK | settings)))


def qwen(**settings):
    config = {"num_experts": 8, "shared_expert_intermediate_size": 24}
    return Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(**(SIZES | config | settings)))


BLOCKS = {
    "v2": lambda: v2(topk_method="greedy"),
    "v2 scaled": lambda: v2(topk_method="greedy", routed_scaling_factor=16.0, n_shared_experts=1),
    "v2 groups": lambda: v2(topk_method="group_limited_greedy", n_group=4, topk_group=2),
    "v3": lambda: v3(n_group=2, topk_group=1),
    "v3 undivided": lambda: v3(n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=2.5),
    "qwen2": qwen,
    "qwen2 divided": lambda: qwen(norm_topk_prob=True, shared_expert_intermediate_size=20),
}


@pytest.fixture(params=BLOCKS)
def block(request):
    made = BLOCKS[request.param]().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    if request.param.startswith("v3"):
        made.gate.e_score_correction_bias.normal_(std=0.1)
    return made


@torch.no_grad()
def test_the_transformers_blocks(block):
    layer, x = DeepSeekMoE.from_transformers(block), torch.randn(2, 17, 16)
    torch.testing.assert_close(layer(x), block(x), atol=1e-5, rtol=1e-5)
    _, weights, experts = block.gate(x)
    dense = torch.zeros(34, 8)
    theirs, ours = dense.scatter(1, experts, weights), dense.scatter(1, layer.routing.experts, layer.routing.weights)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in BLOCKS if name.startswith("v")])
def test_in_half_precision_deepseek_picks_the_same_experts(name, dtype):
    """Its gates score in float32, whatever the model's precision."""
    block = BLOCKS[name]().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    block = block.to(dtype)
    layer, x = DeepSeekMoE.from_transformers(block), torch.randn(300, 16).to(dtype)
    torch.testing.assert_close(layer(x), block(x[None])[0], atol=0.05, rtol=0.05)
    experts = block.gate(x)[2]
    assert torch.equal(layer.routing.experts.sort(1).values, experts.sort(1).values)


def test_weights_are_shared_and_gradients_equal(block):
    layer, x = DeepSeekMoE.from_transformers(block), torch.randn(2, 9, 16)
    assert layer.experts.gate_up is block.experts.gate_up_proj
    assert layer.router.weight is block.gate.weight
    parameters = [layer.experts.down, layer.router.weight, layer.shared.up_proj.weight]
    ours = torch.autograd.grad(layer(x).square().mean(), parameters)
    theirs = torch.autograd.grad(block(x).square().mean(), parameters)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_whole_model_keeps_its_logits():
    model = models.tiny_deepseek_v3()
    ids = torch.arange(60).reshape(3, 20) * 11 % 256
    before = model(ids).logits
    model.model.layers[1].mlp = DeepSeekMoE.from_transformers(model.model.layers[1].mlp)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_llama_feed_forward_layer_as_experts():
    dense = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=4))
    layer, x = UnionOfExperts(dense, n_experts=4, k=4, gate_mode="select"), torch.randn(2, 9, 16)
    torch.testing.assert_close(layer(x), dense(x), atol=2e-6, rtol=1e-5)
    back = copy.deepcopy(dense)
    back.load_state_dict(layer.to_dense().state_dict())
    for ours, theirs in zip(back.parameters(), dense.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("n_experts", [1, 2, 4, 8])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_dense_layer(n_experts, activation):
    dense, x = MLP([16, 32, 16], activation), torch.randn(3, 10, 16)
    layer = UnionOfExperts(dense, n_experts=n_experts, k=n_experts, gate_mode="select")
    torch.testing.assert_close(layer(x), dense(x), atol=2e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_torch_attention(causal, bias):
    dense, x = nn.MultiheadAttention(16, 4, bias=bias, batch_first=True), torch.randn(3, 10, 16)
    if bias:
        nn.init.normal_(dense.in_proj_bias)
        nn.init.normal_(dense.out_proj.bias)
    hidden = torch.ones(10, 10, dtype=torch.bool).triu(1) if causal else None
    expected = dense(x, x, x, attn_mask=hidden, need_weights=False)[0]
    layer = SelectiveAttention(dense, k=4, gate_mode="select", causal=causal)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)
    back = layer.to_dense()
    torch.testing.assert_close(back(x, x, x, attn_mask=hidden, need_weights=False)[0], expected)
    for ours, theirs in zip(back.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
