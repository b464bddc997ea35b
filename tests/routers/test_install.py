"""Installed routers inside transformers' models, and offline re-routing."""

import copy

import pytest
import torch

from notebook_kit import models
from notebook_kit.routers import (
    BalancedAssignment,
    ExpertChoice,
    HashRouter,
    LossFreeBias,
    NoisyTopK,
    StableMoE,
    TopK,
    aux_loss,
    install,
    record_routing,
    reroute,
    uninstall,
)

BUILDERS = [models.tiny_mixtral, models.tiny_qwen3_moe, models.tiny_olmoe, models.tiny_deepseek_v3]
IDS = torch.arange(24).reshape(2, 12) * 7 % 256


@pytest.mark.parametrize("build", BUILDERS)
@torch.no_grad()
def test_install_and_back(build):
    model = build()
    before, keys = model(IDS).logits, list(model.state_dict())
    names = install(model, TopK, k=3)
    assert all(name.endswith("mlp") for name in names)
    assert not torch.allclose(model(IDS).logits, before)
    assert list(model.state_dict()) == keys
    generated = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 15)
    assert aux_loss(model) > 0
    assert uninstall(model) == names
    assert torch.equal(model(IDS).logits, before)
    assert list(model.state_dict()) == keys


@torch.no_grad()
def test_unused_slots_and_more_experts_than_the_config():
    model = models.tiny_mixtral()
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        install(model, TopK, k=3, capacity_factor=0.5)
        with record_routing(model) as trace:
            logits = model(IDS).logits
        assert torch.isfinite(logits).all()
        assert trace.layer(0).experts.shape[1] == 3
    install(model, TopK, k=1, convention="switch")  # replaces the one before
    with record_routing(model) as trace:
        model(IDS)
    assert trace.k == 2  # what the model was trained with; its weights now have one slot
    assert trace.layer(0).experts.shape[1] == 1


def test_only_some_layers_and_training():
    model = models.tiny_mixtral().train()
    assert install(model, NoisyTopK, layers=[1]) == ["model.layers.1.mlp"]
    out = model(IDS, labels=IDS, output_router_logits=True)
    assert len(out.router_logits) == 2
    (out.loss + aux_loss(model)).backward()
    gate = model.model.layers[1].mlp.gate
    assert gate.weight.grad.abs().sum() > 0
    assert gate.installed.noise_weight.grad is not None
    assert "model.layers.1.mlp.gate.installed.noise_weight" in model.state_dict()


@torch.no_grad()
def test_a_copy_routes_by_its_own_weights():
    model = models.tiny_mixtral()
    install(model, TopK)
    model(IDS)
    twin = copy.deepcopy(model)
    before = model(IDS).logits
    for layer in twin.model.layers:
        layer.mlp.gate.weight.zero_()
    assert not torch.allclose(twin(IDS).logits, before)
    assert torch.equal(model(IDS).logits, before)
    changed = {name: tensor * 0 if "gate.weight" in name else tensor for name, tensor in model.state_dict().items()}
    called = torch.func.functional_call(model, changed, (IDS,))
    torch.testing.assert_close(called.logits, twin(IDS).logits)
    torch.testing.assert_close(model(IDS).logits, before)


@torch.no_grad()
def test_half_precision():
    model = models.tiny_deepseek_v3().bfloat16()
    install(model, TopK)
    assert torch.isfinite(model(IDS).logits).all()


def test_a_router_that_sees_the_future_is_refused():
    model = models.tiny_mixtral()
    with pytest.raises(ValueError, match="allow_noncausal=True"):
        install(model, ExpertChoice)
    install(model, ExpertChoice, allow_noncausal=True)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 14)


def test_errors_leave_the_model_alone():
    model = models.tiny_mixtral()
    with pytest.raises(ValueError, match="k must be at most"):
        install(model, TopK, k=9)
    with pytest.raises(ValueError, match="no hyperparameter 'kk'"):
        install(model, TopK, kk=2)
    with pytest.raises(ValueError, match=r"layers must be in \[0, 1\], got 2"):
        install(model, TopK, layers=[2])
    with pytest.raises(ValueError, match="no router is installed"):
        uninstall(model)
    with pytest.raises(ValueError, match=r"no routed layer in LlamaForCausalLM: looked for .*Mixtral"):
        install(models.tiny_llama(), TopK)


