"""A bottleneck beside a whole attention block or MLP, and budgets that make adapters comparable."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from notebook_kit.adapters import (
    CannotFold,
    LoRA,
    ParallelBottleneck,
    SeriesBottleneck,
    adapter_weights,
    attach,
    detach,
    fold,
    load_adapter_weights,
    rank_for,
    trainable_parameters,
)
from notebook_kit.models import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5
from tests.adapters.conftest import IDS, disturb, run

SUBLAYERS = {
    "llama mlp": (tiny_llama, r"mlp$", "model.layers.0.mlp"),
    "llama attention": (tiny_llama, r"self_attn$", "model.layers.0.self_attn"),
    "gpt2 mlp": (tiny_gpt2, r"\.mlp$", "transformer.h.0.mlp"),
    "gpt2 attention": (tiny_gpt2, r"\.attn$", "transformer.h.0.attn"),
    "t5 attention": (tiny_t5, r"SelfAttention$", "encoder.block.0.layer.0.SelfAttention"),
    "t5 mlp": (tiny_t5, r"DenseReluDense$", "encoder.block.0.layer.1.DenseReluDense"),
}


def inputs_of(model):
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})


class Block(nn.Module):
    """A residual block around one MLP of two known matrices."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
        self.mlp[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        self.mlp[1].weight.data = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])

    def forward(self, x):
        return x + self.mlp(x)


def test_by_hand():
    """x = (2, 3): the block alone gives 3x; D reads 2, U writes it to the second place."""
    model, x = Block(), torch.tensor([[2.0, 3.0]])
    assert attach(model, ParallelBottleneck, targets=r"mlp$", rank=1, activation="identity", scale=0.5) == ["mlp"]
    assert model(x).tolist() == [[6, 9]]
    load_adapter_weights(model, {"mlp.D": torch.tensor([[1.0, 0.0]]), "mlp.U": torch.tensor([[0.0], [1.0]])})
    assert model(x).tolist() == [[6, 10]]


@pytest.mark.parametrize("case", SUBLAYERS)
def test_beside_whole_sublayers(case):
    build, targets, name = SUBLAYERS[case]
    model = build()
    before, state = run(model, inputs_of(model)), {k: t.clone() for k, t in model.state_dict().items()}
    names = attach(model, ParallelBottleneck, targets=targets, rank=3)
    assert name in names
    d = model.config.hidden_size
    assert trainable_parameters(model).parameters.tolist() == [2 * 3 * d] * len(names)
    assert torch.equal(run(model, inputs_of(model)), before)  # U is zero
    seen = {}
    host, beside = model.get_submodule(name).host, model.get_submodule(name)
    hooks = [host.register_forward_hook(lambda m, args, kwargs, out: seen.update(x=args, kw=kwargs, y=out),
                                        with_kwargs=True),
             beside.register_forward_hook(lambda m, args, out: seen.update(z=out))]  # fmt: skip
    disturb(model)
    assert not torch.allclose(run(model, inputs_of(model)), before, atol=1e-4)
    x = seen["x"][0] if seen["x"] else seen["kw"]["hidden_states"]
    expected = F.linear(torch.tanh(F.linear(x, beside.D)), beside.U)
    y, z = (out[0] if isinstance(out, tuple) else out for out in (seen["y"], seen["z"]))
    torch.testing.assert_close(z, y + expected)
    for hook in hooks:
        hook.remove()
    saved = adapter_weights(model)
    with pytest.raises(CannotFold, match=rf"{name}: ParallelBottleneck stands beside a whole \w+: no one weight"):
        fold(model)
    assert torch.equal(run(detach(model), inputs_of(model)), before)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    attach(model, ParallelBottleneck, targets=targets, rank=3, seed=7)
    load_adapter_weights(model, saved)
    torch.testing.assert_close(run(model, inputs_of(model)), run(model, inputs_of(model)))


