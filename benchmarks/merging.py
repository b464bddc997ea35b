"""TIES beside mergekit, peft and fusion_bench on the same tensors, and the memory of `merge_files`.

python benchmarks/merging.py [millions of parameters] [rounds]

CPU time on one thread, alternating runs in one process, so that a busy machine slows all alike. Extra peak memory of
each in a process of its own (Linux). A peer that cannot be imported is named and left out.
"""

import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from notebook_kit.merging import average, dare, merge_files, save, slerp, task_arithmetic, ties

EXPERTS = 3
DENSITY = 0.2
TARGETS = {"mergekit": 4.0, "peft": 4.0, "fusion_bench": 3.0}
# mergekit and peft trim each tensor, fusion_bench the whole model: each is met on its own ground.
SCOPES = {"mergekit": "tensor", "peft": "tensor", "fusion_bench": "model"}


def tensors(millions: float, dtype: torch.dtype = torch.float32) -> tuple[dict, list[dict]]:
    """A base and its experts: six matrices, the largest a third of the model."""
    g = torch.Generator().manual_seed(0)
    shares = [6, 4, 3, 2, 2, 1]
    rows = [max(1, round(millions * 1e6 * share / sum(shares) / 1000)) for share in shares]
    base = {f"layers.{i}.weight": torch.randn(n, 1000, generator=g).to(dtype) for i, n in enumerate(rows)}
    draw = lambda tensor: (tensor + 0.01 * torch.randn(tensor.shape, generator=g)).to(dtype)  # noqa: E731
    return base, [{key: draw(tensor) for key, tensor in base.items()} for _ in range(EXPERTS)]


# ---------------------------------------------------------------- the functions compared
def ours(scope: str):
    return lambda base, experts: ties(base, experts, density=DENSITY, scope=scope)


def mergekit():
    module = importlib.import_module("mergekit.merge_methods.generalized_task_arithmetic")
    method = module.GeneralizedTaskArithmeticMerge(
        consensus_method=module.ConsensusMethod.sum,
        sparsification_method=module.SparsificationMethod.magnitude,
        default_normalize=True,
        default_rescale=False,
        method_name="ties",
        method_pretty_name=None,
        method_reference_url=None,
    )
    options = {
        "weight": dict.fromkeys(range(EXPERTS), 1.0),
        "density": dict.fromkeys(range(EXPERTS), DENSITY),
        "int8_mask": False,
        "normalize": True,
        "rescale": False,
        "lambda": 1.0,
    }

    def merge(base, experts):
        merged = {}
        for key, theta in base.items():
            entries = [SimpleNamespace(id=i, tensor=expert[key]) for i, expert in enumerate(experts)]
            group = SimpleNamespace(base=SimpleNamespace(tensor=theta), non_base=entries)
            merged[key] = method.merge_group(group, **options)
        return merged

    return merge


def peft():
    module = importlib.import_module("peft.utils.merge_utils")

    def merge(base, experts):
        ones = torch.ones(len(experts))
        return {
            key: theta + module.ties([expert[key] - theta for expert in experts], ones, density=DENSITY)
            for key, theta in base.items()
        }

    return merge


def fusion_bench():
    module = importlib.import_module("fusion_bench.method.ties_merging.ties_merging_utils")

    def merge(base, experts):
        flat = module.state_dict_to_vector(base)
        taus = torch.vstack([module.state_dict_to_vector(expert) for expert in experts]) - flat
        with contextlib.redirect_stdout(None):
            merged = flat + module.ties_merging(taus, reset_thresh=DENSITY, merge_func="dis-mean")
        return module.vector_to_state_dict(merged, base)

    return merge


PEERS = {"mergekit": mergekit, "peft": peft, "fusion_bench": fusion_bench}


def function(name: str):
    """A compared function by its name; ours is "ours, tensor" or "ours, model"."""
    return ours(name.split(", ")[1]) if name.startswith("ours") else PEERS[name]()


# ---------------------------------------------------------------- measures
def seconds(merge, base, experts) -> float:
    started = time.process_time()
    merge(base, experts)
    return time.process_time() - started


