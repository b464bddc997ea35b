"""Networks small enough to train and take apart in a notebook, and tiny configurations of real architectures."""

from notebook_kit.models.conv_nets import VGG, ResNet
from notebook_kit.models.diffusion_transformer import DiffusionTransformer
from notebook_kit.models.digit_encoder import DigitEncoder
from notebook_kit.models.mlp import MLP
from notebook_kit.models.rectified_flow import flow_errors, flow_loss, noised, sample, sample_path, velocity
from notebook_kit.models.tiny import (
    tiny_bert,
    tiny_deepseek_v3,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_olmoe,
    tiny_qwen3_moe,
    tiny_switch,
    tiny_t5,
    tiny_vit,
)

__all__ = [
    "MLP",
    "VGG",
    "DiffusionTransformer",
    "DigitEncoder",
    "ResNet",
    "flow_errors",
    "flow_loss",
    "noised",
    "sample",
    "sample_path",
    "tiny_bert",
    "tiny_deepseek_v3",
    "tiny_gpt2",
    "tiny_llama",
    "tiny_mixtral",
    "tiny_olmoe",
    "tiny_qwen3_moe",
    "tiny_switch",
    "tiny_t5",
    "tiny_vit",
    "velocity",
]
