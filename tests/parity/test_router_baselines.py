"""The baselines against transformers' gates: DeepSeek-V3, Qwen2-MoE, OLMoE, Llama 4, Switch with dropped claims."""

import pytest
import torch
from transformers import DeepseekV3Config, Llama4TextConfig, OlmoeConfig, Qwen2MoeConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2

from notebook_kit import models, zoo
from notebook_kit.routers import LossFreeBias, TopK, install, load_balancing_loss, record_routing, reroute

D, N = 16, 16
CLOSE = {"atol": 1e-5, "rtol": 0}


def dense(weights, experts):
    """Weight of each expert, whatever the order of the slots."""
    return torch.zeros(len(weights), N).scatter_(1, experts, weights)


@pytest.mark.parametrize(("n_group", "topk_group", "k"), [(1, 1, 3), (4, 2, 3), (8, 4, 8), (2, 1, 2)])
@pytest.mark.parametrize("normalize", [True, False])
@torch.no_grad()
def test_deepseek_v3_router(n_group, topk_group, k, normalize):
    config = DeepseekV3Config(
        hidden_size=D, num_local_experts=N, num_experts_per_tok=k, n_group=n_group, topk_group=topk_group,
        norm_topk_prob=normalize, routed_scaling_factor=2.5,
    )  # fmt: skip
    theirs = deepseek.DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(theirs.weight)
    theirs.e_score_correction_bias.normal_(std=0.3)
    groups = {"n_group": n_group, "topk_group": topk_group}
    ours = LossFreeBias(D, N, k=k, normalize=normalize, routed_scaling_factor=2.5, **groups).eval()
    ours.weight.copy_(theirs.weight)
    ours.bias.copy_(theirs.e_score_correction_bias)
    x = torch.randn(200, D)
    (logits, weights, experts), routing = theirs(x), ours(x)
    torch.testing.assert_close(routing.logits, logits, **CLOSE)
    torch.testing.assert_close(dense(routing.weights, routing.experts), dense(weights, experts), **CLOSE)


@torch.no_grad()
def test_deepseek_v3_model_with_groups_after_install():
    model = models.tiny_deepseek_v3(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3)
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate.weight", "e_score_correction_bias")):
            tensor.normal_(std=0.5)
    ids = torch.arange(60).reshape(3, 20) * 11 % 256
    before = model(ids).logits
    install(model, LossFreeBias)
    torch.testing.assert_close(model(ids).logits, before, **CLOSE)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize(
    ("gate", "config"),
    [(qwen2.Qwen2MoeTopKRouter, Qwen2MoeConfig), (olmoe.OlmoeTopKRouter, OlmoeConfig)],
)
@torch.no_grad()
def test_softmax_routers(gate, config, k, normalize):
    settings = {"hidden_size": D, "num_experts": N, "num_experts_per_tok": k, "norm_topk_prob": normalize}
    theirs = gate(config(**settings))
    torch.nn.init.normal_(theirs.weight)
    ours = TopK(D, N, k=k, normalize=normalize).eval()
    ours.weight.copy_(theirs.weight)
    x = torch.randn(200, D)
    (logits, weights, experts), routing = theirs(x), ours(x)
    torch.testing.assert_close(routing.logits, logits, **CLOSE)
    assert torch.equal(routing.experts, experts)
    torch.testing.assert_close(routing.weights, weights, **CLOSE)
    soft = LossFreeBias(D, N, k=k, normalize=normalize, scores="softmax").eval()
    soft.weight.copy_(theirs.weight)
    torch.testing.assert_close(dense(soft(x).weights, soft(x).experts), dense(weights, experts), **CLOSE)


@pytest.mark.parametrize("k", [1, 2])
@torch.no_grad()
def test_llama_4_router(k):
    theirs = llama4.Llama4Router(Llama4TextConfig(hidden_size=D, num_local_experts=N, num_experts_per_tok=k))
    torch.nn.init.normal_(theirs.weight)
    ours = LossFreeBias(D, N, k=k, normalize=False, bias_rate=0.0).eval()
    ours.weight.copy_(theirs.weight)
    x = torch.randn(200, D)
    scores, _ = theirs(x)
    torch.testing.assert_close(dense(ours(x).weights, ours(x).experts), scores, **CLOSE)


@torch.no_grad()
def test_on_trained_weights():
    bed = zoo.language_moe()
    ids = torch.cat(list(bed.batches("test").values()))[:8]
    with record_routing(bed.model) as trace:
        expected = bed.model(ids, output_router_logits=True, labels=ids)
    for layer, logits in enumerate(expected.router_logits):
        routing = reroute(trace, LossFreeBias, layer=layer, scores="softmax")
        torch.testing.assert_close(routing.logits, logits, **CLOSE)
        assert torch.equal(routing.experts, trace.layer(layer).experts)
        torch.testing.assert_close(routing.weights, trace.layer(layer).weights, **CLOSE)
    # Theirs is over all layers at once.
    z = torch.cat(expected.router_logits)
    ours = load_balancing_loss(z.softmax(1), z.topk(2, dim=1).indices)
    torch.testing.assert_close(ours, expected.aux_loss, **CLOSE)