def difference(one: dict, other: dict) -> tuple[float, int]:
    """The largest difference, and how many entries differ by more than rounding."""
    gaps = [(one[key] - other[key]).abs() for key in one]
    return max(float(gap.max()) for gap in gaps), sum(int((gap > 1e-6).sum()) for gap in gaps)


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def extra_memory(work, warm_up) -> int:
    """Peak of this process during `work`, over what it held before."""
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def child(*words: object) -> float:
    """A measure in a fresh process; freed memory goes back at once, so that the peak is what was in use."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, __file__, "child", *map(str, words)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def memory_of_function(name: str, millions: float) -> int:
    torch.set_num_threads(1)
    merge, inputs, small = function(name), tensors(millions), tensors(0.01)
    return extra_memory(lambda: merge(*inputs), lambda: merge(*small))


def memory_of_files(name: str, folder: str) -> int:
    torch.set_num_threads(1)
    method = {"average": average, "task_arithmetic": task_arithmetic, "slerp": slerp, "ties": ties, "dare": dare}[name]
    paths = [Path(folder) / f"m{i}" for i in range(3 if name == "slerp" else EXPERTS + 1)]
    small = save({"w": torch.randn(100)}, Path(folder) / "small.safetensors")
    outs = iter(Path(folder) / f"{name}-{os.getpid()}-{i}" for i in range(2))
    return extra_memory(
        lambda: merge_files(method, paths[0], paths[1:], next(outs), progress=False),
        lambda: merge_files(method, small, [small, small], next(outs), progress=False),
    )


# ---------------------------------------------------------------- the report
def compare(millions: float, rounds: int) -> None:
    base, experts = tensors(millions)
    found = {}
    for name, make in PEERS.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name:>13}: left out, {error}")
    times = {name: [] for name in ("ours, tensor", "ours, model", *found)}
    for _ in range(rounds):
        for name, taken in times.items():
            taken.append(seconds(found.get(name) or function(name), base, experts))
    memory = {name: child("function", name, millions) for name in times}
    print(f"\nties, {EXPERTS} experts x {millions:g}M float32, density {DENSITY}: CPU seconds, median of {rounds}")
    for name, taken in times.items():
        print(f"{name:>13}: {statistics.median(taken):6.2f} s, extra memory {memory[name] / 2**30:.2f} GiB")
    for name, peer in found.items():
        mine = f"ours, {SCOPES[name]}"
        ratio = statistics.median(a / b for a, b in zip(times[name], times[mine], strict=True))
        largest, differ = difference(function(mine)(base, experts), peer(base, experts))
        verdict = "met" if ratio >= TARGETS[name] else "MISSED"
        print(f"against {name}: {ratio:.1f} times as fast, target {TARGETS[name]:g}: {verdict};", end=" ")
        print(f"largest difference {largest:.1e}, {differ} entries (equal at the edge) above 1e-6")
    if found:
        leanest = min(memory[name] for name in found)
        heaviest = max(memory["ours, tensor"], memory["ours, model"])
        verdict = "met" if heaviest <= leanest else "MISSED"
        print(f"extra memory over the leanest peer's: {heaviest / leanest:.2f}: {verdict}")


def files(millions: float) -> None:
    print("\nmerge_files, sharded: extra peak memory in units of largest tensor x number of models; target below 3")
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as folder:
            base, experts = tensors(millions, dtype)
            for i, weights in enumerate((base, *experts)):
                part = Path(folder) / f"m{i}"
                part.mkdir()
                for j, key in enumerate(weights):
                    save({key: weights[key]}, part / f"model-{j}.safetensors")
            largest = max(tensor.nbytes for tensor in base.values())
            del base, experts
            for name in ("average", "task_arithmetic", "slerp", "ties", "dare"):
                models = 3 if name == "slerp" else EXPERTS + 1
                share = child("files", name, folder) / (largest * models)
                print(f"{name:>15} {str(dtype)[6:]:>8}: {share:.2f}: {'met' if share < 3 else 'MISSED'}")


def main() -> None:
    torch.set_num_threads(1)
    millions = float(sys.argv[1]) if len(sys.argv) > 1 else 50
    compare(millions, int(sys.argv[2]) if len(sys.argv) > 2 else 3)
    files(min(millions, 20))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        kind, *rest = sys.argv[2:]
        print(memory_of_function(rest[0], float(rest[1])) if kind == "function" else memory_of_files(*rest))
    else:
        main()
