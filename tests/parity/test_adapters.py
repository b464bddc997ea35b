"""LoRA against peft: outputs, gradients, merged weights, and the folder format both ways."""

import warnings

import pytest
import torch
from torch import nn

from notebook_kit.adapters import LoRA, adapter_weights, attach, fold, load_peft, save_peft
from notebook_kit.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from tests.adapters.conftest import IDS, MODELS, disturb, run

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = {
    "llama": (tiny_llama, ["q_proj", "v_proj", "down_proj"]),
    "bert": (tiny_bert, ["query", "value"]),
    "vit": (tiny_vit, ["q_proj", "fc1"]),
    "t5": (tiny_t5, ["q", "v", "wo"]),
    "gpt2": (tiny_gpt2, ["c_attn", "mlp.c_fc"]),
}


def assert_equal_functions(ours, model, inputs):
    """To 1e-5 in float32, and to the last digits in float64: the same formula."""
    torch.testing.assert_close(run(ours, inputs), run(model, inputs), rtol=0, atol=1e-5)
    exact = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    torch.testing.assert_close(run(ours.double(), exact), run(model.double(), exact), rtol=0, atol=1e-11)


def theirs(name, **config):
    build, targets = CASES[name]
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=targets, **config))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_what_peft_saves(name, rslora, tmp_path):
    model = theirs(name, r=4, lora_alpha=6, use_rslora=rslora)
    inputs = MODELS[name][1]
    model.save_pretrained(tmp_path)
    ours = CASES[name][0]()
    load_peft(ours, tmp_path)
    assert_equal_functions(ours, model, inputs)
    folded, merged = fold(ours.float()), model.float().merge_and_unload()
    torch.testing.assert_close(run(folded, inputs), run(merged, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_what_we_save(name, rslora, tmp_path):
    build, inputs, targets = MODELS[name]
    ours = build()
    attach(ours, LoRA, targets=targets, rank=3, alpha=5, rslora=rslora)
    disturb(ours, std=0.2)
    save_peft(ours, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "adapter").eval()
    n_lora = sum("lora_A" in key for key, _ in loaded.named_parameters())
    assert n_lora == len(adapter_weights(ours)) // 2
    assert_equal_functions(ours, loaded, inputs)


def test_rank_and_alpha_patterns_both_ways(tmp_path):
    inputs = {"input_ids": IDS}
    patterns = {
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 3},
        "alpha_pattern": {"layers.1": 9, "v_proj": 5},
    }
    model = theirs("llama", r=4, lora_alpha=6, **patterns)
    model.save_pretrained(tmp_path / "theirs")
    ours = tiny_llama()
    load_peft(ours, tmp_path / "theirs")
    torch.testing.assert_close(run(ours, inputs), run(model, inputs), rtol=0, atol=1e-6)
    save_peft(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(run(back, inputs), run(model, inputs), rtol=0, atol=1e-6)


def test_plain_modules_with_a_name_that_ends_another(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.block = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})

        def forward(self, x):
            return self.block["fc"](self.fc(x).relu())

    ours, x = Net(), torch.randn(3, 4)
    attach(ours, LoRA, targets=r"^fc$", rank=2)
    disturb(ours)
    save_peft(ours, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "adapter")
    assert sum("lora_A" in key for key, _ in loaded.named_parameters()) == 1
    torch.testing.assert_close(loaded(x), ours(x), rtol=0, atol=1e-6)


def test_gradients_equal_pefts(tmp_path):
    model = theirs("llama", r=4, lora_alpha=6)
    model.save_pretrained(tmp_path)
    ours = tiny_llama()
    load_peft(ours, tmp_path)
    ours(input_ids=IDS, labels=IDS).loss.backward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {key: p.grad for key, p in ours.named_parameters() if p.grad is not None}
    expected = {
        key.removeprefix("base_model.model.").replace(".lora_", ".").replace(".default.weight", ""): p.grad
        for key, p in model.named_parameters()
        if p.grad is not None
    }
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)


def test_initial_values_have_pefts_distribution():
    ours, model = tiny_llama(hidden_size=128), tiny_llama(hidden_size=128)
    attach(ours, LoRA, targets=r"q_proj$", rank=64)
    model = peft.get_peft_model(model, peft.LoraConfig(r=64, target_modules=["q_proj"]))
    for letter in "AB":
        a = torch.cat([v.flatten() for k, v in adapter_weights(ours).items() if k.endswith(f".{letter}")])
        b = torch.cat([p.detach().flatten() for k, p in model.named_parameters() if f"lora_{letter}" in k])
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.05)
        assert a.abs().max().item() == pytest.approx(b.abs().max().item(), rel=0.02)
