"""Recipes and `notebook-kit merge`: the same tensors as in memory, plans, refusals. Against mergekit: tests/parity."""

import json
import re

import pytest
import torch
import yaml

from notebook_kit import merging
from notebook_kit.adapters import LoRA, adapter_on, attach, save_peft
from notebook_kit.checkpoints import INDEX, Checkpoint
from notebook_kit.diagnostics.merges import known_merges, needs_no_data
from notebook_kit.jupyter.cli import main
from notebook_kit.jupyter.merge import Plan, merge_recipe, plan_merge, run_merge
from notebook_kit.jupyter.recipe_help import RECIPES
from notebook_kit.jupyter.recipes import read_recipe
from notebook_kit.models import tiny_llama
from notebook_kit.weights import IncompatibleWeights, load, save
from tests.adapters.conftest import disturb
from tests.untyped import untyped


@pytest.fixture
def folder(tmp_path):
    """base and two experts as folders, a LoRA folder on base."""
    tiny_llama().save_pretrained(tmp_path / "base")
    for i, name in enumerate("ab"):
        model, generator = tiny_llama(), torch.Generator().manual_seed(i)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(tmp_path / name)
    model = tiny_llama()
    attach(model, LoRA, targets=r"q_proj$", rank=2)
    disturb(model)
    save_peft(model, tmp_path / "lora")
    return tmp_path


def toml(folder, text, name="recipe.toml"):
    (folder / name).write_text(text)
    return folder / name


BASIC = 'method = "ties"\nbase = "base"\nexperts = ["a", "b"]\nout = "merged"\n'


def same(ours, expected):
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(ours[key], tensor), key


def weights_of(folder):
    return load(folder / "base"), [load(folder / name) for name in "ab"]


# ---------------------------------------------------------------- the merge
@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("ties", {"density": 0.5, "scale": 0.8, "weights": [0.7, 0.3]}),
        ("average", {"weights": [3, 1]}),
        ("slerp", {"t": 0.25, "scope": "model"}),
        ("dare", {"density": 0.4, "seed": 3}),
        ("pcb", {}),
        ("isotropic", {}),
    ],
)
def test_a_recipe_gives_what_the_function_gives(folder, method, values):
    body = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    text = BASIC.replace("ties", method) + f"[hyperparameters]\n{body}"
    out = merge_recipe(toml(folder, text), progress=False)
    base, experts = weights_of(folder)
    same(load(out), getattr(merging, method)(base, experts, **values))


def test_every_method_that_needs_no_data_streams_to_the_same_tensors(tmp_path):
    shapes = {"embed": (9, 6), "w": (8, 6), "b": (8,)}
    base = {key: torch.randn(shape) for key, shape in shapes.items()} | {"n": torch.tensor(3)}
    experts = [{k: t + 0.1 * torch.randn(t.shape) if k != "n" else t for k, t in base.items()} for _ in range(2)]
    for name, weights in zip(("base", "a", "b"), (base, *experts), strict=True):
        save(weights, tmp_path / name)
    tried = 0
    for name, method in known_merges().items():
        if not needs_no_data(method) or name == "doge":  # hundreds of steps
            continue
        expected = method(base, experts)
        if isinstance(expected, dict):
            recipe = read_recipe(toml(tmp_path, BASIC.replace("ties", name)), tmp_path / f"out-{name}")
            same(load(run_merge(recipe, progress=False)), expected)
            tried += 1
    assert tried >= 5


def test_the_folder_written_is_a_model_and_says_how_it_was_made(folder):
    from transformers import AutoModelForCausalLM

    out = merge_recipe(toml(folder, BASIC), progress=False)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "merge_recipe.toml",
        "model.safetensors",
    ]
    assert (out / "merge_recipe.toml").read_text() == BASIC
    same(AutoModelForCausalLM.from_pretrained(out).state_dict(), load(out))


def test_a_lora_folder_is_an_expert(folder):
    text = 'method = "task_arithmetic"\nbase = "base"\nexperts = ["a", "lora"]\n[hyperparameters]\nscale = 0.5\n'
    out = merge_recipe(toml(folder, text), out=folder / "out", progress=False)
    base, (a, _) = weights_of(folder)
    expected = merging.task_arithmetic(base, [a, adapter_on(base, folder / "lora")], scale=0.5)
    same(load(out), expected)


