"""attach, fold, detach: on real architectures and on what goes wrong."""

import copy
import re

import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation
from torch import nn

from notebook_kit.adapters import (
    Adapter,
    CannotFold,
    LoRA,
    ParallelBottleneck,
    SeriesBottleneck,
    adapter_weights,
    attach,
    detach,
    fold,
    load_adapter_weights,
    trainable_parameters,
)
from notebook_kit.models import MLP, tiny_gpt2, tiny_llama
from tests.adapters.conftest import IDS, disturb, run

# Outside the tests it is the TypeError; here the type checker may be faster.
WRONG_TYPE = (TypeError, BeartypeCallHintParamViolation)
FOLDABLE = [
    (LoRA, {"rank": 3}),
    (LoRA, {"rank": 3, "rslora": True}),
    (ParallelBottleneck, {"rank": 3, "activation": "identity", "scale": 0.5}),
    (SeriesBottleneck, {"rank": 3, "activation": "identity", "scale": 0.5}),
    (SeriesBottleneck, {"rank": 3, "activation": "identity", "side": "input"}),
]


def snapshot(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    return state, flags, modes


def assert_same(before, after):
    assert before[1:] == after[1:]
    assert list(before[0]) == list(after[0])
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])


@pytest.mark.parametrize(("adapter", "values"), FOLDABLE)
def test_starts_unchanged_folds_to_the_same_outputs(bed, adapter, values):
    model, inputs, targets = bed
    plain, keys = run(model, inputs), list(model.state_dict())
    types = [type(module) for module in model.modules()]
    names = attach(model, adapter, targets=targets, **values)
    assert names
    assert all(isinstance(model.get_submodule(name), adapter) for name in names)
    torch.testing.assert_close(run(model, inputs), plain, rtol=0, atol=1e-6)
    disturb(model)
    adapted = run(model, inputs)
    assert (adapted - plain).abs().max() > 1e-3
    assert fold(model) is model
    torch.testing.assert_close(run(model, inputs), adapted, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == types


@pytest.mark.parametrize("adapter", [LoRA, ParallelBottleneck, SeriesBottleneck])
def test_detach_gives_the_original_back(bed, adapter):
    model, inputs, targets = bed
    next(model.parameters()).requires_grad_(False)
    next(iter(model.children())).train()
    before, plain = snapshot(model), run(model, inputs)
    attach(model, adapter, targets=targets, rank=2)
    model.train()
    disturb(model)
    detach(model)
    assert_same(before, snapshot(model))
    model.eval()
    assert torch.equal(run(model, inputs), plain)


def test_detach_restores_running_statistics():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = snapshot(model)
    attach(model, LoRA, targets=r"^0$", rank=2)
    model(torch.randn(8, 4))
    detach(model)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("adapter", [LoRA, ParallelBottleneck, SeriesBottleneck])
def test_gradients_reach_the_adapters_and_nothing_else(bed, adapter):
    model, inputs, targets = bed
    attach(model, adapter, targets=targets, rank=2)
    disturb(model)
    out = model(**inputs)
    (out if isinstance(out, torch.Tensor) else out[0]).pow(2).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == set(adapter_weights(model))
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_llama()
        attach(model, LoRA, targets=r"(q|v)_proj$", rank=2)
        disturb(model)
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_generate_save_pretrained_deepcopy_and_state_dict(tmp_path):
    model = tiny_llama()
    attach(model, LoRA, targets=r"_proj$", rank=2)
    disturb(model, std=0.3)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    text = model.generate(IDS[:1], **greedy)
    logits = run(model, {"input_ids": IDS})

    twin = copy.deepcopy(model)
    disturb(twin, seed=1)
    assert not torch.equal(run(twin, {"input_ids": IDS}), logits)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(run(twin, {"input_ids": IDS}), logits)
    detach(twin)
    assert torch.equal(run(twin, {"input_ids": IDS}), run(tiny_llama(), {"input_ids": IDS}))
    assert all(p.requires_grad for p in twin.parameters())

    fold(model)
    assert torch.equal(model.generate(IDS[:1], **greedy), text)
    model.save_pretrained(tmp_path / "folded")
    again = type(model).from_pretrained(tmp_path / "folded")
    assert torch.equal(run(again, {"input_ids": IDS}), run(model, {"input_ids": IDS}))
    assert all(p.requires_grad for p in model.parameters())


def test_folding_leaves_the_tensors_that_others_hold():
    model = MLP([4, 4])
    held = model.state_dict()["layers.0.weight"]
    before = held.clone()
    attach(model, LoRA, targets="layers", rank=2)
    disturb(model)
    fold(model)
    assert torch.equal(held, before)
    assert not torch.equal(model.layers[0].weight, before)


def test_folding_in_bfloat16_rounds_the_sum_once():
    model = MLP([16, 8]).to(torch.bfloat16)
    attach(model, LoRA, targets="layers", rank=2)
    disturb(model)
    lora = model.layers[0]
    assert lora.A.dtype == lora.B.dtype == torch.bfloat16
    expected = (lora.weight.float() + lora.scaling * lora.B.float() @ lora.A.float()).to(torch.bfloat16)
    fold(model)
    assert torch.equal(model.layers[0].weight, expected)


def test_what_cannot_fold_is_refused_before_anything_changes():
    model = tiny_llama()
    attach(model, LoRA, targets=r"q_proj$", rank=2)
    attach(model, SeriesBottleneck, targets=r"down_proj$", rank=2, activation="tanh")
    disturb(model)
    before = snapshot(model)
    with pytest.raises(CannotFold, match=r"layers\.0\.mlp\.down_proj: .*'tanh' is not linear.*identity"):
        fold(model)
    assert_same(before, snapshot(model))
    detach(model)

    attach(model, LoRA, targets=r"q_proj$", rank=2)
    model.model.layers[1].self_attn.q_proj.B.data.fill_(float("inf"))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: the folded weight would hold NaN or Inf"):
        fold(model)
    assert isinstance(model.model.layers[0].self_attn.q_proj, LoRA)


def test_a_tied_weight_is_not_folded_behind_the_other_module():
    model = tiny_gpt2()
    attach(model, LoRA, targets=r"lm_head", rank=2)
    with pytest.raises(CannotFold, match="lm_head: its weight is shared"):
        fold(model)
    detach(model)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_module_used_in_two_places_gets_one_adapter():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(shared)})
    assert attach(model, LoRA, targets=r"^a\.0$", rank=2) == ["a.0"]
    assert isinstance(model["a"][0], LoRA)
    assert model["b"][0] is model["a"][0]
    fold(model)
    assert type(model["a"][0]) is nn.Linear
    assert model["b"][0] is model["a"][0]
    assert attach(model, LoRA, targets=r"^b\.0$", rank=2) == ["a.0"]
    assert model["b"][0] is model["a"][0]
    block = nn.Sequential(nn.Linear(4, 4))
    model = nn.ModuleDict({"a": block, "b": block})
    attach(model, LoRA, targets=r"0$", rank=2)
    fold(model)
    assert type(block[0]) is nn.Linear


