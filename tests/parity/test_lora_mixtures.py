"""Mixtures of LoRA experts against peft, and against the official codes' arithmetic written out loop by loop."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from notebook_kit.adapters import attach
from notebook_kit.adapters._adapter import adapters
from notebook_kit.mixtures import LoRAMoE, MeteoRA, MoLA, SMoRA, sample_labels, stack_experts
from notebook_kit.models import tiny_llama
from tests.adapters.conftest import IDS, disturb, run

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "v_proj", "down_proj"]
PATTERN = r"(q|v|down)_proj$"
INPUTS = {"input_ids": IDS}
SINGLE = {
    "loramoe": (LoRAMoE, {"n_experts": 1, "rank": 4, "alpha": 6}),
    "mola": (MoLA, {"n_experts": 1, "k": 1, "rank": 4, "alpha": 6}),
    "smora": (SMoRA, {"rank": 4, "k": 4, "granularity": 4, "alpha": 6}),
    "meteora": (MeteoRA, {"n_experts": 1, "k": 1, "rank": 4, "alpha": 6}),
}
EQUAL = {
    "loramoe": (LoRAMoE, {"n_experts": 4, "rank": 4, "alpha": 6}),
    "mola": (MoLA, {"n_experts": 5, "k": 2, "rank": 4, "alpha": 6}),
    "meteora": (MeteoRA, {"n_experts": 5, "k": 3, "rank": 4, "alpha": 6}),
}


def theirs(model, seed=1, **config):
    """A peft model with random A and B."""
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS, **config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def copy_factors(ours, model):
    """Give every expert peft's A and B."""
    for name, layer in adapters(ours):
        peer = model.base_model.model.get_submodule(name)
        layer.A.data.copy_(peer.lora_A["default"].weight.data.expand_as(layer.A))
        layer.B.data.copy_(peer.lora_B["default"].weight.data.expand_as(layer.B))


