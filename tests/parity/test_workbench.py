"""The workbench against peft and mergekit: sums of adapters in outputs, recipes in the tensors they write."""

import math
import warnings

import pytest
import torch
import yaml

from notebook_kit.adapters import adapter_on, load_peft, merge_adapters
from notebook_kit.diagnostics.merges import factorwise, factorwise_error
from notebook_kit.jupyter.merge import merge_recipe
from notebook_kit.merging import ties
from notebook_kit.models import tiny_gpt2, tiny_llama
from notebook_kit.weights import load
from tests.adapters.conftest import IDS, run

pytestmark = pytest.mark.filterwarnings("ignore")
INPUTS = {"input_ids": IDS}


# ---------------------------------------------------------------- peft
@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def adapter_folder(peft, folder, seed, build=tiny_llama, targets=("q_proj", "v_proj"), **config):
    """A folder that peft saved, with random factors."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(targets)} | config
    model = peft.get_peft_model(build(), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(folder)
    return folder


def by_peft(peft, folders, weights, build=tiny_llama, **options):
    """A model of peft's with the combination active."""
    model = peft.PeftModel.from_pretrained(build(), folders[0], adapter_name="0")
    for i, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=str(i))
    model.add_weighted_adapter([str(i) for i in range(len(folders))], weights, "sum", **options)
    model.set_adapter("sum")
    return model.eval()