def test_the_host_is_read_through_the_adapter():
    host = nn.Linear(6, 4)
    lora = LoRA(host, rank=2)
    assert lora.weight is host.weight
    assert lora.bias is host.bias
    assert (lora.in_features, lora.out_features) == (6, 4)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = lora.no_such_thing


def test_seed_differs_by_module_and_leaves_the_global_state():
    state = torch.get_rng_state()
    model, twin, other = tiny_llama(), tiny_llama(), tiny_llama()
    for m, seed in ((model, 0), (twin, 0), (other, 1)):
        attach(m, LoRA, targets=r"q_proj$", rank=2, seed=seed)
    a, b, c = adapter_weights(model), adapter_weights(twin), adapter_weights(other)
    first, second = (key for key in a if key.endswith(".A"))
    assert torch.equal(a[first], b[first])
    assert not torch.equal(a[first], c[first])
    assert not torch.equal(a[first], a[second])
    assert torch.equal(torch.get_rng_state(), state)


def test_predicates_lists_and_a_second_attach():
    model = tiny_llama()
    linear = attach(model, LoRA, targets=lambda name, module: isinstance(module, nn.Linear) and "mlp" in name, rank=2)
    assert len(linear) == 6
    names = attach(model, ParallelBottleneck, targets=[r"q_proj$", re.compile(r"\.0\..*v_proj$")], rank=2)
    assert [name.rpartition(".")[2] for name in names] == ["q_proj", "v_proj", "q_proj"]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_weights(model))
    detach(model)
    assert not any(isinstance(module, Adapter) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("targets", "error", "text"),
    [
        (
            r"(q|v)_porj$",
            ValueError,
            r"no module of LlamaForCausalLM matches .*near it: model\.layers\.0\.self_attn\.v_proj",
        ),
        ([r"q_proj$", r"qkv$"], ValueError, r"matches 'qkv\$'"),
        ([], ValueError, "at least one pattern, got an empty list"),
        (r"(q_proj", ValueError, "must be a regular expression"),
        (r"embed_tokens", TypeError, r"model\.embed_tokens, of type Embedding; LoRA sits on nn\.Linear"),
        (r"self_attn$", TypeError, r"LlamaAttention; .*inside it: model\.layers\.0\.self_attn\.q_proj"),
        (r"act_fn$", TypeError, "nothing inside it is one"),
        (lambda name, module: False, ValueError, "matches the predicate <lambda>"),
    ],
)
def test_bad_targets(targets, error, text):
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(error, match=text):
        attach(model, LoRA, targets=targets)
    assert_same(before, snapshot(model))


