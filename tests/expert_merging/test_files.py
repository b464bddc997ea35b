"""Merging on disk: the same as in memory, with less than one layer's experts in memory."""

import itertools
import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from notebook_kit.checkpoints import INDEX, Checkpoint, TensorWriter
from notebook_kit.expert_merging import average_experts, expert_view, files, hc_smoe, m_smoe, sub_moe
from notebook_kit.expert_merging.disk import FILES
from notebook_kit.expert_merging.files import merge_expert_files
from notebook_kit.routing import record_routing
from tests.expert_merging.moes import ids, logits, moe

IN_MEMORY = {"m_smoe": m_smoe, "average_experts": average_experts, "hc_smoe": hc_smoe, "sub_moe": sub_moe}


def saved(folder: Path, kind="mixtral", size="60KB"):
    model = moe(kind)
    model.save_pretrained(folder, max_shard_size=size)
    return model


def in_memory(model, text, method="m_smoe", **options):
    with torch.no_grad(), record_routing(model) as trace:
        for part in text.split(8):
            model(part)
    return IN_MEMORY[method](model, trace, **options)


@pytest.mark.parametrize("kind", FILES)
def test_the_result_equals_the_method_in_memory(kind, tmp_path):
    model, text = saved(tmp_path / "model", kind), ids(n=19)
    assert len(Checkpoint(tmp_path / "model").files) > 3
    layers = merge_expert_files(tmp_path / "model", tmp_path / "out", text, n_experts=3, progress=False)
    expected = in_memory(model, text, n_experts=3)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(found) is type(expected)
    assert found.config.expert_map == expected.config.expert_map
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
    assert (logits(found) - logits(expected)).abs().max() < 1e-5
    generated = found.generate(ids(n=1, length=4), max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 7)
    assert [layer.name for layer in layers] == [layer.name for layer in expert_view(model)]
    assert sum(layer.bytes[1] for layer in layers) * 8 == sum(layer.bytes[0] for layer in layers) * 3
    for number, layer in enumerate(layers):
        assert list(layer.plan.expert_map) == expected.config.expert_map[str(number)]
        assert layer.usage.sum().item() == pytest.approx(1)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert set(index["weight_map"]) == set(Checkpoint(tmp_path / "out"))
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for name, t in Checkpoint(tmp_path / "out").items() if name in index["weight_map"]
    )


@pytest.mark.parametrize("method", ["average_experts", "hc_smoe", "sub_moe"])
def test_other_methods_too(method, tmp_path):
    model, text = saved(tmp_path / "model"), ids(n=8)
    options = {} if method == "average_experts" else {"align": True}
    merge_expert_files(tmp_path / "model", tmp_path / "out", text, method=method, n_experts=3, progress=False)
    expected = in_memory(model, text, method, n_experts=3, **options)
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - logits(expected)).abs().max() < 1e-4


@pytest.mark.parametrize("method", ["m_smoe", "average_experts", "sub_moe"])
def test_layers_may_keep_different_numbers(method, tmp_path):
    model, text = moe("mixtral"), ids(n=8)
    with torch.no_grad():  # one layer's experts alike, and seldom used but for one
        layer = expert_view(model)[0]
        layer.write(
            *(part[:1].expand_as(part) * (1 + 0.1 * torch.rand(8, 1, 1)) for part in (layer.gate, layer.up, layer.down))
        )
        layer.router_module.weight[:2] *= 8
    model.save_pretrained(tmp_path / "model")
    options = {"n_experts": 3, "adaptive": True}
    merged = merge_expert_files(tmp_path / "model", tmp_path / "out", text, method=method, progress=False, **options)
    if method == "sub_moe":
        options["align"] = True
    expected = in_memory(model, text, method, **options)
    counts = [len(layer.plan.groups) for layer in merged]
    assert sum(counts) == 3 * len(counts)
    assert len(set(counts)) > 1
    assert counts == [len(layer) for layer in expert_view(expected)]
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) - logits(expected)).abs().max() < 1e-4


def test_all_kept_is_the_identity_and_half_precision_stays(tmp_path):
    model = moe().bfloat16()
    model.save_pretrained(tmp_path / "model")
    merge_expert_files(tmp_path / "model", tmp_path / "out", ids(), n_experts=8, chunk=3, progress=False)
    old, new = Checkpoint(tmp_path / "model"), Checkpoint(tmp_path / "out")
    assert set(old) == set(new)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert new.spec() == {name: old.spec()[name] for name in new}