def deltas_of(model, adapter="sum"):
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight") and adapter in module.lora_A:
            found[name] = module.get_delta_weight(adapter).detach()
    return found


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.3, -0.7]])
def test_the_sum_equals_pefts_exact_ways(peft, tmp_path, build, weights):
    targets = ["c_attn", "c_fc"] if build is tiny_gpt2 else ["q_proj", "down_proj"]
    settings = {"build": build, "targets": targets}
    folders = [adapter_folder(peft, tmp_path / "0", 0, r=4, **settings)]
    folders.append(adapter_folder(peft, tmp_path / "1", 1, r=3, lora_alpha=9, use_rslora=True, **settings))
    merged = merge_adapters(folders, weights)
    theirs = by_peft(peft, folders, weights, build, combination_type="cat")
    ours = build()
    load_peft(ours, merged.save(tmp_path / "sum"))
    torch.testing.assert_close(run(ours, INPUTS), run(theirs, INPUTS), rtol=0, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "sum").eval()
    torch.testing.assert_close(run(loaded, INPUTS), run(theirs, INPUTS), rtol=0, atol=1e-5)
    folded = build()
    folded.load_state_dict(merged.on(folded.state_dict()))
    torch.testing.assert_close(run(folded, INPUTS), run(theirs, INPUTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_cut_equals_pefts_svd(peft, tmp_path, rank):
    folders = [adapter_folder(peft, tmp_path / str(i), i) for i in range(2)]
    theirs = deltas_of(by_peft(peft, folders, [0.5, 0.5], combination_type="svd", svd_rank=rank))
    ours = merge_adapters(folders, [0.5, 0.5], rank=rank)
    for name, delta in ours.deltas().items():
        torch.testing.assert_close(delta, theirs[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_in_delta_space_is_pefts_ties_svd(peft, tmp_path, density):
    folders = [adapter_folder(peft, tmp_path / str(i), i) for i in range(3)]
    theirs = deltas_of(by_peft(peft, folders, [1.0] * 3, combination_type="ties_svd", density=density, svd_rank=6))
    ours = merge_adapters(folders, rank=6, method=ties, density=density, scope="tensor")
    for name, delta in ours.deltas().items():
        torch.testing.assert_close(delta, theirs[name], rtol=0, atol=1e-5)


def test_pefts_linear_is_the_factorwise_sum_and_about_100_percent_off(peft, tmp_path):
    """Random adapters, weights 1/2 and 1/2: the error is as large as the truth."""
    folders = [adapter_folder(peft, tmp_path / str(i), i, targets=["q_proj", "o_proj"]) for i in range(2)]
    theirs = deltas_of(by_peft(peft, folders, [0.5, 0.5], combination_type="linear"))
    exact = merge_adapters(folders, [0.5, 0.5]).deltas()
    table = factorwise_error(folders, [0.5, 0.5]).set_index("module")
    for name, (left, right) in factorwise(folders, [0.5, 0.5]).items():
        torch.testing.assert_close(left @ right, theirs[name], rtol=0, atol=1e-6)
        error = float((theirs[name] - exact[name]).norm() / exact[name].norm())
        assert table.loc[name, "error"] == pytest.approx(error, abs=1e-5)
        assert 0.8 < error < 1.2
    assert 0.95 < table["error"].mean() < 1.05


def test_one_rslora_adapter_at_weight_1_comes_back_twice_too_large_from_peft(peft, tmp_path):
    folder = adapter_folder(peft, tmp_path / "0", 0, use_rslora=True)
    theirs = deltas_of(by_peft(peft, [folder], [1.0], combination_type="linear"))
    one = deltas_of(peft.PeftModel.from_pretrained(tiny_llama(), folder, adapter_name="sum"))
    ours = merge_adapters([folder]).deltas()
    for name, delta in theirs.items():
        torch.testing.assert_close(delta, 2 * one[name], rtol=0, atol=1e-5)  # √rank = 2
        torch.testing.assert_close(ours[name], one[name], rtol=0, atol=1e-5)
    table = factorwise_error([folder])
    assert table["scale"].tolist() == pytest.approx([2.0] * len(table), abs=1e-5)


def test_copies_at_weight_1_over_k_come_back_k_times_too_large_from_peft(peft, tmp_path):
    folder = adapter_folder(peft, tmp_path / "0", 0)
    theirs = deltas_of(by_peft(peft, [folder] * 3, [1 / 3] * 3, combination_type="linear"))
    for name, delta in merge_adapters([folder] * 3, [1 / 3] * 3).deltas().items():
        torch.testing.assert_close(theirs[name], 3 * delta, rtol=0, atol=1e-5)


def test_an_adapter_as_full_weights_is_pefts_merge_and_unload(peft, tmp_path):
    for build, targets in ((tiny_llama, ["q_proj", "down_proj"]), (tiny_gpt2, ["c_attn", "c_proj"])):
        folder = adapter_folder(peft, tmp_path / build.__name__, 0, build=build, targets=targets)
        theirs = peft.PeftModel.from_pretrained(build(), folder).merge_and_unload().state_dict()
        for key, tensor in adapter_on(build().state_dict(), folder).items():
            torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- mergekit
@pytest.fixture(scope="module")
def mergekit():
    pytest.importorskip("mergekit")
    import mergekit.config
    import mergekit.merge

    return mergekit


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three fine-tunes of it, as folders."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llama().save_pretrained(folder / "base")
    for i, name in enumerate("abc"):
        model, generator = tiny_llama(), torch.Generator().manual_seed(i)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)
    return folder


def both(mergekit, models, tmp_path, config):
    """The tensors that mergekit writes, and those that we write."""
    text = yaml.safe_dump(config).replace("@", f"{models}/")
    options = mergekit.merge.MergeOptions(
        copy_tokenizer=False, write_model_card=False, quiet=True, lora_merge_cache=str(tmp_path / "cache")
    )
    parsed = mergekit.config.MergeConfiguration.model_validate(yaml.safe_load(text))
    mergekit.merge.run_merge(parsed, str(tmp_path / "theirs"), options)
    (tmp_path / "recipe.yml").write_text(text)
    merge_recipe(tmp_path / "recipe.yml", out=tmp_path / "ours", progress=False)
    return load(tmp_path / "theirs"), load(tmp_path / "ours")


def close(theirs, ours, atol=1e-5):
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=atol)


def with_models(method, *entries, base="@base", **parameters):
    models = [{"model": f"@{name}", "parameters": values} for name, values in entries]
    config = {"merge_method": method, "models": models, "parameters": parameters}
    return config | ({"base_model": base} if base else {})


A, B, C = (("a", {"weight": 0.5}), ("b", {"weight": 1.0}), ("c", {"weight": 0.25}))
D1, D2 = ("a", {"weight": 0.5, "density": 0.3}), ("b", {"weight": 1.2, "density": 0.8})
DROPPED = [("a", {"weight": 0.6}), ("c", {"weight": 0.9})]
RECIPES = {
    "linear": with_models("linear", A, B, C, base=None),
    "linear, sum, base among them": with_models("linear", ("base", {"weight": -0.5}), A, B, normalize=False),
    "slerp": with_models("slerp", ("base", {}), ("a", {}), t=0.3),
    "slerp, base not listed": with_models("slerp", ("a", {}), t=0.8),
    "nuslerp": with_models("nuslerp", A, B, base=None),
    "nuslerp of task vectors": with_models("nuslerp", A, B),
    "nuslerp of task vectors, by row": with_models("nuslerp", A, B, nuslerp_flatten=False),
    "task_arithmetic": with_models("task_arithmetic", A, B, **{"lambda": 0.7}),
    "task_arithmetic, normalized": with_models("task_arithmetic", A, B, C, normalize=True),
    "ties": with_models("ties", D1, D2, C, int8_mask=True),
    "ties, sum": with_models("ties", D1, D2, normalize=False, **{"lambda": 0.5}),
    "ties, shared density, negative weight": with_models("ties", ("a", {"weight": -0.4}), B, density=0.01),
    "ties, rescaled": with_models("ties", D1, D2, rescale=True),
    "dare_linear at density 1": with_models("dare_linear", *DROPPED),
    "dare_ties at density 1": with_models("dare_ties", *DROPPED, normalize=True),
    "breadcrumbs": with_models("breadcrumbs", D1, D2, gamma=0.05),
    "breadcrumbs, own gammas": with_models("breadcrumbs", ("a", {"weight": 1, "gamma": 0.2}), B, density=0.6),
    "breadcrumbs_ties": with_models("breadcrumbs_ties", D1, D2, C, rescale=True),
    "della at density 1": with_models("della", *DROPPED),
    "della_linear at density 1": with_models("della_linear", *DROPPED, normalize=True, **{"lambda": 1.1}),
    "model_stock": with_models("model_stock", ("a", {}), ("b", {}), ("c", {})),
    "model_stock, by row": with_models("model_stock", ("a", {}), ("b", {}), filter_wise=True),
    "sce": with_models("sce", ("a", {}), ("b", {}), ("c", {}), select_topk=0.4),
    "sce, all": with_models("sce", ("a", {}), ("b", {})),
    "karcher": with_models("karcher", ("a", {}), ("b", {}), ("c", {}), base=None),
    "karcher, base among them": with_models("karcher", ("a", {}), ("b", {}), max_iter=3, tol="1e-6"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_mergekits_tensors(mergekit, models, tmp_path, name):
    close(*both(mergekit, models, tmp_path, RECIPES[name]))


@pytest.mark.parametrize(
    ("method", "dtypes"),
    [
        ("linear", {"dtype": "bfloat16"}),
        ("task_arithmetic", {"dtype": "bfloat16"}),
        ("ties", {"dtype": "float32", "out_dtype": "float16"}),
    ],
)
def test_dtypes(mergekit, models, tmp_path, method, dtypes):
    """In bfloat16 mergekit rounds after every step, the kit once: a few last digits apart, and votes may turn."""
    config = with_models(method, A, B, base=None if method == "linear" else "@base") | dtypes
    theirs, ours = both(mergekit, models, tmp_path, config)
    close(theirs, ours, atol=0.03 if dtypes["dtype"] == "bfloat16" else 1e-3)


def test_random_masks_have_mergekits_distribution(monkeypatch):
    """With the same random numbers, the same entries stay and the rest is rescaled alike."""
    sparsify = pytest.importorskip("mergekit.sparsify")
    from notebook_kit.jupyter.sparse_sum import sparse_sum

    torch.manual_seed(0)
    tau = torch.randn(12, 30)
    base, expert = {"w": torch.zeros(12, 30)}, {"w": tau}
    draw = torch.rand(12, 30)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: draw)
    monkeypatch.setattr(torch, "bernoulli", lambda p, **_: (draw < p).to(p.dtype))
    common = {"weights": [1.0], "density": [0.4], "rescale": True}
    theirs = sparsify.bernoulli(tau, 0.4, rescale_norm=sparsify.RescaleNorm.l1)
    torch.testing.assert_close(sparse_sum(base, [expert], sparsify="random", **common)["w"], theirs)
    theirs = sparsify.della_magprune(tau, 0.4, 0.2, rescale_norm=sparsify.RescaleNorm.l1)
    torch.testing.assert_close(sparse_sum(base, [expert], sparsify="rank", epsilon=[0.2], **common)["w"], theirs)


def test_an_adapter_in_a_recipe_is_mergekits(mergekit, peft, models, tmp_path):
    adapter_folder(peft, tmp_path / "lora", 3, targets=["q_proj", "down_proj"], base_model_name_or_path=None)
    config = with_models("task_arithmetic", A, (f"base+{tmp_path}/lora", {"weight": 0.4}))
    close(*both(mergekit, models, tmp_path, config))


def test_the_trap_in_numbers():
    """For two random rank-1 adapters with perpendicular factors the error is exactly 1 and the scale 1 too."""
    e = torch.eye(4)
    adapters = [({"w.A": e[i : i + 1], "w.B": e[:, i : i + 1]}, 1.0) for i in range(2)]
    row = factorwise_error(adapters, [0.5, 0.5]).iloc[0]
    assert row["error"] == pytest.approx(1.0, abs=1e-6)
    assert row["scale"] == pytest.approx(1.0, abs=1e-6)
    assert row["norm"] == pytest.approx(math.sqrt(0.5), abs=1e-6)
