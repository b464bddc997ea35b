"""Merging on disk: the same result as in memory, little memory, and nothing half-written."""

import functools
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from notebook_kit.checkpoints import INDEX, BadCheckpoint, Checkpoint, load, save
from notebook_kit.merging import (
    IncompatibleWeights,
    average,
    dare,
    merge_files,
    selection,
    slerp,
    task_arithmetic,
    ties,
)
from tests.untyped import untyped

CASES = [
    (average, {"weights": [2.0, 1.0]}),
    (task_arithmetic, {"scale": 0.4}),
    (slerp, {"t": 0.3}),
    (slerp, {"t": 0.3, "scope": "model"}),
    (ties, {"density": 0.3}),
    (ties, {"density": 0.3, "scope": "tensor", "combine": "sum"}),
    (ties, {"density": 0.6, "elect": "count", "weights": [1.0, 0.5]}),
    (ties, {"density": 0.5, "elect": "none"}),
    (dare, {"density": 0.5, "seed": 3}),
    (dare, {"elect": "mass", "rescale": "norm"}),
]
every_case = pytest.mark.parametrize(
    ("method", "settings"), CASES, ids=[f"{m.__name__}-{'-'.join(map(str, s.values()))}" for m, s in CASES]
)


def model(seed, dtype=torch.float32, integers=False):
    g = torch.Generator().manual_seed(seed)
    shapes = {"b.weight": (6, 5), "a.bias": (7,), "scalar": (), "empty": (0, 2), "c": (40,)}
    if integers:
        weights = {key: torch.randint(-3, 4, shape, generator=g).to(dtype) for key, shape in shapes.items()}
    else:
        weights = {key: torch.randn(shape, generator=g).to(dtype) for key, shape in shapes.items()}
    return {**weights, "steps": torch.tensor([seed])}


def write(folder, weights, shards):
    """One file, or a folder with its shards, an index and a config."""
    if not shards:
        return save(weights, folder.with_suffix(".safetensors"))
    folder.mkdir()
    names, where = list(weights), {}
    for i in range(shards):
        file = f"model-{i + 1}-of-{shards}.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        save(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    (folder / "config.json").write_text('{"model_type": "toy"}')
    (folder / "tokenizer.model").write_bytes(b"\0\1")
    (folder / "optimizer.pt").write_bytes(b"large")
    return folder


