"""Weight matching against the least it could cost: its similarity products and its assignments, timed apart.

    python benchmarks/matching.py

Two networks: an MLP of three layers of width 4096, and a ViT of base size with its residual stream permuted too. B is A
with its units shuffled and noise on its weights. Prints CPU seconds on one thread and the ratio; the aim is 1.5.
"""

import time

import torch
import transformers
from scipy.optimize import linear_sum_assignment

from notebook_kit import alignment
from notebook_kit.alignment import permutation_spec, permute, random_permutations
from notebook_kit.models import MLP

# The module: in the package, its name means the function.
matching = __import__("sys").modules["notebook_kit.alignment.weight_matching"]
NOISE = 0.5


def networks() -> dict[str, tuple[torch.nn.Module, bool]]:
    """Name to (network, whether its residual stream is permuted)."""
    config = transformers.ViTConfig(num_labels=1000)
    return {
        "MLP 784-4096-4096-4096-10": (MLP([784, 4096, 4096, 4096, 10]), False),
        "ViT-B/16": (transformers.ViTForImageClassification(config), True),
    }


def timed(function, *args):
    """(CPU seconds, result)."""
    started = time.process_time()
    result = function(*args)
    return time.process_time() - started, result


def products(spec, perm: str, a: dict) -> float:
    """CPU seconds of the bare matrix products behind one similarity: C += X Yᵀ for every axis with the permutation."""
    n, seconds = spec.sizes[perm], 0.0
    c = torch.zeros(n, n)
    for name, _, part in spec.uses[perm]:
        columns = a[name].numel() // n // len(part.signs)
        x, y = torch.randn(n, columns), torch.randn(n, columns)
        for _ in part.signs:
            seconds += timed(c.addmm_, x, y.T)[0]
    return seconds


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'network':28} {'visits':>6} {'products':>9} {'assignments':>11} {'matching':>9} {'ratio':>6}  recovered")
    for name, (model, residual) in networks().items():
        spec = permutation_spec(model, residual=residual)
        a = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        noisy = {key: w + NOISE * w.std() * torch.randn_like(w) if w.dim() > 1 else w for key, w in a.items()}
        planted = random_permutations(spec, 1)
        b = permute(spec, planted, noisy)
        visited, assigned = [], []

        def similarity(spec, perm, *rest, visited=visited, real=matching.similarity, **more):
            visited.append(perm)
            return real(spec, perm, *rest, **more)

        def assignment(cost, assigned=assigned, **more):
            seconds, result = timed(lambda: linear_sum_assignment(cost, **more))
            assigned.append(seconds)
            return result

        real = matching.similarity, matching.linear_sum_assignment
        matching.similarity, matching.linear_sum_assignment = similarity, assignment
        try:
            whole, found = timed(alignment.weight_matching, spec, a, b)
        finally:
            matching.similarity, matching.linear_sum_assignment = real
        bare = sum(products(spec, perm, a) for perm in visited)
        undone = alignment.invert(spec, planted)
        right = sum(int((found[p] == undone[p]).sum()) for p in found) / sum(spec.sizes.values())
        ratio = whole / (bare + sum(assigned))
        print(
            f"{name:28} {len(visited):6} {bare:8.1f}s {sum(assigned):10.1f}s {whole:8.1f}s {ratio:6.2f}  {right:.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