@torch.no_grad()
def test_reroute_is_what_the_model_did():
    model = models.tiny_mixtral()
    with record_routing(model) as trace:
        model(IDS)
    for i, routing in enumerate(reroute(trace, TopK, k=2)):
        assert torch.equal(routing.experts, trace.layer(i).experts)
        torch.testing.assert_close(routing.weights, trace.layer(i).weights)
    state = torch.get_rng_state()
    assert reroute(trace, TopK, layer=0, k=1, convention="switch").experts.shape == (24, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert reroute(trace, ExpertChoice, layer=1, k=2).load.std() == 0
    assert reroute(trace, NoisyTopK, layer=1).experts.shape == (24, 2)
    by_function = reroute(trace, lambda logits, scale: TopK(1, 8).eval().route(logits * scale), layer=0, scale=2.0)
    assert torch.equal(by_function.experts, trace.layer(0).experts)
    with pytest.raises(ValueError, match=r"layer must be in \[0, 1\], got 5"):
        reroute(trace, TopK, layer=5)
    with pytest.raises(ValueError, match="k must be in"):
        reroute(trace, TopK, k=0)


@torch.no_grad()
def test_the_bias_of_a_deepseek_gate_is_read_and_moved_in_place():
    model = models.tiny_deepseek_v3()
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias.copy_(torch.randn(gate.weight.shape[0]))
    before, keys = model(IDS).logits, list(model.state_dict())
    install(model, LossFreeBias, bias_rate=0.25)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=0)
    bias = gate.e_score_correction_bias.clone()
    model.train()(IDS)
    moved = gate.e_score_correction_bias - bias
    assert set(moved.abs().mul(4).round(decimals=3).tolist()) <= {0.0, 1.0}
    assert moved.abs().sum() > 0
    twin = copy.deepcopy(model)
    twin(IDS)
    assert not torch.equal(twin.model.layers[1].mlp.gate.e_score_correction_bias, gate.e_score_correction_bias)
    torch.testing.assert_close(gate.e_score_correction_bias, bias + moved)
    model.bfloat16().eval()(IDS)
    uninstall(model)
    assert list(model.state_dict()) == keys


def test_elsewhere_the_bias_is_the_routers_own():
    model = models.tiny_mixtral().train()
    install(model, LossFreeBias, scores="softmax")
    (model(IDS, labels=IDS).loss + aux_loss(model)).backward()
    gate = model.model.layers[0].mlp.gate
    assert gate.installed.bias.abs().sum() > 0
    assert gate.weight.grad.abs().sum() > 0
    assert "model.layers.0.mlp.gate.installed.bias" in model.state_dict()


@torch.no_grad()
def test_a_balanced_assignment_trains_in_a_causal_model_and_is_refused_in_evaluation():
    model = models.tiny_mixtral()
    install(model, BalancedAssignment)
    with record_routing(model.train()) as trace:
        model(IDS)
    assert trace.layer(0).load.tolist() == [1 / 8] * 8
    with pytest.raises(ValueError, match="allow_noncausal=True"):
        install(model, BalancedAssignment, evaluation="balanced")


@pytest.mark.parametrize("router", [HashRouter, StableMoE])
def test_a_gate_knows_no_token_ids(router):
    with pytest.raises(ValueError, match=f"{router.__name__} routes by token ids, and a gate inside Mixtral"):
        install(models.tiny_mixtral(), router)


def test_llama_4_is_refused_with_the_reason():
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    config = Llama4TextConfig(hidden_size=16, intermediate_size=16, num_local_experts=4, num_experts_per_tok=1)
    with pytest.raises(ValueError, match="Llama 4 multiplies the experts' inputs"):
        install(torch.nn.Sequential(Llama4TextMoe(config)), LossFreeBias, normalize=False)
