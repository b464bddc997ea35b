"""Models and inputs that the adapters' tests share."""

import pytest
import torch
from torch import nn

from notebook_kit.adapters import Adapter
from notebook_kit.models import MLP, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit

IDS = torch.arange(24).reshape(2, 12)
MODELS = {
    "llama": (tiny_llama, {"input_ids": IDS}, r"(q|v)_proj$"),
    "bert": (tiny_bert, {"input_ids": IDS}, r"attention\.self\.(query|value)$"),
    "vit": (tiny_vit, {"pixel_values": torch.linspace(-1, 1, 512).reshape(2, 1, 16, 16)}, r"\.(q_proj|fc1)$"),
    "t5": (tiny_t5, {"input_ids": IDS, "decoder_input_ids": IDS}, r"\.(q|v|wo)$"),
    "gpt2": (tiny_gpt2, {"input_ids": IDS}, r"c_(attn|fc)$"),
    "mlp": (lambda: MLP([8, 16, 4]).eval(), {"x": torch.linspace(-1, 1, 40).reshape(5, 8)}, r"layers"),
}


def run(model: nn.Module, inputs: dict) -> torch.Tensor:
    """The model's output as one tensor."""
    with torch.no_grad():
        out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out[0]


def disturb(model: nn.Module, std: float = 0.1, seed: int = 0) -> None:
    """Give the adapters' own parameters random values, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Adapter):
            for name, parameter in module.named_parameters():
                if not name.startswith("host."):
                    noise = torch.randn(parameter.shape, generator=generator) * std
                    parameter.data.copy_(noise)


@pytest.fixture(params=MODELS)
def bed(request):
    """A fresh model of each architecture, its inputs, and a pattern for its hosts."""
    build, inputs, targets = MODELS[request.param]
    return build(), inputs, targets