def test_bad_hyperparameters_change_nothing():
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no hyperparameter 'rnk'.*did you mean 'rank'"):
        attach(model, LoRA, targets=r"q_proj$", rnk=2)
    with pytest.raises(ValueError, match=r"rank must be in \[1, 1024\], got 0"):
        attach(model, LoRA, targets=r"q_proj$", rank=0)
    # v_proj has 16 outputs here: the first host could take rank 20, the second cannot.
    with pytest.raises(ValueError, match=r"v_proj: rank must be at most 16 .* got 20 \(LoRA\)"):
        attach(model, LoRA, targets=r"(q|v)_proj$", rank=20)
    with pytest.raises(WRONG_TYPE):
        attach(model, nn.Linear, targets=r"q_proj$")
    with pytest.raises(WRONG_TYPE):
        attach(model, LoRA, targets=[3])
    assert_same(before, snapshot(model))


def test_attaching_twice_on_one_module_is_refused():
    model = tiny_llama()
    attach(model, LoRA, targets=r"q_proj$", rank=2)
    with pytest.raises(ValueError, match=r"q_proj already carries LoRA: `fold` or `detach` it first"):
        attach(model, LoRA, targets=r"(q|k)_proj$", rank=2)
    assert not isinstance(model.model.layers[0].self_attn.k_proj, LoRA)


def test_nothing_attached_is_said():
    for action in (fold, detach, adapter_weights):
        with pytest.raises(ValueError, match="LlamaForCausalLM carries no adapter"):
            action(tiny_llama())


def test_attached_through_another_root():
    model = tiny_llama()
    attach(model, LoRA, targets=r"q_proj$", rank=2)
    for action in (fold, detach):
        with pytest.raises(ValueError, match="through an outer model"):
            action(model.model)
    with pytest.raises(ValueError, match="through an outer model"):
        attach(model.model, LoRA, targets=r"k_proj$")
    detach(model)
    before = snapshot(model)
    attach(model.model, LoRA, targets=r"q_proj$", rank=2)
    with pytest.raises(ValueError, match="model was given to `attach` by itself"):
        attach(model, LoRA, targets=r"k_proj$")
    detach(model)
    assert_same(before, snapshot(model))


def test_torch_modules_that_bypass_their_layers():
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(TypeError, match=r"out_proj: nn\.MultiheadAttention reads its weight and never calls it"):
        attach(attention, LoRA, targets="out_proj", rank=2)
    # In evaluation without gradients nn.TransformerEncoderLayer has a fast path that calls no layer.
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = model(x)
        attach(model, LoRA, targets="linear1", rank=2)
        disturb(model, std=1.0)
        adapted = model(x)
    assert (adapted - plain).abs().max() > 1e-3
    torch.testing.assert_close(adapted, model(x))


