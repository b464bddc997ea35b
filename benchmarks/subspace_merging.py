"""Merges in subspaces beside fusion_bench, on matrices of a ViT-B: task singular vectors, Iso-C, Iso-CTS, OPCM, DOGE.

python benchmarks/subspace_merging.py [rounds] [steps of DOGE]

CPU time on one thread, alternating runs in one process, so that a busy machine slows all alike. The results are held
against each other: relative difference ‖ours − theirs‖ / ‖theirs − base‖ over all matrices. A block of a ViT-B has four
matrices of 768 x 768, one of 768 x 3072 and one of 3072 x 768; its time is their sum. fusion_bench runs DOGE for 400
steps; that many take minutes, so its loop is cut to the same few as ours, and one round has to do.

fusion_bench's OPCM module cannot be imported beside transformers 5, so the two functions that do its work are compiled
from its file. A peer that cannot be found is named and left out.
"""

import ast
import contextlib
import importlib
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import nn

from notebook_kit.merging import doge, isotropic, opcm, task_singular_vectors

TARGET = 2.0
SHAPES = {"768 x 768": (768, 768), "768 x 3072": (768, 3072), "3072 x 768": (3072, 768)}
BLOCK = {"768 x 768": 4, "768 x 3072": 1, "3072 x 768": 1}
EXPERTS = {"task_singular_vectors": 8, "isotropic": 8, "isotropic, common 0.8": 8, "opcm": 3, "doge": 8}
ETA, SUBSPACE, DENSITY = 0.07, 6, 0.3


def matrices(shape: tuple[int, int], count: int) -> tuple[dict, list[dict]]:
    """A base and experts whose updates have a falling spectrum and a part in common, as fine-tuning makes them."""
    g = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=g)

    m, n = shape
    falling = torch.logspace(0, -2, min(m, n))

    def update():
        return (draw(m, min(m, n)) * falling) @ draw(min(m, n), n) * 1e-4 + 2e-4 * draw(m, n)

    base, shared = 0.02 * draw(m, n), update()
    name = "encoder.weight"  # DOGE of fusion_bench asks for such names
    return {name: base}, [{name: base + update() + 0.5 * shared} for _ in range(count)]


# ---------------------------------------------------------------- fusion_bench
def taus(base: dict, experts: list[dict]) -> list[dict]:
    return [{name: expert[name] - base[name] for name in base} for expert in experts]


def theirs_task_singular_vectors():
    module = importlib.import_module("fusion_bench.method.task_singular_vector.utils.TSVM_utils")
    return lambda base, experts: added(base, module.compute_and_sum_svd_mem_reduction(taus(base, experts), [], "cpu"))


def theirs_isotropic():
    module = importlib.import_module("fusion_bench.method.isotropic_merging.iso_utils")
    return lambda base, experts: added(base, module.iso_c(taus(base, experts), accelerator="cpu"))


def theirs_isotropic_cts():
    module = importlib.import_module("fusion_bench.method.isotropic_merging.iso_utils")
    return lambda base, experts: added(base, module.iso_cts(taus(base, experts), 0.8, accelerator="cpu"))


def theirs_opcm():
    neighbour = importlib.import_module("fusion_bench.method.isotropic_merging.iso_utils")
    folder = Path(neighbour.__file__).parents[1] / "opcm"
    svd = functions(folder / "utils.py", "_svd", "svd")
    names = functions(folder / "opcm_general.py", "merge_linear_weights", **svd)

    def merge(base, experts):
        (name,) = base
        self = SimpleNamespace(previous_lambda_t=1, lambda_t=1, fabric=SimpleNamespace(device="cpu"))
        start, merged = base[name], experts[0][name]
        norms = [torch.linalg.norm(merged - start)]
        for expert in experts[1:]:
            norms.append(torch.linalg.norm(expert[name] - start))
            unscaled = names["merge_linear_weights"](self, merged, start, expert[name], "w.weight", 0.5)[1]
            length = torch.linalg.norm(unscaled - start)
            merged = start + (unscaled - start) * (np.mean(norms) / length)
            self.previous_lambda_t = length / np.mean(norms)
        return {name: merged}

    return merge


