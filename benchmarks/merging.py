"""Each data-free merge beside mergekit, peft and fusion_bench on the same tensors, and the memory of `merge_files`.

python benchmarks/merging.py [millions of parameters] [rounds] [method ...]

CPU time on one thread, alternating runs in one process, so that a busy machine slows all alike. Extra peak memory of
each in a process of its own (Linux), result included. A peer that cannot be imported is named and left out. Target: as
fast as the fastest peer that has the method, in no more memory than the leanest; for TIES 4 times mergekit and peft and
3 times fusion_bench. Who has which method, and how each is called: merge_peers.py.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from merge_peers import EXPERTS, METHODS, RANDOM

from notebook_kit.merging import average, dare, merge_files, save, slerp, task_arithmetic, ties

TARGETS = {"ties, tensor": {"mergekit": 4.0, "peft": 4.0}, "ties, model": {"fusion_bench": 3.0}}


def tensors(millions: float, dtype: torch.dtype = torch.float32) -> tuple[dict, list[dict]]:
    """A base and its experts: six matrices, the largest a third of the model."""
    g = torch.Generator().manual_seed(0)
    shares = [6, 4, 3, 2, 2, 1]
    rows = [max(1, round(millions * 1e6 * share / sum(shares) / 1000)) for share in shares]
    base = {f"layers.{i}.weight": torch.randn(n, 1000, generator=g).to(dtype) for i, n in enumerate(rows)}

    def draw(tensor):
        return (tensor + 0.01 * torch.randn(tensor.shape, generator=g)).to(dtype)

    return base, [{key: draw(tensor) for key, tensor in base.items()} for _ in range(EXPERTS)]


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


def memory_of_function(method: str, who: str, millions: float) -> int:
    torch.set_num_threads(1)
    merge, inputs, small = METHODS[method][who](), tensors(millions), tensors(0.01)
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
def available() -> set[str]:
    found = {"ours"}
    for peer in ("mergekit", "peft", "fusion_bench"):
        try:
            importlib.import_module(peer)
            found.add(peer)
        except ImportError as error:
            print(f"{peer}: left out, {error}")
    return found


def compare(methods: list[str], millions: float, rounds: int) -> None:
    base, experts = tensors(millions)
    there = available()
    print(f"{EXPERTS} experts x {millions:g}M float32; CPU seconds, median of {rounds}; extra memory in GiB")
    for method in methods:
        functions = {who: make() for who, make in METHODS[method].items() if who in there}
        if "ours" not in functions:
            print(f"{method:>17}: not in the kit")
            continue
        for merge in functions.values():  # first use imports
            merge(*tensors(0.01))
        times = {who: [] for who in functions}
        for _ in range(rounds):
            for who, merge in functions.items():
                times[who].append(seconds(merge, base, experts))
        memory = {who: child("function", method, who, millions) for who in functions}
        parts = [f"{who} {statistics.median(times[who]):.2f} s {memory[who] / 2**30:.3f}" for who in functions]
        print(f"{method:>17}: {'; '.join(parts)}")
        verdict(method, functions, times, memory, base, experts)


def verdict(method: str, functions: dict, times: dict, memory: dict, base: dict, experts: list) -> None:
    peers = [who for who in functions if who != "ours"]
    if not peers:
        print(f"{'':>19}no peer has it here")
        return
    ratio = {who: statistics.median(a / b for a, b in zip(times[who], times["ours"], strict=True)) for who in peers}
    worst = min(ratio[who] / TARGETS.get(method, {}).get(who, 1.0) for who in peers)
    speed = "met" if worst >= 1 else "level, within 5 %" if worst >= 0.95 else "MISSED"
    share = memory["ours"] / min(memory[who] for who in peers)
    words = ", ".join(f"{ratio[who]:.2f} times as fast as {who}" for who in peers)
    print(f"{'':>19}{words}: {speed};", end=" ")
    print(f"memory {share:.2f} of the leanest peer's: {'met' if share <= 1.005 else 'MISSED'}")
    if method not in RANDOM:
        mine = functions["ours"](base, experts)
        for who in peers:
            largest, differ = difference(mine, functions[who](base, experts))
            print(f"{'':>19}from {who}: largest difference {largest:.0e}, {differ} entries above 1e-6")


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
    methods = sys.argv[3:]
    compare(methods or list(METHODS), millions, int(sys.argv[2]) if len(sys.argv) > 2 else 3)
    if not methods:
        files(min(millions, 20))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        kind, *rest = sys.argv[2:]
        print(memory_of_function(*rest[:2], float(rest[2])) if kind == "function" else memory_of_files(*rest))
    else:
        main()
