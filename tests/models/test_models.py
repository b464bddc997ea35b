"""The small networks and the tiny configurations of real architectures."""

import pytest
import torch

from notebook_kit import models
from notebook_kit.models import MLP, DigitEncoder

CLASSES = {
    "tiny_llama": "LlamaForCausalLM",
    "tiny_mixtral": "MixtralForCausalLM",
    "tiny_bert": "BertModel",
    "tiny_vit": "ViTForImageClassification",
    "tiny_t5": "T5ForConditionalGeneration",
    "tiny_qwen3_moe": "Qwen3MoeForCausalLM",
    "tiny_olmoe": "OlmoeForCausalLM",
    "tiny_deepseek_v3": "DeepseekV3ForCausalLM",
    "tiny_gpt2": "GPT2LMHeadModel",
    "tiny_switch": "SwitchTransformersForConditionalGeneration",
}


def inputs(name):
    ids = torch.arange(64).reshape(2, 32)
    if name == "tiny_vit":
        return {"pixel_values": torch.linspace(0, 1, 512).reshape(2, 1, 16, 16)}
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if name in ("tiny_t5", "tiny_switch") else {})


@pytest.mark.parametrize("name", CLASSES)
def test_tiny_models_are_the_real_classes_fast_and_seeded(name):
    state = torch.get_rng_state()
    make = getattr(models, name)
    model, twin, other = make(), make(), make(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(model).__name__ == CLASSES[name]
    assert not model.training
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)]
    differ = [not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    assert all(same)
    assert any(differ)
    with torch.no_grad():
        first = model(**inputs(name))[0]
        second = model(**inputs(name))[0]
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


def test_overrides_reach_the_configuration():
    assert models.tiny_llama(hidden_size=16).config.hidden_size == 16
    assert models.tiny_mixtral(num_local_experts=4).config.num_local_experts == 4


def test_mlp_names_its_layers_in_order():
    model = MLP([64, 32, 10], "gelu")
    assert [k for k in model.state_dict() if k.endswith("weight")] == ["layers.0.weight", "layers.1.weight"]
    x = torch.rand(3, 64)
    hidden = torch.nn.functional.gelu(x @ model.layers[0].weight.T + model.layers[0].bias)
    assert torch.allclose(model(x), hidden @ model.layers[1].weight.T + model.layers[1].bias, atol=1e-6)


def test_mlp_refuses_what_it_cannot_build():
    with pytest.raises(ValueError, match=r"relu, gelu"):
        MLP([64, 10], "tanh")
    with pytest.raises(ValueError, match=r"widths needs an input and an output"):
        MLP([64])


def test_digit_encoder_reads_features_through_frozen_orthogonal_rows():
    model = DigitEncoder(25)
    assert torch.allclose(model.head @ model.head.T, torch.eye(25), atol=1e-5)
    assert "head" not in model.state_dict()
    assert torch.equal(model.head, DigitEncoder(25).head)
    assert torch.equal(model.head[:10], DigitEncoder(10).head)
    x = torch.rand(4, 64)
    feature = model.encode(x)
    cosine = feature @ model.head.T / feature.norm(dim=1, keepdim=True)
    assert torch.allclose(model(x), 10 * cosine, atol=1e-5)
    with pytest.raises(ValueError, match=r"n_classes must be in"):
        DigitEncoder(65)