def test_hosts_that_cannot_be_adapted():
    with pytest.raises(TypeError, match=r"LoRA sits on nn\.Linear or transformers' Conv1D, got Embedding"):
        LoRA(nn.Embedding(4, 4))
    with pytest.raises(TypeError, match="LazyLinear's is not initialised yet"):
        LoRA(nn.LazyLinear(4))
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"stored as torch\.int8"):
        LoRA(quantised)


def test_trainable_parameters_counts_by_module():
    model = MLP([8, 16, 4])
    attach(model, LoRA, targets=r"layers\.0", rank=2)
    model.layers[1].bias.requires_grad_(True)
    frame = trainable_parameters(model)
    assert frame.columns.tolist() == ["module", "adapter", "parameters", "share"]
    # LoRA: 2 x (8 + 16); all: 8 x 16 + 16 + 16 x 4 + 4 + 48.
    assert frame.values.tolist() == [["layers.0", "LoRA", 48, 48 / 260], ["layers.1", "", 4, 4 / 260]]


def test_adapter_weights_go_out_and_in():
    model = tiny_llama()
    attach(model, LoRA, targets=r"q_proj$", rank=2)
    disturb(model)
    weights, logits = adapter_weights(model), run(model, {"input_ids": IDS})
    assert sorted(weights) == [f"model.layers.{i}.self_attn.q_proj.{letter}" for i in (0, 1) for letter in "AB"]
    fresh = tiny_llama()
    attach(fresh, LoRA, targets=r"q_proj$", rank=2)
    load_adapter_weights(fresh, weights)
    assert torch.equal(run(fresh, {"input_ids": IDS}), logits)
    weights["model.layers.0.self_attn.q_proj.A"].zero_()
    assert torch.equal(run(model, {"input_ids": IDS}), logits)


def test_adapter_weights_that_do_not_fit_load_nothing():
    model = tiny_llama()
    attach(model, LoRA, targets=r"q_proj$", rank=2)
    before = adapter_weights(model)
    first, second, third, fourth = before
    bad = {
        first: torch.ones(2, 32),
        second: torch.ones(3, 3),
        "else": torch.ones(1),
        third: torch.full((2, 32), float("nan")),
    }
    with pytest.raises(ValueError) as caught:
        load_adapter_weights(model, bad)
    for text in (
        f"{fourth!r}: missing",
        "'else': no adapter",
        r"shape [32, 2] in the model, [3, 3] given",
        "NaN or Inf",
    ):
        assert text in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in adapter_weights(model).items())
    with pytest.raises(WRONG_TYPE):
        load_adapter_weights(model, before | {first: 1.0})


def test_an_adapters_own_modules_follow_the_hosts_mode():
    class Noisy(Adapter):
        def __init__(self, host):
            super().__init__(host)
            self.noise = nn.Dropout(0.5)

        def forward(self, x):
            return self.noise(self.host(x))

    model = MLP([4, 4]).eval()
    attach(model, Noisy, targets="layers")
    assert not model.layers[0].noise.training
    with pytest.raises(CannotFold, match=r"layers\.0: Noisy has no weight-space form"):
        fold(model)
    detach(model)
    model.train()
    attach(model, Noisy, targets="layers")
    assert model.layers[0].noise.training


def test_an_attached_model_survives_pickling(tmp_path):
    model = MLP([4, 4])
    attach(model, LoRA, targets="layers", rank=2)
    disturb(model)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(2, 4)
    assert torch.equal(again(x), model(x))
    assert torch.equal(detach(again)(x), detach(model)(x))


def test_parameters_live_where_the_host_lives():
    for adapter in (LoRA, ParallelBottleneck, SeriesBottleneck):
        module = adapter(nn.Linear(4, 4, device="meta", dtype=torch.float16), rank=2)
        own = [p for name, p in module.named_parameters() if not name.startswith("host.")]
        assert {(p.device.type, p.dtype) for p in own} == {("meta", torch.float16)}
