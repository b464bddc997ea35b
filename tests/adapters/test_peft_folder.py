"""The peft format without peft: what is refused, and that nothing half-done stays. Equality with peft: tests/parity."""

import json

import pytest
import torch
from torch import nn

from notebook_kit import checkpoints
from notebook_kit.adapters import Adapter, LoRA, ParallelBottleneck, attach, load_peft, save_peft
from notebook_kit.models import MLP, tiny_llama
from tests.adapters.conftest import IDS, disturb, run


@pytest.fixture
def folder(tmp_path):
    model = tiny_llama()
    attach(model, LoRA, targets=r"q_proj$", rank=2, alpha=4)
    attach(model, LoRA, targets=r"\.0\..*v_proj$", rank=3, alpha=5)
    disturb(model)
    save_peft(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_round_trip(folder, tmp_path):
    model = tiny_llama()
    names = load_peft(model, folder)
    assert [(model.get_submodule(name).rank, model.get_submodule(name).alpha) for name in names] == [
        (2, 4),
        (3, 5),
        (2, 4),
    ]
    save_peft(model, tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").read_text() == (folder / "adapter_config.json").read_text()
    twin = tiny_llama()
    load_peft(twin, tmp_path / "again")
    assert torch.equal(run(twin, {"input_ids": IDS}), run(model, {"input_ids": IDS}))
    assert not torch.equal(run(twin, {"input_ids": IDS}), run(tiny_llama(), {"input_ids": IDS}))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"peft_type": "IA3"}, "describes 'IA3'"),
        ({"use_dora": True}, "use_dora=True, which LoRA here does not do"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": "two"}, "r='two', expected a number"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"alpha_pattern": {"(": 2}}, "no regular expression"),
        ({"rank_pattern": {}}, r"v_proj: A and B must be \(2, 32\) and \(16, 2\) \(rank 2\), got \(3, 32\)"),
    ],
)
def test_configurations_that_mean_something_else(folder, fields, text):
    edit(folder, **fields)
    model = tiny_llama()
    with pytest.raises(ValueError, match=text):
        load_peft(model, folder)
    assert not any(isinstance(module, Adapter) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_files_that_are_missing_damaged_or_pickled(folder):
    model = tiny_llama()
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-8])
    with pytest.raises(checkpoints.BadCheckpoint, match="truncated"):
        load_peft(model, folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        load_peft(model, folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(checkpoints.BadCheckpoint, match="is a pickle, which can run code"):
        load_peft(model, folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_peft(model, folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        load_peft(model, folder)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 2)},
            ValueError,
            "embeddings",
        ),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, ValueError, "not the A or B"),
        (lambda t: dict(list(t.items())[3:]), ValueError, "only one of A and B for model.layers.0.self_attn.v_proj"),
        (lambda t: {k.replace("layers.0", "layers.7"): v for k, v in t.items()}, ValueError, "near it"),
        (lambda t: {k: v * float("nan") for k, v in t.items()}, ValueError, "NaN or Inf"),
        (
            lambda t: {k.replace("self_attn.q_proj", "input_layernorm"): v for k, v in t.items()},
            TypeError,
            "LlamaRMSNorm",
        ),
        (lambda t: {}, ValueError, "holds no tensor"),
    ],
)
def test_tensors_that_do_not_fit(folder, change, error, text):
    path = folder / "adapter_model.safetensors"
    checkpoints.save(change(checkpoints.load(path)), path)
    model = tiny_llama()
    with pytest.raises(error, match=text):
        load_peft(model, folder)
    assert not any(isinstance(module, Adapter) for module in model.modules())


def test_what_the_format_cannot_hold(tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match="carries no adapter"):
        save_peft(model, tmp_path / "a")
    attach(model, LoRA, targets=r"q_proj$", rank=2)
    attach(model, LoRA, targets=r"k_proj$", rank=2, rslora=True)
    with pytest.raises(ValueError, match="one rslora for all modules"):
        save_peft(model, tmp_path / "a")
    attach(model, ParallelBottleneck, targets=r"v_proj$", rank=2)
    with pytest.raises(ValueError, match=r"holds LoRA only; .*v_proj carries ParallelBottleneck"):
        save_peft(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_and_interrupt(folder, tmp_path, monkeypatch):
    model = MLP([4, 4])
    attach(model, LoRA, targets="layers", rank=2)
    with pytest.raises(FileExistsError, match="exists"):
        save_peft(model, folder)
    with pytest.raises(FileNotFoundError, match="no folder"):
        save_peft(model, tmp_path / "no" / "where")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_peft(model, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_name_that_ends_another_name(tmp_path):
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "block": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    attach(model, LoRA, targets=r"^fc$", rank=1)
    save_peft(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == "fc"