def functions(path: Path, *wanted: str, **known) -> dict:
    """Compile some functions of a file without running the rest of it."""
    tree = ast.parse(path.read_text("utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in wanted]
    names = {"torch": torch, "Tensor": torch.Tensor, "Tuple": tuple, **known}
    exec(compile(ast.Module(found, []), str(path), "exec"), names)
    return names


def theirs_doge(steps: int):
    module = importlib.import_module("fusion_bench.method.doge_ta.doge_ta")
    pool_class = importlib.import_module("fusion_bench.modelpool").BaseModelPool
    module.range = lambda n: range(min(n, steps))  # its loop over 400 steps, and nothing else
    kind = module.DOGE_TA_Algorithm

    def model(weights):
        net = nn.Module()
        net.encoder = nn.Module()
        net.encoder.weight = nn.Parameter(weights["encoder.weight"].clone())
        return net

    class Pool(pool_class):
        def __init__(self, base, experts):
            self.models = {"_pretrained_": base, **{f"m{i}": expert for i, expert in enumerate(experts)}}

        @property
        def model_names(self):
            return [name for name in self.models if name != "_pretrained_"]

        def load_model(self, name):
            return model(self.models[name])

    class Plain(kind):
        device = "cpu"
        fabric = SimpleNamespace(backward=lambda loss: loss.backward())
        profile = staticmethod(lambda name: contextlib.nullcontext())
        print_profile_summary = staticmethod(lambda: None)
        config = SimpleNamespace(subspace=SUBSPACE, K=DENSITY, lamda=ETA)

        def __init__(self):
            self.delta = None

    return lambda base, experts: dict(Plain().run(Pool(base, experts)).state_dict())


def added(base: dict, star: dict) -> dict:
    return {name: base[name] + star[name] for name in base}


# ---------------------------------------------------------------- the report
def sides(steps: int) -> dict:
    """Method to (ours, what makes theirs)."""
    return {
        "task_singular_vectors": (task_singular_vectors, theirs_task_singular_vectors),
        "isotropic": (isotropic, theirs_isotropic),
        "isotropic, common 0.8": (lambda b, e: isotropic(b, e, common=0.8), theirs_isotropic_cts),
        "opcm": (opcm, theirs_opcm),
        "doge": (
            lambda b, e: doge(b, e, eta=ETA, subspace=SUBSPACE, density=one_more(b), steps=steps, matrices="all"),
            lambda: theirs_doge(steps),
        ),
    }


def one_more(base: dict) -> float:
    """A density that keeps one entry more than ⌊DENSITY · d⌋, as fusion_bench does."""
    d = sum(tensor.numel() for tensor in base.values())
    return (int(DENSITY * d) + 1.5) / d


def timed(merge, base: dict, experts: list[dict]) -> tuple[float, dict]:
    with contextlib.redirect_stdout(None), torch.no_grad():
        started = time.process_time()
        merged = merge(base, experts)
        return time.process_time() - started, {name: tensor.detach() for name, tensor in merged.items()}


def difference(ours: torch.Tensor, theirs: torch.Tensor, base: torch.Tensor) -> tuple[float, int]:
    """Relative to the update, without the entries that one side kept and the other did not; and how many these are.

    Ours keeps exactly as many as asked for, fusion_bench all that tie with the last one.
    """
    gap, size = (ours - theirs).abs(), (theirs - base).square().mean().sqrt()
    kept_by_one = gap > 0.1 * size
    return float(gap[~kept_by_one].norm() / (theirs - base).norm()), int(kept_by_one.sum())


def compare(name: str, ours, theirs, rounds: int) -> None:
    total = {"ours": 0.0, "theirs": 0.0}
    print(f"\n{name}, {EXPERTS[name]} experts")
    for label, shape in SHAPES.items():
        base, experts = matrices(shape, EXPERTS[name])
        runs = [(timed(ours, base, experts), timed(theirs, base, experts)) for _ in range(rounds)]
        seconds = [statistics.median(run[side][0] for run in runs) for side in (0, 1)]
        (key,) = base
        gap, differ = difference(runs[0][0][1][key], runs[0][1][1][key], base[key])
        for side, value in zip(total, seconds, strict=True):
            total[side] += BLOCK[label] * value
        print(f"  {label:>10}: {seconds[0]:6.2f} s against {seconds[1]:6.2f} s,", end=" ")
        print(f"{seconds[1] / seconds[0]:4.1f} times as fast; relative difference {gap:.1e}", end="")
        print(f", and {differ} entries tied at the edge of what is kept" if differ else "", flush=True)
    ratio = total["theirs"] / total["ours"]
    verdict = "met" if ratio >= TARGET else "MISSED"
    print(f"  a block of a ViT-B: {total['ours']:.2f} s against {total['theirs']:.2f} s:", end=" ")
    print(f"{ratio:.1f} times as fast, target {TARGET:g}: {verdict}")


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    print(f"CPU seconds, one thread, median of {rounds}; DOGE with {steps} steps")
    for name, (ours, make) in sides(steps).items():
        try:
            theirs = make()
        except (ImportError, AttributeError) as error:
            print(f"\n{name}: fusion_bench left out, {error}")
            continue
        compare(name, ours, theirs, rounds)


if __name__ == "__main__":
    main()
