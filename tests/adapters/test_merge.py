"""merge_adapters: the weighted sum of the changes, and the best cut of it. Against peft: tests/parity."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from notebook_kit import checkpoints
from notebook_kit.adapters import (
    LoRA,
    adapter_on,
    adapter_weights,
    attach,
    fold,
    load_peft,
    merge_adapters,
    read_adapter,
    save_peft,
)
from notebook_kit.merging import average, dare, slerp, task_arithmetic, ties
from notebook_kit.models import MLP, tiny_gpt2, tiny_llama
from tests.adapters.conftest import IDS, disturb, run
from tests.untyped import untyped

SHAPES = {"q": (6, 5), "v": (4, 7)}


def adapter(rank=2, seed=0, modules=SHAPES, scaling=1.5):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (d_out, d_in) in modules.items():
        tensors[f"{name}.A"] = torch.randn(rank, d_in, generator=generator)
        tensors[f"{name}.B"] = torch.randn(d_out, rank, generator=generator)
    return tensors, scaling


def dense(source, name):
    tensors, scaling = source
    if f"{name}.A" not in tensors:
        return torch.zeros(SHAPES[name])
    return scaling * tensors[f"{name}.B"] @ tensors[f"{name}.A"]


def small_mlp():
    torch.manual_seed(0)
    return MLP([6, 6, 4]).eval()


def close(ours, expected, atol=1e-5):
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


def test_by_hand():
    """Two rank-1 adapters on one 2 x 2 weight; the factor-wise mean would be [[1, 1], [1, 1]] / 2."""
    first = {"w.A": torch.tensor([[1.0, 0.0]]), "w.B": torch.tensor([[1.0], [0.0]])}, 2.0
    second = {"w.A": torch.tensor([[0.0, 1.0]]), "w.B": torch.tensor([[0.0], [1.0]])}, 1.0
    merged = merge_adapters([first, second], [0.5, 0.5])
    close(merged.deltas()["w"], torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
    cut = merge_adapters([first, second], [0.5, 0.5], rank=1)
    close(cut.deltas()["w"], torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert cut.error == pytest.approx(0.5 / 1.25**0.5, abs=1e-6)
    assert cut.report.iloc[0].drop("missing").tolist() == pytest.approx(["w", 2, 1, 1.25**0.5, cut.error], abs=1e-6)
    assert repr(cut) == "MergedAdapter(1 modules, rank 1, error 0.45)"


@settings(deadline=None, max_examples=30)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    scaling=st.floats(0.1, 4),
)
def test_the_exact_sum_for_any_ranks_weights_and_scalings(ranks, weights, scaling):
    sources = [adapter(rank, seed=i, scaling=scaling + i) for i, rank in enumerate(ranks)]
    merged = merge_adapters(sources, weights[: len(ranks)])
    for name, delta in merged.deltas().items():
        close(delta, sum(w * dense(source, name) for w, source in zip(weights, sources, strict=False)), atol=2e-4)
    assert merged.error == 0


@settings(deadline=None, max_examples=20)
@given(rank=st.integers(1, 5))
def test_the_cut_is_the_best_of_its_rank_and_its_error_is_right(rank):
    sources = [adapter(3, seed=i) for i in range(3)]
    merged = merge_adapters(sources, [1.0, -0.5, 2.0], rank=rank)
    for row in merged.report.to_dict("records"):
        whole = sum(w * dense(source, row["module"]) for w, source in zip([1.0, -0.5, 2.0], sources, strict=True))
        lost = whole - merged.deltas()[row["module"]]
        best = torch.linalg.svdvals(whole)[rank:].norm()
        assert float(lost.norm()) == pytest.approx(float(best), abs=1e-4)
        assert row["error"] == pytest.approx(float(best / whole.norm()), abs=1e-5)
        assert row["rank"] == min(rank, row["rank_before"])


def test_one_adapter_at_weight_1_is_itself():
    source = adapter(3)
    for merged in (
        merge_adapters([source]),
        merge_adapters([source], method=task_arithmetic, scale=1.0),
        merge_adapters([source], method=partial(ties, density=1.0)),
        merge_adapters([source], method=ties, density=1.0, scope="tensor"),
        merge_adapters([source], method=average),
        merge_adapters([source], method=dare, density=1.0, scale=1.0),
        merge_adapters([source, source], [0.5, 0.5]),
        merge_adapters([source, source], method=slerp),
    ):
        for name, delta in merged.deltas().items():
            close(delta, dense(source, name))
            assert merged.factors[name][0].shape[1] == 3


def test_a_method_works_in_delta_space_and_sees_the_whole_model():
    """TIES takes its threshold over all modules: the result equals that on dense state dicts."""
    sources = [adapter(2, seed=i, scaling=1 + 2.0 * i) for i in range(3)]
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    experts = [{name: w * dense(s, name) for name in SHAPES} for w, s in zip([1, 0.5, -1], sources, strict=True)]
    merged = merge_adapters(sources, [1, 0.5, -1], method=ties, density=0.5)
    for name, tensor in ties(base, experts, density=0.5).items():
        close(merged.deltas()[name], tensor)
    cut = merge_adapters(sources, [1, 0.5, -1], rank=1, method=ties, density=0.5)
    assert cut.error > 0.05
    assert {left.shape[1] for left, _ in cut.factors.values()} == {1}


def test_other_targets_ranks_and_rslora_in_one_merge():
    models = [tiny_llama() for _ in range(2)]
    attach(models[0], LoRA, targets=r"(q|v)_proj$", rank=2, alpha=6, rslora=True)
    attach(models[1], LoRA, targets=r"(v|down)_proj$", rank=5, alpha=3)
    for i, model in enumerate(models):
        disturb(model, seed=i)
    merged = merge_adapters(models, [0.3, 0.7], names=["first", "second"])
    report = merged.report.set_index("module")
    assert set(report["missing"]) == {"", "first", "second"}
    assert report.loc["model.layers.0.mlp.down_proj", ["rank", "missing"]].tolist() == [5, "first"]
    assert report.loc["model.layers.0.self_attn.q_proj", ["rank", "missing"]].tolist() == [2, "second"]
    base = tiny_llama().state_dict()
    whole = merged.on(base)
    folded = [fold(model).state_dict() for model in models]
    for key, tensor in base.items():
        close(whole[key], tensor + 0.3 * (folded[0][key] - tensor) + 0.7 * (folded[1][key] - tensor))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, small_mlp])
def test_saved_and_loaded_gives_the_same_function(tmp_path, build):
    targets = {"LlamaForCausalLM": r"_proj$", "GPT2LMHeadModel": "c_(attn|fc|proj)$", "MLP": "layers"}
    folders, inputs = [], {"input_ids": IDS}
    for i, rank in enumerate((2, 3)):
        model = build()
        attach(model, LoRA, targets=targets.get(type(model).__name__, "c_"), rank=rank, alpha=1 + i, rslora=i == 0)
        disturb(model, seed=i, std=0.2)
        folders.append(save_peft(model, tmp_path / f"{i}"))
    if isinstance(build(), MLP):
        inputs = {"x": torch.linspace(-1, 1, 30).reshape(5, 6)}
    merged = merge_adapters(folders, [0.8, -0.4])
    saved, expected = build(), build()
    load_peft(saved, merged.save(tmp_path / "merged"))
    expected.load_state_dict(merged.on(expected.state_dict()))
    close(run(saved, inputs), run(expected, inputs))
    exact = adapter_on(build().state_dict(), folders[0])
    other = adapter_on(build().state_dict(), folders[1])
    for key, tensor in build().state_dict().items():
        if tensor.is_floating_point():
            wanted = tensor + 0.8 * (exact[key] - tensor) - 0.4 * (other[key] - tensor)
            close(expected.state_dict()[key], wanted)
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert not config["use_rslora"]
    assert [row["missing"] for row in merged.rows] == [""] * len(merged.rows)
    assert read_adapter(tmp_path / "merged").label == "merged"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_formats_are_summed_in_float32_and_rounded_once(dtype):
    tensors, scaling = adapter(2)
    half = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    merged = merge_adapters([(half, scaling)] * 2, [0.5, 0.5])
    wide = {key: tensor.float() for key, tensor in half.items()}
    for name, delta in merged.deltas().items():
        close(delta, dense((wide, scaling), name))
    base = {f"{name}.weight": torch.randn(shape).to(dtype) for name, shape in SHAPES.items()} | {"n": torch.tensor(3)}
    result = merged.on(base)
    assert torch.equal(result["n"], base["n"])
    for name in SHAPES:
        expected = (base[f"{name}.weight"].float() + dense((wide, scaling), name)).to(dtype)
        torch.testing.assert_close(result[f"{name}.weight"], expected)


def test_inputs_stay_as_they_are():
    sources = [adapter(2, seed=i) for i in range(2)]
    copies = [{key: tensor.clone() for key, tensor in tensors.items()} for tensors, _ in sources]
    merge_adapters(sources, [2.0, -1.0], rank=1)
    for (tensors, _), copy in zip(sources, copies, strict=True):
        assert all(torch.equal(tensors[key], copy[key]) for key in copy)


def test_a_sum_of_zero():
    merged = merge_adapters([adapter(2), adapter(2)], [1.0, -1.0])
    assert all(float(delta.abs().max()) < 1e-6 for delta in merged.deltas().values())
    nothing = merge_adapters([adapter(2)], [0.0])
    assert nothing.error == 0
    assert nothing.report["rank_before"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: merge_adapters([]), ValueError, "at least one adapter"),
        (lambda: merge_adapters("folder"), TypeError, r"write \[adapter\]"),
        (lambda: merge_adapters([adapter()[0]]), TypeError, r"give \(tensors, alpha / rank\)"),
        (lambda: merge_adapters([3]), TypeError, "got int"),
        (lambda: merge_adapters([adapter()], rank=0), ValueError, "rank must be a whole number of at least 1"),
        (lambda: merge_adapters([adapter()], [1.0, 2.0]), ValueError, "one entry per expert, 1, got 2"),
        (lambda: merge_adapters([adapter()], density=0.5), TypeError, "density: only a `method` has"),
        (lambda: merge_adapters([adapter()], method=ties, density=2), ValueError, r"density must be in \[0, 1\]"),
        (lambda: merge_adapters([adapter()], names=["a", "b"]), ValueError, "names must have one entry"),
        (
            lambda: merge_adapters([adapter(), adapter(modules={"q": (6, 4)})], names=["a", "b"]),
            ValueError,
            "q is 6 x 4 in b but 6 x 5 in a",
        ),
        (lambda: merge_adapters([({"q.A": torch.ones(1, 2)}, 1.0)]), ValueError, "only one of A and B for q"),
        (lambda: merge_adapters([({"q.weight": torch.ones(1, 2)}, 1.0)]), ValueError, "not the A or B"),
        (lambda: merge_adapters([({}, 1.0)]), ValueError, "holds no tensor"),
        (lambda: merge_adapters([(adapter()[0], {"q": 1.0})]), ValueError, "no scaling is given for v"),
        (lambda: merge_adapters([(adapter()[0], float("nan"))]), ValueError, "NaN or Inf"),
        (
            lambda: merge_adapters([({"q.A": torch.ones(1, 2), "q.B": torch.ones(2, 2)}, 1.0)]),
            ValueError,
            "do not fit",
        ),
        (lambda: merge_adapters([MLP([2, 2])]), ValueError, "carries no adapter"),
        (lambda: merge_adapters([adapter()]).on({"k.weight": torch.ones(6, 5)}), ValueError, "near it: k.weight"),
        (lambda: merge_adapters([adapter()]).on({"q.weight": torch.ones(6, 4)}), ValueError, r"\[6, 5\] matrix, but"),
    ],
)
def test_what_does_not_fit_is_named(call, error, text):
    with untyped(), pytest.raises(error, match=text):
        call()


def test_folders_that_are_not_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        merge_adapters([tmp_path])
    model = tiny_llama()
    attach(model, LoRA, targets="q_proj$", rank=2)
    folder = save_peft(model, tmp_path / "a")
    with pytest.raises(FileExistsError, match="exists"):
        merge_adapters([folder]).save(folder)
    with pytest.raises(FileNotFoundError, match="no folder"):
        merge_adapters([folder]).save(tmp_path / "no" / "where")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(ValueError, match="says rank 3, but A has 2 rows"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora=True"):
        read_adapter(folder)


def test_tensors_in_pefts_names(tmp_path):
    model = tiny_llama()
    attach(model, LoRA, targets="q_proj$", rank=2, alpha=6)
    disturb(model)
    tensors = checkpoints.load(save_peft(model, tmp_path / "a") / "adapter_model.safetensors")
    for source in ((tensors, 3.0), (adapter_weights(model), 3.0), tmp_path / "a"):
        for name, delta in merge_adapters([source]).deltas().items():
            close(delta, merge_adapters([model]).deltas()[name])
