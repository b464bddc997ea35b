"""Everything a mixture makes lives where its host lives. The meta device stands in for a GPU: it refuses to mix too."""

import copy

import pytest
import torch
from torch import nn

from notebook_kit import models
from notebook_kit.adapters import attach
from notebook_kit.mixtures import (
    ContrastiveMoE,
    DeepSeekMoE,
    DiTMoE,
    LoRAMoE,
    MetaDMoE,
    MeteoRA,
    MoE,
    MoLA,
    MultiHeadRouting,
    SelectiveAttention,
    SMoRA,
    SwiGLU,
    SwiGLUExperts,
    UnionOfExperts,
    adapt_to_task,
    spawn_experts,
)
from notebook_kit.mixtures.grid_attention import GridAttention
from notebook_kit.models import MLP, DiffusionTransformer
from notebook_kit.routers import TopK


def with_lora(method, **values):
    model = MLP([8, 12, 4]).to("meta")
    attach(model, method, targets="layers", **values)
    return model


def adapted():
    model = with_lora(MultiHeadRouting, n_tasks=3, n_splits=4, rank=2)
    return adapt_to_task(model, n_tasks=2)


MADE = {
    "DeepSeek-V3": lambda: DeepSeekMoE.from_transformers(models.tiny_deepseek_v3().model.layers[1].mlp.to("meta")),
    "a cut mixture": lambda: DeepSeekMoE.from_moe(MoE(SwiGLUExperts(3, 6, 8), TopK(6, 3)).to("meta"), 2),
    "Mixtral": lambda: MoE.from_transformers(models.tiny_mixtral().model.layers[0].mlp.to("meta")),
    "DiT-MoE": lambda: DiTMoE.from_dense(SwiGLU(6, 8).to("meta"), n_experts=3),
    "union": lambda: UnionOfExperts(MLP([8, 16, 8]).to("meta")),
    "its dense layer": lambda: UnionOfExperts(MLP([8, 16, 8]).to("meta")).to_dense(),
    "attention": lambda: SelectiveAttention(nn.MultiheadAttention(8, 4, batch_first=True).to("meta")),
    "its heads sewn": lambda: SelectiveAttention(nn.MultiheadAttention(8, 4, batch_first=True).to("meta")).to_dense(),
    "LoRAMoE": lambda: with_lora(LoRAMoE, n_experts=4, rank=2),
    "MoLA": lambda: with_lora(MoLA, n_experts=4, rank=2),
    "SMoRA": lambda: with_lora(SMoRA, rank=4, k=2),
    "MeteoRA": lambda: with_lora(MeteoRA, n_experts=4, rank=2),
    "skills": adapted,
    "contrastive": lambda: ContrastiveMoE(models.tiny_bert().to("meta"), 3),
    "Meta-DMoE": lambda: MetaDMoE([MLP([6, 8]).to("meta")], MLP([6, 8]).to("meta"), nn.Linear(8, 3).to("meta")),
    "copies": lambda: spawn_experts(MLP([6, 8]).to("meta"), 2),
    "grid": lambda: GridAttention(16, 8, 2, 4).to("meta"),
    "diffusion": lambda: DiffusionTransformer(feed_forward=DiTMoE).to("meta"),
}


@pytest.mark.parametrize("name", MADE)
def test_all_parts_are_where_the_host_is(name):
    made = MADE[name]()
    tensors = dict(made.named_parameters()) | dict(made.named_buffers())
    assert tensors
    assert {key: tensor.device.type for key, tensor in tensors.items() if tensor.device.type != "meta"} == {}


@pytest.mark.parametrize("name", ["skills", "grid", "diffusion"])
def test_a_forward_pass_makes_nothing_elsewhere(name):
    made, like = MADE[name](), {"device": "meta"}
    if name == "skills":
        for layer in made.layers:
            layer.tasks = torch.zeros(5, dtype=torch.int64, **like)
        assert made(torch.empty(5, 8, **like)).device.type == "meta"
    elif name == "grid":
        assert made(torch.empty(2, 16, 16, **like), torch.empty(2, 16, 8, **like)).device.type == "meta"
    else:
        dense = DiffusionTransformer(n_blocks=1).to("meta")
        dense._check = lambda *args: None  # it reads values, of which this device has none
        t, y = torch.empty(2, **like), torch.empty(2, dtype=torch.int64, **like)
        assert dense(torch.empty(2, 1, 8, 8, **like), t, y).device.type == "meta"


def test_the_wrapped_router_still_shares_weight_and_bias():
    block = models.tiny_deepseek_v3().model.layers[1].mlp
    layer = DeepSeekMoE.from_transformers(block)
    assert layer.router.weight is block.gate.weight
    assert layer.router.bias is block.gate.e_score_correction_bias
    assert copy.deepcopy(layer).router.bias is not block.gate.e_score_correction_bias
