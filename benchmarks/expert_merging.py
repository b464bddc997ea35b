"""M-SMoE on one Mixtral-shaped layer against its parts: reading the weights twice, and the assignments.

    python benchmarks/expert_merging.py            # 8 experts of 25 M parameters
    python benchmarks/expert_merging.py --size quick    # 8 experts of 3 M
    python benchmarks/expert_merging.py --size mixtral  # 8 experts of 100 M: 3.2 GB, minutes

A merge has to read every weight, multiply the units of each member with its leader's (the similarity products) and
solve an assignment; then it reads the weights once more to average them. All parts are timed in the same run, apart.
With align="sketch" the products are of projected weights, and the bound is reading and assignments alone.
Prints seconds (CPU) and peak memory beyond the layer's own weights.
"""

import argparse
import gc
import time
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from notebook_kit.expert_merging.align_experts import Aligner, average_group
from notebook_kit.expert_merging.m_smoe import expert_similarity
from notebook_kit.expert_merging.plan import dominant_experts, group_by_similarity, merge_weights_of
from notebook_kit.expert_merging.view import ExpertLayer


def layer_of(d: int, f: int, n: int = 8) -> ExpertLayer:
    """A block with random weights."""
    config = MixtralConfig(hidden_size=d, intermediate_size=f, num_local_experts=n)
    block = MixtralSparseMoeBlock(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    return ExpertLayer("layer", block)


def resident(kind: str) -> int:
    """Bytes in memory: now (VmRSS), or at most since the peak was cleared (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def clocked(function) -> tuple[float, object]:
    """CPU seconds, and the result."""
    started = time.process_time()
    result = function()
    return time.process_time() - started, result


def read_twice(layer: ExpertLayer) -> None:
    """Every weight goes through the processor two times."""
    for _ in range(2):
        for e in range(len(layer)):
            for part in layer.expert(e):
                part.sum()


SIZES = {"quick": (512, 2048), "middle": (1536, 5376), "mixtral": (4096, 8192)}


def peak_of(function) -> tuple[float, int, object]:
    """CPU seconds, bytes at the peak beyond what was there before, and the result."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    seconds, result = clocked(function)
    return seconds, resident("VmHWM") - before, result


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="middle")
    torch.set_num_threads(1)
    d, f = SIZES[parser.parse_args().size]
    layer = layer_of(d, f)
    logits = torch.randn(4096, 8, generator=torch.Generator().manual_seed(1))
    usage = torch.tensor([0.2, 0.18, 0.16, 0.14, 0.1, 0.09, 0.07, 0.06])
    weights = sum(part.numel() for part in layer.expert(0))
    print(f"8 experts of {weights / 1e6:.0f} M parameters, {8 * 4 * weights / 1e9:.2f} GB; 4 are left")

    def merge(how: str) -> int:
        groups = group_by_similarity(dominant_experts({"": usage}, 4)[""], expert_similarity(layer, logits))
        combine, moved = average_group(Aligner(how)), 0
        for group, shares in zip(groups, merge_weights_of(usage, groups, "frequency"), strict=True):
            combine(layer, group, shares)  # one merged expert at a time, as `merge_expert_files` writes them
            moved += len(group) - 1
        return moved

    exact, extra, moved = peak_of(lambda: merge("weight"))
    rough, _, _ = peak_of(lambda: merge("sketch"))
    reading, _ = clocked(lambda: read_twice(layer))
    products = assignments = 0.0
    for e in range(moved):
        (gate_a, up_a, down_a), (gate_b, up_b, down_b) = layer.expert(e), layer.expert(e + moved)
        took, c = clocked(lambda: gate_a @ gate_b.T + (up_a @ up_b.T + down_a.T @ down_b).abs())  # noqa: B023
        products += took
        assignments += clocked(lambda: linear_sum_assignment(c.numpy(), maximize=True))[0]  # noqa: B023
        del c
    print(f"merge                                     {exact:8.2f} s")
    print(f"merge, sketched                           {rough:8.2f} s")
    print(f"reading the weights twice                 {reading:8.2f} s")
    print(f"similarity products                       {products:8.2f} s, {moved} pairs")
    print(f"assignments                               {assignments:8.2f} s")
    print(f"merge / all parts                         {exact / (reading + products + assignments):8.2f}")
    print(f"sketched / (reading + assignments)        {rough / (reading + assignments):8.2f}")
    print(f"peak beyond the layer                     {extra / 1e9:8.2f} GB, {extra / (4 * weights):.1f} experts")


if __name__ == "__main__":
    main()
