"""One small network of every architecture that has a permutation spec, with nothing left at its initial value."""

import torch
import transformers
from torch import nn

from notebook_kit import models
from notebook_kit.models import MLP, VGG, ResNet

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


def _nested():
    convs = [nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.AvgPool2d(2)]
    return nn.Sequential(
        nn.Unflatten(-1, (1, 8, 8)),
        nn.Sequential(*convs),
        nn.Flatten(),
        nn.BatchNorm1d(32),
        nn.Linear(32, 12),
        nn.Tanh(),
        nn.Linear(12, 5),
    )


def _mt5():
    sizes = {"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_heads": 4}
    return transformers.MT5ForConditionalGeneration(transformers.MT5Config(num_layers=2, num_decoder_layers=1, **sizes))


def _resnet(layer_type: str, **more):
    sizes = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "num_labels": 5}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(layer_type=layer_type, **(sizes | more)))


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BUILD = {
    "mlp": lambda: MLP([8, 16, 12, 5]),
    "sequential": _sequential,
    "sequential in sequential": _nested,
    "vgg": lambda: VGG((6, 8)),
    "resnet": lambda: ResNet((6, 8), blocks=2),
    "resnet of transformers": lambda: _resnet("basic"),
    "resnet of transformers, bottleneck": lambda: _resnet("bottleneck", hidden_sizes=[32, 64]),
    "t5": models.tiny_t5,
    "t5, gated, untied": lambda: models.tiny_t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": _mt5,
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
WITHOUT_STREAM = ("mlp", "sequential", "sequential in sequential", "vgg")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = BUILD[name]().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Norm weights of 1 and biases of 0 would hide an axis that was forgotten.
        for parameter in {id(p): p for p in model.parameters()}.values():
            noise = torch.randn(parameter.shape, generator=generator)
            # T5 does not divide its attention scores by anything: scaled up further, rounding alone would show.
            parameter.add_(0.3 * noise) if parameter.dim() == 1 else parameter.mul_(1 if "t5" in name else 3)
        for norm in (module for module in model.modules() if isinstance(module, NORMS)):
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 2.0, generator=generator)
    return model


@torch.no_grad()
def outputs(model: nn.Module, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None:
        width = next(iter(model.parameters())).shape[1]
        width = width if width > 1 else 64  # convolutions begin at one channel of 8 x 8 pixels
        return model(torch.randn(6, width, generator=generator))
    if kind == "resnet":
        return model(torch.randn(3, 1, 16, 16, generator=generator)).logits
    if kind in ("t5", "mt5"):
        ids = torch.randint(0, 256, (2, 3, 12), generator=generator)
        return model(input_ids=ids[0], decoder_input_ids=ids[1]).logits
    if kind == "vit":
        return model(torch.randn(3, 1, 16, 16, generator=generator)).logits
    return model(torch.randint(0, 256, (3, 12), generator=generator)).logits


def with_weights(name: str, weights, seed: int = 0) -> nn.Module:
    model = build(name, seed)
    model.load_state_dict(weights)
    return model


def weights_of(model: nn.Module) -> dict:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}