def large_checkpoint(folder: Path, layers=3, d=512, f=1024) -> int:
    """A sharded Mixtral of 160 MB, written layer by layer: never whole in memory either."""
    config = MixtralConfig(
        hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, num_local_experts=8, tie_word_embeddings=False, sliding_window=None,
    )  # fmt: skip
    folder.mkdir()
    config.save_pretrained(folder)
    generator, total, weight_map = torch.Generator().manual_seed(0), 0, {}
    shapes = {f"self_attn.{name}_proj.weight": (d if name in "qo" else d // 2, d) for name in "qkvo"}
    shapes |= {"block_sparse_moe.gate.weight": (8, d), "input_layernorm.weight": (d,)}
    shapes |= {"post_attention_layernorm.weight": (d,)}
    for e in range(8):
        names = {"w1": (f, d), "w2": (d, f), "w3": (f, d)}
        shapes |= {f"block_sparse_moe.experts.{e}.{name}.weight": shape for name, shape in names.items()}
    for number in range(layers + 1):
        spec = {f"model.layers.{number}.{name}": (shape, torch.float32) for name, shape in shapes.items()}
        if number == layers:
            spec = {"model.embed_tokens.weight": ((256, d), torch.float32), "lm_head.weight": ((256, d), torch.float32)}
            spec |= {"model.norm.weight": ((d,), torch.float32)}
        file = f"model-{number:05d}.safetensors"
        with TensorWriter(folder / file, spec) as writer:
            for name, (shape, _) in spec.items():
                tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) / d**0.5
                writer.write(name, tensor)
                total += tensor.nbytes
        weight_map |= dict.fromkeys(spec, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def largest_footprint(call) -> int:
    """The most bytes that tensors and Python's buffers held at a time: counted, so the same on every machine."""
    tracemalloc.start()
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        call()
    buffers = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    changes = (e for e in profiler.kineto_results.events() if e.name() == "[memory]")
    held = itertools.accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns()))
    return max(held) + buffers


@pytest.mark.parametrize("method", ["m_smoe", "sub_moe"])
def test_merging_takes_less_memory_than_one_layer_of_experts(method, tmp_path):
    total = large_checkpoint(tmp_path / "model")
    text = ids(n=8, length=64)
    options = {"method": method, "n_experts": 6, "progress": False}
    held = largest_footprint(lambda: merge_expert_files(tmp_path / "model", tmp_path / "out", text, **options))
    expert = 3 * 512 * 1024 * 4
    assert total > 3 * 8 * expert
    # 0.48 and 0.67 of a layer, with hidden states, embeddings and attention; the whole model would be 3.2.
    assert 2 * expert < held < 8 * expert, f"{held / expert:.2f} experts of 8 in a layer"
    assert sum(t.nbytes for t in Checkpoint(tmp_path / "out").values()) < 0.8 * total


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    saved(tmp_path / "model")
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    real = files._evidence
    monkeypatch.setattr(files, "_evidence", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_expert_files(tmp_path / "model", tmp_path / "out", ids(), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bad_input_is_named(tmp_path):
    saved(tmp_path / "model")
    saved(tmp_path / "deepseek", "deepseek_v3")
    go = {"ids": ids(), "progress": False}
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        merge_expert_files(tmp_path, tmp_path / "out", **go)
    with pytest.raises(ValueError, match="holds a deepseek_v3; known on disk are mixtral"):
        merge_expert_files(tmp_path / "deepseek", tmp_path / "out", **go)
    with pytest.raises(ValueError, match=r"n_experts must be in \[1, 8\], got 9"):
        merge_expert_files(tmp_path / "model", tmp_path / "out", n_experts=9, **go)
    with pytest.raises(ValueError, match="adaptive goes with m_smoe"):
        merge_expert_files(tmp_path / "model", tmp_path / "out", method="hc_smoe", adaptive=True, **go)
    with pytest.raises(ValueError, match="method must be one of"):
        merge_expert_files(tmp_path / "model", tmp_path / "out", method="drop", **go)
    with pytest.raises(ValueError, match="text is empty"):
        merge_expert_files(tmp_path / "model", tmp_path / "out", ids()[:0])
    with pytest.raises(FileExistsError, match="exists"):
        merge_expert_files(tmp_path / "model", tmp_path / "deepseek", **go)
    with pytest.raises(FileNotFoundError, match="no folder"):
        merge_expert_files(tmp_path / "model", tmp_path / "nowhere" / "out", **go)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised"):
        merge_expert_files(tmp_path / "model", tmp_path / "out", **go)
    assert not (tmp_path / "out").exists()
