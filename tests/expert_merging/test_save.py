import copy
import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from notebook_kit.alignment import permutation_spec, permute, random_permutations
from notebook_kit.checkpoints import Checkpoint
from notebook_kit.expert_merging import expert_view, m_smoe, sub_moe
from notebook_kit.expert_merging.mapped_experts import shrink
from tests.expert_merging.moes import KINDS, ids, logits, moe, prepared


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_merged_model_survives_its_folder(kind, adaptive, tmp_path):
    model, trace, _ = prepared(kind)
    new = m_smoe(model, trace, n_experts=3, adaptive=adaptive)
    new.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(new)
    assert isinstance(again, type(model))
    assert torch.equal(logits(again), logits(new))
    assert [layer.expert_map for layer in expert_view(again)] == [layer.expert_map for layer in expert_view(new)]
    generated = again.generate(ids(n=1, length=5), max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, new.generate(ids(n=1, length=5), max_new_tokens=3, do_sample=False))
    # On disk there are as many experts as in memory, under the names of the architecture.
    down = ".w2.weight" if kind == "mixtral" else ".down_proj.weight"
    stored = [name for name in Checkpoint(tmp_path) if ".experts." in name and name.endswith(down)]
    if kind == "gpt_oss":  # keeps one tensor a layer in files too
        stored = [e for name, w in Checkpoint(tmp_path).items() if name.endswith(".experts.down_proj") for e in w]
    assert len(stored) == sum(len(layer) for layer in expert_view(new))


def test_layers_with_uneven_numbers_of_experts_come_back(tmp_path):
    model = moe()
    with torch.no_grad():
        # One expert takes nearly everything in the first layer, so that its budget goes to the second.
        model.model.layers[0].mlp.gate.weight[1:] *= 0.01
    from tests.expert_merging.moes import trace_of

    new = m_smoe(model, trace_of(model), n_experts=4, adaptive=True)
    counts = [len(layer) for layer in expert_view(new)]
    assert sum(counts) == 8
    assert counts[0] != counts[1]
    new.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(new))


def test_a_model_that_was_loaded_itself_can_be_merged_saved_and_loaded(tmp_path):
    model, trace, before = prepared()
    model.save_pretrained(tmp_path / "original")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    assert torch.equal(logits(loaded), before)
    new = m_smoe(loaded, trace, n_experts=2)
    new.save_pretrained(tmp_path / "merged", max_shard_size="40KB")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(new))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "mapped_mixtral"
    # The original's class and configuration know nothing of it.
    assert type(loaded).__name__ == "MixtralForCausalLM"
    assert loaded.config.model_type == "mixtral"
    assert not hasattr(loaded.config, "expert_map")


def test_a_merged_model_can_be_copied_trained_and_permuted():
    model, trace, _ = prepared()
    new = m_smoe(model, trace, n_experts=2)
    assert torch.equal(logits(copy.deepcopy(new)), logits(new))
    output = new(ids(), labels=ids(), output_router_logits=True)
    assert [logits.shape[1] for logits in output.router_logits] == [8, 8]
    output.loss.backward()
    assert all(layer.experts.down_proj.grad.abs().sum() > 0 for layer in expert_view(new))
    spec = permutation_spec(new)
    assert [perm for perm in spec.sizes if "experts" in perm] == [
        f"layers.{i}.experts.{e}" for i in range(2) for e in range(2)
    ]
    permuted = copy.deepcopy(new)
    permuted.load_state_dict(permute(spec, random_permutations(spec, 0, signs=True), new.state_dict()))
    assert (logits(permuted) - logits(new)).abs().max() < 1e-5


def test_bad_input_is_named():
    model = moe()
    with pytest.raises(ValueError, match=r"every stored expert 0\.\.2"):
        shrink(model.model.layers[0].mlp.experts, (0, 2, 2))
    from notebook_kit.expert_merging import mapped

    config = mapped.MappedMixtralConfig(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    with pytest.raises(ValueError, match="needs expert_map"):
        mapped.MappedMixtralForCausalLM(config)


@pytest.mark.parametrize("rank", [None, 8])
def test_a_folder_loads_in_programs_that_do_not_import_the_kit(rank, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "cache")
    from transformers.models.auto import configuration_auto, modeling_auto

    model, trace, _ = prepared()
    new = sub_moe(model, trace, n_experts=4, rank=rank)
    new.save_pretrained(tmp_path / "one")
    # Such a program's Auto classes have never heard of the model type.
    monkeypatch.delitem(configuration_auto.CONFIG_MAPPING._extra_content, new.config.model_type)
    monkeypatch.delitem(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, type(new.config))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one", trust_remote_code=False)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one", trust_remote_code=True)
    assert list((tmp_path / "cache").rglob("merged_experts.py"))  # it came by the file, not by what is registered here
    assert type(loaded) is type(new)
    assert torch.equal(logits(loaded), logits(new))
    loaded.save_pretrained(tmp_path / "two")
    assert [path.name for path in sorted((tmp_path / "two").glob("*.py"))] == ["merged_experts.py"]
    code = (tmp_path / "two" / "merged_experts.py").read_text("utf-8")
    assert code == (tmp_path / "one" / "merged_experts.py").read_text("utf-8")
    monkeypatch.undo()  # where the kit is imported, the file is not needed
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two")) is type(new)