def test_data_is_read_from_files(folder):
    base, experts = weights_of(folder)
    fishers = [{key: torch.rand(tensor.shape) for key, tensor in base.items()} for _ in experts]
    for i, fisher in enumerate(fishers):
        save(fisher, folder / f"fisher{i}.safetensors")
    text = BASIC.replace("ties", "fisher") + '[arguments]\nfishers = ["fisher0.safetensors", "fisher1.safetensors"]\n'
    same(load(merge_recipe(toml(folder, text), progress=False)), merging.fisher(base, experts, fishers=fishers))


def test_single_files_shards_and_dtype(folder):
    base, (a, b) = weights_of(folder)
    extra = {"steps": torch.tensor(3), "empty": torch.empty(0)}
    for name, weights in (("base", base), ("a", a), ("b", b)):
        save(weights | extra, folder / f"{name}.safetensors")
    text = 'method = "average"\nbase = "base.safetensors"\nexperts = ["a.safetensors", "b.safetensors"]\n'
    out = merge_recipe(toml(folder, text), out=folder / "m.safetensors", progress=False)
    same(load(out), merging.average(base | extra, [a | extra, b | extra]))
    half = merge_recipe(toml(folder, 'dtype = "bfloat16"\n' + text), out=folder / "h.safetensors", progress=False)
    expected = merging.average(base, [a, b])
    same(
        load(half),
        {key: tensor.bfloat16() for key, tensor in expected.items()} | extra | {"empty": torch.empty(0).bfloat16()},
    )


def test_shards_stay_shards_and_index_and_config_stay_true(folder):
    for name in ("base", "a", "b"):
        model = tiny_llama(seed="ba".find(name[0]) + 2)
        model.save_pretrained(folder / f"s-{name}", max_shard_size="60KB")
    text = 'method = "average"\nbase = "s-base"\nexperts = ["s-a", "s-b"]\ndtype = "float16"\n'
    out = merge_recipe(toml(folder, text), out=folder / "sharded", progress=False)
    index = json.loads((out / INDEX).read_text())
    assert len(Checkpoint(out).files) > 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in load(out).values())
    config = json.loads((out / "config.json").read_text())
    assert {config.get("dtype"), config.get("torch_dtype")} - {None} == {"float16"}
    assert {tensor.dtype for tensor in load(out).values()} == {torch.float16}


