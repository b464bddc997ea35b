"""One small network of every architecture that has a permutation spec, with nothing left at its initial value."""

import torch
import transformers
from torch import nn

from notebook_kit import models
from notebook_kit.models import MLP

DECODER = {
    "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip


def _decoder(name: str, **more):
    config = getattr(transformers, f"{name}Config")(**(DECODER | more))
    return getattr(transformers, f"{name}ForCausalLM")(config)


def _sequential():
    first = [nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU()]
    return nn.Sequential(*first, nn.Linear(16, 12), nn.BatchNorm1d(12), nn.GELU(), nn.Linear(12, 5))


def _bert():
    config = transformers.BertConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=5
    )
    return transformers.BertForSequenceClassification(config)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BUILD = {
    "mlp": lambda: MLP([8, 16, 12, 5]),
    "sequential": _sequential,
    "bert": _bert,
    "vit": models.tiny_vit,
    "llama": models.tiny_llama,
    "llama with biases": lambda: models.tiny_llama(attention_bias=True, mlp_bias=True),
    "llama, groups of 4": lambda: _decoder("Llama"),
    "llama, tied": lambda: _decoder("Llama", tie_word_embeddings=True),
    "mistral": lambda: _decoder("Mistral"),
    "qwen2": lambda: _decoder("Qwen2"),
    "qwen3": lambda: _decoder("Qwen3", head_dim=8),
    "olmo2": lambda: _decoder("Olmo2"),
    "mixtral": models.tiny_mixtral,
    "qwen2_moe": lambda: _decoder("Qwen2Moe", shared_expert_intermediate_size=24, **MOE),
    "qwen3_moe": models.tiny_qwen3_moe,
    "olmoe": models.tiny_olmoe,
    "deepseek_v3": models.tiny_deepseek_v3,
    "deepseek_v3, plain queries": lambda: models.tiny_deepseek_v3(q_lora_rank=None),
}
WITHOUT_STREAM = ("mlp", "sequential")


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = BUILD[name]().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Norm weights of 1 and biases of 0 would hide an axis that was forgotten.
        for parameter in {id(p): p for p in model.parameters()}.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise) if parameter.dim() == 1 else parameter.mul_(3)
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm1d)):
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2.0, generator=generator)
    return model


@torch.no_grad()
def outputs(model: nn.Module, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        return model(torch.randn(6, 8, generator=generator))
    if kind == "vit":
        return model(torch.randn(3, 1, 16, 16, generator=generator)).logits
    return model(torch.randint(0, 256, (3, 12), generator=generator)).logits


def with_weights(name: str, weights, seed: int = 0) -> nn.Module:
    model = build(name, seed)
    model.load_state_dict(weights)
    return model


def weights_of(model: nn.Module) -> dict:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}
