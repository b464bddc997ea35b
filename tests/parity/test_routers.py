"""Routers, losses, mixture and install against transformers 5."""

import pytest
import torch
from transformers import MixtralConfig, SwitchTransformersConfig
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from notebook_kit import models
from notebook_kit.mixtures import MoE
from notebook_kit.routers import TopK, install, load_balancing_loss, z_loss

IDS = torch.arange(60).reshape(3, 20) * 11 % 256
BUILDERS = [models.tiny_mixtral, models.tiny_qwen3_moe, models.tiny_olmoe]


def test_switch_losses():
    logits = torch.randn(1, 40, 6)
    probs, first = logits.softmax(-1), logits.argmax(-1)
    ours = load_balancing_loss(probs[0], first[0][:, None])
    torch.testing.assert_close(ours, switch.load_balancing_loss_func(probs, first))
    torch.testing.assert_close(z_loss(logits[0]), switch.router_z_loss_func(logits))


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_mixtral_loss(k, padded):
    logits, mask = torch.randn(40, 6), torch.ones(4, 10)
    mask[1, 5:] = 0
    theirs = mixtral.load_balancing_loss_func((logits,), 6, k, mask if padded else None)
    experts = logits.topk(k, dim=1).indices
    ours = load_balancing_loss(logits.softmax(1), experts, mask=mask.reshape(-1).bool() if padded else None)
    torch.testing.assert_close(ours, theirs)


def test_switch_router_with_capacity():
    # Their router counts capacity for each sequence apart: one sequence.
    config = SwitchTransformersConfig(hidden_size=16, num_experts=4, expert_capacity=5, router_jitter_noise=0.0)
    theirs = switch.SwitchTransformersTop1Router(config).eval()
    ours = TopK(16, 4, k=1, convention="switch", capacity_factor=1.0)  # ceil(20 / 4) = 5 slots
    ours.weight.data.copy_(theirs.classifier.weight)
    x = torch.randn(20, 16)
    chosen, weights, logits = theirs(x[None])
    routing = ours.eval()(x)
    torch.testing.assert_close(routing.logits, logits[0])
    served = chosen[0].sum(1).bool()
    assert not served.all()
    assert torch.equal(routing.experts[:, 0] >= 0, served)
    assert torch.equal(routing.experts[served, 0], chosen[0].argmax(1)[served])
    torch.testing.assert_close(routing.weights[served, 0], weights[0, served, 0])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_mixtral_router(k):
    theirs = mixtral.MixtralTopKRouter(MixtralConfig(hidden_size=16, num_local_experts=6, num_experts_per_tok=k))
    torch.nn.init.normal_(theirs.weight)
    ours = TopK(16, 6, k=k, normalize=k > 1)
    ours.weight.data.copy_(theirs.weight)
    x = torch.randn(30, 16)
    logits, weights, experts = theirs(x)
    routing = ours(x)
    assert torch.equal(routing.experts, experts)
    expected = weights if k > 1 else logits.softmax(1).amax(1, keepdim=True)
    torch.testing.assert_close(routing.weights, expected)


@pytest.mark.parametrize("build", BUILDERS)
@torch.no_grad()
def test_an_installed_top_k_changes_nothing(build):
    model = build()
    before = model(IDS).logits
    install(model, TopK, k=2, normalize=build is models.tiny_mixtral)
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=0)
    install(model, TopK)  # k and normalize from the model
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@torch.no_grad()
def test_moe_is_the_transformers_block(build, implementation):
    model = build(num_experts_per_tok=3)
    model.set_experts_implementation(implementation)
    block = model.model.layers[0].mlp
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    moe, x = MoE.from_transformers(block), torch.randn(2, 17, 32)
    torch.testing.assert_close(moe(x), block(x), atol=1e-5, rtol=0)
    assert moe.experts.gate_up.data_ptr() == block.experts.gate_up_proj.data_ptr()