@pytest.mark.parametrize("kind", SINGLE)
def test_one_expert_is_pefts_lora(kind):
    ours, model = tiny_llama(), theirs(tiny_llama(), r=4, lora_alpha=6)
    attach(ours, SINGLE[kind][0], targets=PATTERN, **SINGLE[kind][1])
    copy_factors(ours, model)
    torch.testing.assert_close(run(ours, INPUTS), run(model, INPUTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", EQUAL)
def test_equal_experts_are_pefts_lora_whatever_the_router_says(kind):
    ours, model = tiny_llama(), theirs(tiny_llama(), r=4, lora_alpha=6)
    attach(ours, EQUAL[kind][0], targets=PATTERN, **EQUAL[kind][1])
    disturb(ours, std=1.0)
    copy_factors(ours, model)
    torch.testing.assert_close(run(ours, INPUTS), run(model, INPUTS), rtol=0, atol=1e-5)


def test_smora_with_all_ranks_at_even_gates_is_pefts_lora():
    ours, model = tiny_llama(), theirs(tiny_llama(), r=4, lora_alpha=6)
    attach(ours, SMoRA, targets=PATTERN, rank=4, k=4, alpha=6)
    for name, layer in adapters(ours):
        peer = model.base_model.model.get_submodule(name)
        layer.A.data.copy_(peer.lora_A["default"].weight.data[:, None])
        layer.B.data.copy_(peer.lora_B["default"].weight.data.T[:, :, None])
        layer.router.weight.data.zero_()
    torch.testing.assert_close(run(ours, INPUTS), run(model, INPUTS), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Three adapters in peft's format, of other ranks and alphas, and a peft model that holds them all."""
    configs = {"a": {"r": 4, "lora_alpha": 6}, "b": {"r": 2, "lora_alpha": 8}, "c": {"r": 6, "lora_alpha": 3}}
    folders = {}
    for seed, (name, config) in enumerate(configs.items()):
        folders[name] = tmp_path_factory.mktemp("bank") / name
        theirs(tiny_llama(), seed, **config).save_pretrained(folders[name])
    model = peft.PeftModel.from_pretrained(tiny_llama(), folders["a"], adapter_name="a")
    for name in ("b", "c"):
        model.load_adapter(folders[name], adapter_name=name)
    return folders, model.eval()


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_meteora_with_one_adapter_on_is_peft_with_it_active(bank, name):
    folders, model = bank
    ours = tiny_llama()
    MeteoRA.embed(ours, folders, k=1)
    for _, layer in adapters(ours):
        n = list(folders).index(name)
        layer.router.logits = lambda x, n=n: F.one_hot(torch.full((len(x),), n), 3).float()
    model.set_adapter(name)
    torch.testing.assert_close(run(ours, INPUTS), run(model, INPUTS), rtol=0, atol=1e-5)


def test_meteora_with_even_gates_is_pefts_weighted_adapter(bank):
    folders, model = bank
    ours = tiny_llama()
    MeteoRA.embed(ours, folders, k=3)
    for _, layer in adapters(ours):
        layer.router.weight.data.zero_()
    model.add_weighted_adapter(["a", "b", "c"], [1 / 3] * 3, "even", combination_type="cat")
    model.set_adapter("even")
    torch.testing.assert_close(run(ours, INPUTS), run(model, INPUTS), rtol=0, atol=1e-5)


def test_mola_as_the_official_code_computes_it():
    """Linear_MoE: a one-hot mask of the picks, a loop over experts, index_add of what each answers."""
    layer = MoLA(nn.Linear(12, 10), n_experts=5, k=2, rank=3, alpha=6, balance_coef=1.0).eval()
    disturb(layer, std=0.7)
    x = torch.randn(2, 9, 12)
    rows = x.reshape(-1, 12)
    logits = F.linear(rows, layer.router.weight)
    weights, picks = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), 2, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    mask = F.one_hot(picks, 5).permute(2, 1, 0)
    final = torch.zeros(len(rows), 10)
    for i in range(5):
        slot, token = torch.where(mask[i])
        answer = F.linear(F.linear(rows[token], layer.A[i]), layer.B[i]) * (6 / 3)
        final.index_add_(0, token, answer * weights[token, slot, None])
    torch.testing.assert_close(layer(x), layer.host(x) + final.reshape(2, 9, 10), atol=1e-5, rtol=1e-5)
    # load_balancing_loss_func on one router, with the counts normalised to sum to 1
    counts = torch.bincount(picks.reshape(-1), minlength=5).float()
    expected = 5 * ((counts / counts.sum()) * F.softmax(logits, dim=1).mean(0)).sum()
    torch.testing.assert_close(layer.routing.aux_loss, expected)


def test_loramoe_as_the_official_code_computes_it():
    """Linear.forward and cv_squared, with weights w = 1 + delta where the expert's half is the sample's type."""
    n, delta, coef = 6, 0.3, 0.7
    layer = LoRAMoE(nn.Linear(12, 10), n_experts=n, rank=3, alpha=6, balance_coef=coef, imbalance=delta).eval()
    disturb(layer, std=0.7)
    x, types = torch.randn(4, 7, 12), torch.tensor([0, 1, 1, 0])
    route = F.softmax(F.linear(x, layer.router.weight), dim=-1, dtype=torch.float32)
    result = layer.host(x)
    for i in range(n):
        result = result + route[:, :, i, None] * F.linear(F.linear(x, layer.A[i]), layer.B[i]) * (6 / 3)
    expert_type = torch.tensor([1, 1, 1, 0, 0, 0])
    factor = torch.where(types[:, None] == expert_type[None], 1 + delta, 1 - delta)
    amounts = (route.sum(1) * factor).flatten()
    with sample_labels(layer, types):
        y = layer(x)
    torch.testing.assert_close(y, result, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.routing.aux_loss, coef * amounts.var() / (amounts.mean() ** 2 + 1e-10))


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_meteora_as_the_official_code_computes_it(temperature):
    """MoELinear: at temperature 1 softmax over all, top-k, divided; the fast path's softmax over the top-k logits."""
    layer = MeteoRA(nn.Linear(12, 10), n_experts=5, rank=3, alpha=6, k=2, temperature=temperature).eval()
    disturb(layer, std=0.7)
    x = torch.randn(11, 12)
    logits = F.linear(x, layer.router.weight)
    top, picks = logits.topk(2, dim=1)
    weights = (top / temperature).softmax(1)
    if temperature == 1:
        slow = logits.softmax(1).gather(1, picks)
        torch.testing.assert_close(slow / slow.sum(1, keepdim=True), weights)
    down = layer.A[picks].transpose(2, 3).reshape(22, 12, 3)
    up = layer.B[picks].transpose(2, 3).reshape(22, 3, 10) * 2
    each = x.repeat_interleave(2, 0)[:, None].bmm(down).bmm(up).reshape(11, 2, 10)
    torch.testing.assert_close(layer(x), layer.host(x) + (weights[:, :, None] * each).sum(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_smora_is_a_mixture_of_loras_of_rank_q(granularity):
    """The plain sum over blocks, in float64 to the last digits."""
    layer = SMoRA(nn.Linear(12, 10), rank=8, k=4, granularity=granularity, gate="raw", alpha=3).eval()
    disturb(layer, std=0.7)
    layer = copy.deepcopy(layer).double()
    x = torch.randn(6, 12).double()
    y, routing = layer(x), layer.routing
    A, B = stack_experts(layer.A, layer.B)
    expected = layer.host(x)
    for t in range(6):
        for weight, j in zip(routing.weights[t], routing.experts[t].tolist(), strict=True):
            block = slice(j * granularity, (j + 1) * granularity)
            change = weight.double() * 3 / 4 * (B[:, block] @ (A[block] @ x[t]))
            expected = expected.index_add(0, torch.tensor([t]), change[None])
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)
