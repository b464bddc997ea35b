"""Small mixtures of experts, their traces, and a block with a list of experts."""

import functools

import torch
import transformers
from torch import nn

from notebook_kit import models
from notebook_kit.routing import RoutingTrace, record_routing

SIZES = {
    "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "intermediate_size": 64, "num_experts_per_tok": 2, "head_dim": 8,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def tiny_qwen2_moe():
    config = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 8}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SIZES, **config)).eval()


def tiny_gpt_oss():
    """Square on purpose: 2f = d, so that no shape tells how the tensors lie; with biases that matter."""
    config = transformers.GptOssConfig(**SIZES | {"intermediate_size": 16, "num_local_experts": 8})
    model = transformers.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for bias in (layer.mlp.experts.gate_up_proj_bias, layer.mlp.experts.down_proj_bias, layer.mlp.router.bias):
                bias.normal_(std=0.5)
    return model


KINDS = {
    "gpt_oss": tiny_gpt_oss,
    "qwen2_moe": tiny_qwen2_moe,
    "mixtral": models.tiny_mixtral,
    "qwen3_moe": models.tiny_qwen3_moe,
    "olmoe": models.tiny_olmoe,
    "deepseek_v3": models.tiny_deepseek_v3,
}


def ids(seed: int = 0, n: int = 4, length: int = 32):
    return torch.randint(0, 256, (n, length), generator=torch.Generator().manual_seed(seed))


def moe(kind: str = "mixtral"):
    """A model whose experts matter: random weights, scaled up."""
    torch.manual_seed(0)
    model = KINDS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@torch.no_grad()
def trace_of(model) -> RoutingTrace:
    with record_routing(model) as trace:
        model(ids())
    return trace


@functools.cache
def prepared(kind: str = "mixtral"):
    """(model, trace, its logits on other text); not to be modified."""
    model = moe(kind)
    return model, trace_of(model), logits(model)


@torch.no_grad()
def logits(model, seed: int = 1):
    return model(ids(seed)).logits


def made_up_trace(model, usage, logits_of=None, layers=None) -> RoutingTrace:
    """A trace with given usage, in hundredths of the slots, and router logits."""
    names = layers or [name for name, block in model.named_modules() if hasattr(block, "experts")]
    chosen = torch.repeat_interleave(torch.arange(len(usage)), torch.tensor([round(100 * share) for share in usage]))
    n = len(chosen)
    scores = torch.randn(n, len(usage), generator=torch.Generator().manual_seed(0)) if logits_of is None else logits_of
    trace = RoutingTrace(names, k=1)
    routing = (scores, torch.ones(n, 1), chosen[:, None])
    place = torch.arange(n)
    trace.append([routing] * len(names), tokens=place, positions=place, sequences=torch.zeros(n, dtype=torch.long))
    return trace


class Expert(nn.Module):
    def __init__(self, d, f):
        super().__init__()
        self.w1, self.w3 = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.w2, self.act_fn = nn.Linear(f, d, bias=False), nn.SiLU()

    def forward(self, x):
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class Gate(nn.Module):
    def __init__(self, d, n, k):
        super().__init__()
        self.weight, self.top_k, self.norm_topk_prob = nn.Parameter(torch.randn(n, d)), k, True

    def forward(self, x):
        scores = x @ self.weight.T
        weights, experts = scores.softmax(-1).topk(self.top_k)
        return scores, weights / weights.sum(-1, keepdim=True), experts


class ListedBlock(nn.Module):
    def __init__(self, d=6, f=5, n=4, k=2):
        super().__init__()
        self.gate, self.experts = Gate(d, n, k), nn.ModuleList(Expert(d, f) for _ in range(n))

    def forward(self, x):
        _, weights, experts = self.gate(x)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return (outputs.gather(1, experts[..., None].expand(-1, -1, x.shape[1])) * weights[..., None]).sum(1)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ListedBlock()

    def forward(self, x):
        return self.block(x)