def test_an_error_or_interrupt_leaves_nothing(folder, monkeypatch):
    recipe = read_recipe(toml(folder, BASIC))
    before = sorted(folder.iterdir())

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("notebook_kit.jupyter.merge._merge_one", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_merge(recipe, progress=False)
    assert sorted(folder.iterdir()) == before


# ---------------------------------------------------------------- the plan
def test_a_plan_counts_and_writes_nothing(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with untyped():  # a check of types reads what it checks
        plan = merge_recipe(toml(folder, BASIC), dry_run=True)
        half = plan_merge(read_recipe(toml(folder, 'dtype = "float16"\n' + BASIC)))
        once = plan_merge(read_recipe(toml(folder, BASIC.replace("ties", "average"))))
    before[folder / "recipe.toml"] = (folder / "recipe.toml").stat().st_mtime_ns
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    base = load(folder / "base")
    size = sum(tensor.nbytes for tensor in base.values())
    assert plan.bytes_written == size
    assert plan.bytes_read >= 2 * 3 * size  # ties sees the whole model before it merges one tensor
    assert plan.problems == ()
    assert plan.seconds > 0
    largest = max(tensor.numel() for tensor in base.values())
    assert plan.peak_bytes >= 3 * 4 * largest
    text = str(plan)
    assert "method    ties()" in text
    assert f"tensors   {len(base)} merged, 0 copied from base" in text
    assert half.bytes_written == size // 2
    assert once.bytes_read == 3 * size


def test_a_plan_lists_what_does_not_fit(folder, capsys):
    tiny_llama(intermediate_size=48).save_pretrained(folder / "b")
    recipe = toml(folder, BASIC)
    plan = merge_recipe(recipe, dry_run=True)
    assert isinstance(plan, Plan)
    assert len(plan.problems) == 6
    assert "model.layers.0.mlp.down_proj.weight: shape [32, 64] in base, [32, 48] in experts[1] (b)" in str(plan)
    assert "not measured" in str(plan)
    assert main(["merge", str(recipe), "--dry-run"]) == 2
    assert "problem   " in capsys.readouterr().out
    with pytest.raises(IncompatibleWeights, match=r"6 of 21 tensors cannot be merged(.|\n)*and 1 more"):
        merge_recipe(recipe, progress=False)
    assert not (folder / "merged").exists()


def test_a_plan_says_what_the_method_would_refuse(folder):
    text = BASIC.replace('["a", "b"]', '["a"]').replace("ties", "slerp")
    assert plan_merge(read_recipe(toml(folder, text))).problems == ("slerp needs exactly two experts, got 1",)
    (folder / "merged").mkdir()
    assert "exists" in plan_merge(read_recipe(toml(folder, BASIC))).problems[0]


# ---------------------------------------------------------------- the command
def test_from_the_command_line(folder, capsys):
    recipe = toml(folder, BASIC)
    assert main(["merge", str(recipe), "--dry-run"]) == 0
    assert "time      about" in capsys.readouterr().out
    assert main(["merge", str(recipe)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(folder / "merged")
    assert "merging with ties: 100%" in said.err
    assert main(["merge", str(recipe)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["merge", str(recipe), "--out", str(folder / "other")]) == 0
    assert main(["merge", str(folder / "no.toml")]) == 2
    assert "no recipe at" in capsys.readouterr().err


def test_help_shows_a_recipe_that_is_one(folder, capsys):
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    assert RECIPES.splitlines()[0] in capsys.readouterr().out
    block = re.search(r"\n\n((?:  .*\n|\n)+?)\nA \.yml", RECIPES)[1]
    text = "\n".join(line[2:] for line in block.splitlines())
    text = text[: text.index("[arguments]")].replace("models/", "")
    recipe = read_recipe(toml(folder, text))
    assert (recipe.method, recipe.values["weights"], recipe.write_as) == ("ties", [0.7, 0.3], torch.bfloat16)


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("method = ", ValueError, "recipe.toml: Invalid"),
        (BASIC + 'metod = "x"', ValueError, "unknown key 'metod'; did you mean 'method'"),
        (BASIC.replace('method = "ties"', ""), ValueError, "method is missing"),
        (BASIC.replace('"base"', "3"), ValueError, "base is missing, or no text"),
        (BASIC.replace('["a", "b"]', "[1]"), ValueError, "experts must be a list of paths"),
        (BASIC.replace("ties", "tise"), ValueError, "'tise' is none of the kit's; near it: ties"),
        (BASIC.replace('"b"]', '"c"]'), FileNotFoundError, r"experts\[1\]: nothing at 'c'"),
        (BASIC + "[hyperparameters]\ndensity = 2\n", ValueError, r"density must be in \[0, 1\], got 2 \(ties\)"),
        (BASIC + "[hyperparameters]\ndensty = 0.2\n", ValueError, "no argument 'densty'; did you mean 'density'"),
        (BASIC + '[arguments]\nweights = "no"\n', FileNotFoundError, "arguments.weights: nothing at 'no'"),
        (BASIC + "[arguments]\nweights = [1, 2]\n", ValueError, r"numbers go under \[hyperparameters\]"),
        (BASIC.replace("ties", "fisher"), ValueError, "fisher needs fishers: files go under"),
        (BASIC + 'dtype = "int8"', ValueError, "dtype must be one of float32"),
        (BASIC.replace('"merged"', "3"), ValueError, "out must be a path, got 3"),
    ],
)
def test_recipes_that_are_wrong(folder, text, error, match):
    if "dtype" in text or "metod" in text:
        text = "\n".join(sorted(text.splitlines(), key=lambda line: line.startswith("[")))
    with pytest.raises(error, match=match):
        read_recipe(toml(folder, text))


def test_recipes_of_another_kind(folder):
    with pytest.raises(ValueError, match=r"a recipe is a \.toml file"):
        read_recipe(toml(folder, "", "recipe.json"))
    with pytest.raises(ValueError, match="names no `out`: give --out"):
        run_merge(read_recipe(toml(folder, BASIC.replace('out = "merged"', ""))))
    with pytest.raises(ValueError, match="not a YAML file"):
        read_recipe(toml(folder, "a: [", "recipe.yml"))
    with pytest.raises(ValueError, match="expected mergekit's keys, got list"):
        read_recipe(toml(folder, "- a", "recipe.yml"))
    with pytest.raises(ValueError, match="could not determine a constructor"):
        read_recipe(toml(folder, "a: !!python/object/apply:os.getcwd []", "recipe.yml"))


def config(**changes):
    models = [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": 0.5}}]
    return {"merge_method": "ties", "base_model": "base", "models": models} | changes


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"slices": []}, "slices: layers cannot"),
        ({"modules": {}}, "modules: "),
        ({"tokenizer_source": "union"}, "tokenizer_source: vocabularies"),
        ({"tokenizer": {}}, "tokenizer: vocabularies"),
        ({"chat_template": "auto"}, "chat_template: "),
        ({"surprise": 1}, "surprise: not a key"),
        ({"merge_method": "nearswap"}, "merge_method: 'nearswap' is not one that both have"),
        ({"merge_method": "nuslerp", "models": [{"model": "a"}]}, "models: nuslerp joins two models besides the base"),
        (
            {
                "merge_method": "nuslerp",
                "models": [{"model": name, "parameters": {"weight": 1}} for name in "ab"],
                "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
            },
            "parameters.nuslerp_row_wise: an angle for each column",
        ),
        ({"models": None}, "models: expected a list"),
        ({"models": ["a"]}, r"models\[0\]: expected `model: path`"),
        ({"models": [{"model": "a", "layer_range": [0, 1]}]}, r"models\[0\].layer_range: not a key"),
        ({"models": [{"model": "a"}]}, "parameters.weight: a has none, and there is none for all"),
        ({"models": [{"model": "base"}]}, "models: ties needs a model besides the base"),
        ({"base_model": None}, "base_model: ties needs one"),
        ({"base_model": 3}, "base_model: expected a path"),
        ({"parameters": {"density": [0.1, 0.9]}}, "parameters.density: a list is a gradient over layers"),
        (
            {"parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 1}]}},
            "parameters.weight: a value for each filter",
        ),
        ({"parameters": {"weight": {"filter": "mlp", "value": 0.5}}}, "parameters.weight: a value for each filter"),
        ({"parameters": {"density": "much"}}, "parameters.density: expected a number, got 'much'"),
        ({"parameters": {"dens": 1}}, "parameters.dens: not a parameter"),
        ({"parameters": 3}, "parameters: expected names to numbers"),
        ({"merge_method": "slerp"}, "parameters.t: slerp needs it"),
        (
            {"merge_method": "slerp", "parameters": {"t": 0.5}},
            "models: slerp joins the base and one other model, got 3",
        ),
        ({"merge_method": "model_stock", "models": [{"model": "a"}]}, "models: model_stock needs two models"),
        ({"dtype": "int4"}, "dtype must be one of"),
        (
            {"models": [{"model": "a+lora", "parameters": {"weight": 1}}]},
            "models: 'a\\+lora' puts an adapter on another model",
        ),
    ],
)
def test_what_mergekits_yaml_says_and_we_cannot_do_is_named(folder, changes, match):
    with pytest.raises(ValueError, match=f"recipe.yml: {match}"):
        read_recipe(toml(folder, yaml.safe_dump(config(**changes)), "recipe.yml"))


def test_notes_say_what_is_ignored(folder):
    parameters = {"int8_mask": True, "t": 0.5, "density": "5e-1"}
    recipe = read_recipe(toml(folder, yaml.safe_dump(config(parameters=parameters)), "recipe.yaml"))
    assert recipe.values["density"] == [0.5, 0.5]
    assert [note.split(":")[0] for note in recipe.notes] == [
        "parameters.int8_mask is ignored",
        "parameters.t is ignored",
    ]
    random = read_recipe(toml(folder, yaml.safe_dump(config(merge_method="dare_ties", parameters=parameters)), "r.yml"))
    assert any("other random numbers than mergekit's" in note for note in random.notes)


def test_della_refuses_a_window_outside_0_and_1(folder):
    path = toml(folder, yaml.safe_dump(config(merge_method="della", parameters={"density": 0.9})), "recipe.yml")
    assert "density ± epsilon must stay" in merge_recipe(path, dry_run=True).problems[0]


def test_random_merges_repeat_themselves(folder):
    for method in ("dare_linear", "dare_ties", "della", "della_linear"):
        text = yaml.safe_dump(config(merge_method=method, parameters={"density": 0.5}))
        path = toml(folder, text, "recipe.yml")
        first, second = (merge_recipe(path, out=folder / f"{method}{i}", progress=False) for i in range(2))
        same(load(first), load(second))