def test_generation_keeps_its_cache():
    model = tiny_llama()
    attach(model, ParallelBottleneck, targets=[r"self_attn$", r"mlp$"], rank=2)
    disturb(model, std=0.5)
    ids = torch.arange(6)[None]
    long = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(long, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_a_pattern_that_finds_layers_inside_means_them():
    model = tiny_llama()
    names = attach(model, ParallelBottleneck, targets=r"\.mlp", rank=2)
    assert {name.rpartition(".")[2] for name in names} == {"gate_proj", "up_proj", "down_proj"}
    detach(model)
    both = attach(model, ParallelBottleneck, targets=[r"mlp$", r"down_proj$"], rank=2)  # two patterns, both meant
    assert {name.rpartition(".")[2] for name in both} == {"mlp", "down_proj"}
    before = run(tiny_llama(), {"input_ids": IDS})
    assert torch.equal(run(model, {"input_ids": IDS}), before)
    assert torch.equal(run(detach(model), {"input_ids": IDS}), before)


def test_who_can_sit_there():
    for adapter in (LoRA, SeriesBottleneck):
        with pytest.raises(TypeError, match=rf"of type LlamaMLP; {adapter.__name__} sits on nn.Linear or"):
            attach(tiny_llama(), adapter, targets=r"mlp$")
    with pytest.raises(
        TypeError, match=r"of type LlamaRMSNorm; ParallelBottleneck sits on nn.Linear, .* or a sub-layer"
    ):
        attach(tiny_llama(), ParallelBottleneck, targets=r"input_layernorm$")
    with pytest.raises((TypeError, ValueError), match="MixtralSparseMoeBlock"):  # its only linear layers are no branch
        attach(tiny_mixtral(), ParallelBottleneck, targets=r"\.mlp$")
    with pytest.raises(TypeError, match="its input first, or with hidden_states"):
        ParallelBottleneck(nn.Linear(2, 2), rank=1)(input=torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"rank must be at most 2 for a host of 2 inputs and 2 outputs, got 3"):
        attach(Block(), ParallelBottleneck, targets=r"mlp$", rank=3)


# ---------------------------------------------------------------- budgets
@pytest.mark.parametrize(
    ("adapter", "targets", "values"),
    [
        (LoRA, r"_proj$", {"alpha": 8}),
        (LoRA, r"(q|v)_proj$", {}),
        (SeriesBottleneck, r"(o|down)_proj$", {}),
        (SeriesBottleneck, r"gate_proj$", {"side": "input"}),
        (ParallelBottleneck, r"mlp$", {"activation": "relu"}),
    ],
)
@pytest.mark.parametrize("budget", [2000, 3500])
def test_the_largest_rank_that_a_budget_pays_for(adapter, targets, values, budget):
    model = tiny_llama()
    state = {name: (tensor.clone(), p.requires_grad) for (name, tensor), p in zip(model.state_dict().items(),
             model.parameters(), strict=True)}  # fmt: skip
    rank = rank_for(model, adapter, targets=targets, parameters=budget, **values)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, (tensor, _) in state.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    attach(model, adapter, targets=targets, rank=rank, **values)
    size = trainable_parameters(model).parameters.sum()
    assert size <= budget < size + size / rank


def test_the_counts_of_the_paper():
    """Series at down: 2bd; parallel at up: b(d + f); LoRA the same with r. Each layer of the model has one."""
    model = tiny_llama()
    d, f, layers = model.config.hidden_size, model.config.intermediate_size, model.config.num_hidden_layers
    assert rank_for(model, SeriesBottleneck, targets=r"down_proj$", parameters=layers * 2 * 5 * d) == 5
    for adapter in (ParallelBottleneck, LoRA):
        assert rank_for(model, adapter, targets=r"up_proj$", parameters=layers * 5 * (d + f)) == 5
        assert rank_for(model, adapter, targets=r"up_proj$", parameters=layers * 5 * (d + f) - 1) == 4


def test_budgets_that_do_not_fit():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"parameters must be at least \d+, the size of LoRA with rank 1 here, got 3"):
        rank_for(model, LoRA, targets=r"q_proj$", parameters=3)
    with pytest.raises(ValueError, match="rank must be at most"):
        rank_for(model, LoRA, targets=r"q_proj$", parameters=100_000)
    with pytest.raises(ValueError, match="no module of LlamaForCausalLM matches"):
        rank_for(model, LoRA, targets=r"w_proj$", parameters=100_000)