def checkpoints_of(tmp_path, models, shards):
    return [write(tmp_path / f"m{i}", weights, shards) for i, weights in enumerate(models)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@every_case
@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("integers", [False, True])
def test_it_equals_the_merge_in_memory(method, settings, shards, integers, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "CHUNK", 16)  # several pieces a tensor
    base, *experts = models = [model(seed, integers=integers) for seed in range(3)]
    base_path, *expert_paths = checkpoints_of(tmp_path, models, shards)
    out = tmp_path / ("out" if shards else "out.safetensors")
    assert merge_files(method, base_path, expert_paths, out, progress=False, **settings) == out
    assert same(load(out), method(base, experts, **settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", [average, ties, dare])
def test_in_every_precision(method, dtype, tmp_path):
    base, *experts = models = [model(seed, dtype) for seed in range(3)]
    base_path, *expert_paths = checkpoints_of(tmp_path, models, 2)
    merge_files(method, base_path, expert_paths, tmp_path / "out", progress=False)
    assert same(load(tmp_path / "out"), method(base, experts))


def test_even_votes_and_tied_magnitudes_across_tensors(tmp_path):
    base = {"a": torch.zeros(4), "b": torch.zeros(6), "c": torch.zeros(2)}
    up = {"a": torch.tensor([2.0, 1, -1, 2]), "b": torch.tensor([-2.0, -2, -1, -1, -2, 2]), "c": torch.full((2,), -2.0)}
    down = {"a": -up["a"], "b": up["b"], "c": up["c"]}
    paths = checkpoints_of(tmp_path, [base, up, down], 0)
    for density in (0.25, 0.5, 0.75, 1.0):
        for scope in ("model", "tensor"):
            whole = ties(base, [up, down], density=density, scope=scope)
            merge_files(
                ties, paths[0], paths[1:], tmp_path / "o.safetensors", progress=False, density=density, scope=scope
            )
            assert same(load(tmp_path / "o.safetensors"), whole)
    assert whole["a"].tolist() == [-2, -1, -1, -2]  # negative majority: the even votes of `a` follow it


def test_a_folder_comes_out_as_the_base_is_cut(tmp_path):
    models = [model(seed) for seed in range(2)]
    base_path = write(tmp_path / "base", models[0], 3)
    expert_path = write(tmp_path / "expert", models[1], 2)  # cut in another way
    out = merge_files(average, base_path, [expert_path], tmp_path / "out", progress=False)
    assert {file.name for file in out.iterdir()} == {
        *(f"model-{i}-of-3.safetensors" for i in (1, 2, 3)),
        INDEX,
        "config.json",
        "tokenizer.model",
    }
    assert (out / "config.json").read_text() == '{"model_type": "toy"}'
    merged, base = Checkpoint(out), Checkpoint(base_path)
    assert all(merged.file_of(key).name == base.file_of(key).name for key in base)
    assert torch.equal(merged["c"], models[1]["c"])


def test_a_plain_function_can_be_the_method(tmp_path):
    def halve(base, experts):
        return {key: tensor / 2 for key, tensor in base.items()}

    paths = checkpoints_of(tmp_path, [{"w": torch.ones(2)}] * 2, 0)
    merge_files(halve, paths[0], paths[1:], tmp_path / "o.safetensors", progress=False)
    assert load(tmp_path / "o.safetensors")["w"].tolist() == [0.5, 0.5]


def test_a_function_that_only_shares_a_name_is_not_taken_for_the_method(tmp_path):
    def ties(base, experts):
        return {key: tensor + 1 for key, tensor in base.items()}

    paths = checkpoints_of(tmp_path, [{"w": torch.ones(2)}] * 2, 0)
    merge_files(ties, paths[0], paths[1:], tmp_path / "o.safetensors", progress=False)
    assert load(tmp_path / "o.safetensors")["w"].tolist() == [2, 2]
    with pytest.raises(TypeError, match=r"got a functools\.partial: give its hyperparameters to merge_files"):
        merge_files(functools.partial(ties), paths[0], paths[1:], tmp_path / "p.safetensors", progress=False)


# ---------------------------------------------------------------- refusals
@pytest.fixture
def files(tmp_path):
    return checkpoints_of(tmp_path, [model(seed) for seed in range(3)], 0)


@pytest.fixture
def folders(tmp_path):
    return checkpoints_of(tmp_path, [model(seed) for seed in range(3)], 2)


def listing(tmp_path):
    return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_an_output_that_would_overwrite_is_refused(files, tmp_path):
    folder = write(tmp_path / "folder", model(5), 2)
    before = listing(tmp_path)
    for base, experts, out in (
        (files[0], files[1:], files[0]),
        (files[0], files[1:], files[2]),
        (files[0], files[1:], tmp_path / "." / files[1].name),
        (files[0], [files[1], folder], folder / "model-1-of-2.safetensors"),
    ):
        with pytest.raises(FileExistsError, match="is one of the inputs"):
            merge_files(average, base, experts, out, progress=False)
    with pytest.raises(FileExistsError, match="is one of the inputs"):
        merge_files(average, folder, [folder], folder, progress=False)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists; give a folder that does not"):
        merge_files(average, folder, [folder], tmp_path / "there", progress=False)
    with pytest.raises(FileExistsError, match="is a folder; base is a file"):
        merge_files(average, files[0], files[1:], tmp_path / "there", progress=False)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere to write x\.safetensors in"):
        merge_files(average, files[0], files[1:], tmp_path / "nowhere" / "x.safetensors", progress=False)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "text", "method", "settings"),
    [
        (ValueError, r"density must be in \[0, 1\], got 2 \(ties\)", ties, {"density": 2}),
        (TypeError, "unexpected keyword argument 'densty'", ties, {"densty": 0.2}),
        (ValueError, "slerp needs exactly two experts, got 3", slerp, {"scope": "model"}),
        (ValueError, "slerp needs exactly two experts, got 3", slerp, {}),
        (ValueError, "one entry per expert, 3, got 1", ties, {"weights": [1.0]}),
    ],
)
def test_bad_settings_write_nothing(error, text, method, settings, files, tmp_path):
    before = listing(tmp_path)
    with pytest.raises(error, match=text):
        merge_files(method, files[0], [*files[1:], files[1]], tmp_path / "o.safetensors", progress=False, **settings)
    assert listing(tmp_path) == before


def test_bad_checkpoints_write_nothing(files, tmp_path):
    other = save({**model(1), "c": torch.zeros(41)}, tmp_path / "other.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(files[0].read_bytes()[:-3])
    nan = save({**model(1), "c": torch.full((40,), float("nan"))}, tmp_path / "nan.safetensors")
    before = listing(tmp_path)
    out = tmp_path / "o.safetensors"
    with pytest.raises(IncompatibleWeights, match=r"'c': shape \[40\] in base, \[41\] in .*other\.safetensors"):
        merge_files(average, files[0], [files[1], other], out, progress=False)
    with pytest.raises(BadCheckpoint, match="truncated"):
        merge_files(average, files[0], [broken], out, progress=False)
    for method in (average, ties, dare):
        with pytest.raises(ValueError, match=r"tensor 'c' of experts\[1\] holds NaN"):
            merge_files(method, files[0], [files[1], nan], out, progress=False)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        merge_files(average, files[0], [tmp_path / "gone"], out, progress=False)
    with pytest.raises(ValueError, match="at least one"):
        merge_files(average, files[0], [], out, progress=False)
    with untyped(), pytest.raises(TypeError, match=r"must be a sequence of paths, got .*; write \['"):
        merge_files(average, str(files[0]), str(files[1]), out, progress=False)
    assert listing(tmp_path) == before


# ---------------------------------------------------------------- interrupts
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("kind", ["files", "folders"])
def test_an_interrupt_leaves_nothing_and_keeps_what_was_there(error, kind, request, tmp_path):
    base_path, *expert_paths = request.getfixturevalue(kind)
    out = tmp_path / ("out.safetensors" if kind == "files" else "out")
    if kind == "files":
        save({"precious": torch.ones(3)}, out)
    before = listing(tmp_path)
    done = []

    def interrupted(base, experts):
        done.append(next(iter(base)))
        if len(done) == 4:
            assert any(".partial" in str(path) for path in tmp_path.iterdir())
            raise error
        return base

    with pytest.raises(error):
        merge_files(interrupted, base_path, expert_paths, out, progress=False)
    assert len(done) == 4
    assert listing(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if ".partial" in path.name]


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (average, {}),
        (task_arithmetic, {}),
        (slerp, {"scope": "model"}),
        (ties, {"density": 0.2}),
        (dare, {"elect": "mass"}),
    ],
)
def test_no_more_than_a_tensor_of_each_model_is_read_at_a_time(method, settings, tmp_path, monkeypatch):
    """Bytes read from files are bytearrays, which tracemalloc sees."""
    size, tensors = 50_000, 8
    models = [{f"t{i}": torch.randn(size) for i in range(tensors)} for _ in range(3)]
    base_path, *expert_paths = checkpoints_of(tmp_path, models, 2)
    del models
    merge_files(method, base_path, expert_paths, tmp_path / "warm", progress=False, **settings)
    tracemalloc.start()
    merge_files(method, base_path, expert_paths, tmp_path / "out", progress=False, **settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = 4 * size
    assert peak < 1.2 * 3 * largest + 200_000
    assert peak > 2 * largest  # the measure does see the tensors


MEASURE = """
import sys, torch
torch.set_num_threads(1)
from notebook_kit.merging import average, dare, merge_files, save, task_arithmetic, ties

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

*paths, out = sys.argv[1:]
methods = [average, task_arithmetic, ties, dare]
small = save({"w": torch.randn(100)}, out + "small")
for method in methods:  # first use imports
    merge_files(method, small, [small], out + "warm", progress=False)
for i, method in enumerate(methods):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    merge_files(method, paths[0], paths[1:], f"{out}{i}", progress=False)
    print(method.__name__, status("VmHWM") - before)
# Looking a method up must not cost the seconds that transformers takes to load.
assert "transformers" not in sys.modules
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel keeps the high-water mark")
def test_peak_memory_of_the_process(tmp_path):
    """Below three times the largest tensor times the number of models, torch's own buffers included."""
    size, tensors, experts = 3_000_000, 3, 3  # bfloat16, as real checkpoints: float32 beside it would be twice as much
    models = [{f"t{j}": torch.randn(size).bfloat16() for j in range(tensors)} for _ in range(experts + 1)]
    paths = checkpoints_of(tmp_path, models, 2)
    # With a fixed threshold, glibc gives a freed tensor back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", MEASURE, *paths, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for line in done.stdout.splitlines():
        name, extra = line.split()
        assert 2 * 2 * size < int(extra) < 3 * (2 * size) * (experts + 1), name
    assert len(done.stdout.splitlines()) == 4


def test_a_method_that_makes_no_single_model_is_refused(tmp_path):
    from notebook_kit.merging import save, tall_masks

    for name in ("base", "expert"):
        save(
            {"w": torch.randn(3, generator=torch.Generator().manual_seed(len(name)))}, tmp_path / f"{name}.safetensors"
        )
    paths = (tmp_path / "base.safetensors", [tmp_path / "expert.safetensors"], tmp_path / "out.safetensors")
    with pytest.raises(TypeError, match="tall_masks makes MaskedExperts, not one model"):
        merge_files(tall_masks, *paths, progress=False)
    assert not paths[2].exists()
